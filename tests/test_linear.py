"""The linear models, against scikit-learn by hand and against closed forms."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from experiments.common.errors import InputError
from experiments.datasets import Split
from experiments.models import linear

RNG = np.random.default_rng(0)
N = 60
CLASSES = RNG.integers(0, 3, N)
A = 3 + 2 * RNG.standard_normal((N, 4)) + CLASSES[:, None]
B = RNG.standard_normal((N, 2, 3))


def splits(labels, a=A, b=B, train=45):
    parts = slice(None, train), slice(train, None)
    return (Split({"a": a[rows], "b": b[rows]}, labels[rows]) for rows in parts)


def side_by_side(train=45):
    x = np.hstack([A, B.reshape(N, -1)])
    x = StandardScaler().fit(x[:train]).transform(x)
    return x[:train], x[train:]


def test_logistic_regression():
    x, x_test = side_by_side()
    choice = {"C": [0.001, 0.01, 0.1, 1]}
    model = GridSearchCV(LogisticRegression(max_iter=2000), choice, scoring="neg_log_loss", cv=5)
    expected = model.fit(x, CLASSES[:45]).predict_proba(x_test)
    got, done = linear.logistic_regression(*splits(CLASSES), 3)
    assert_allclose(got, expected, atol=1e-12)
    assert done


def test_one_vs_rest():
    labels = np.stack([CLASSES == 0, CLASSES > 0, np.zeros(N), np.ones(N)], axis=1)
    got, done = linear.one_vs_rest(*splits(labels.astype(np.float32)))
    assert done
    of_first, _ = linear.logistic_regression(*splits((CLASSES == 0).astype(int)), 2)
    assert_allclose(got[:, 0], of_first[:, 1])
    assert_allclose(got[:, 0] + got[:, 1], 1, atol=1e-3)
    assert_allclose(got[:, 2:], [[0, 1]] * 15)


def test_ridge():
    """(XᵀX + αI)⁻¹ Xᵀ(y − ȳ) with the α of the least leave-one-out error, each row left out."""
    x, x_test = side_by_side()
    labels = 5 + A[:, 0] + RNG.standard_normal(N)
    y = labels[:45] - labels[:45].mean()

    def weights(x, y, alpha):
        return np.linalg.solve(x.T @ x + alpha * np.eye(10), x.T @ y)

    def error(alpha):
        total = 0.0
        for i in range(45):
            rest, rest_y = np.delete(x, i, axis=0), np.delete(y, i)
            w = weights(rest - rest.mean(axis=0), rest_y - rest_y.mean(), alpha)
            total += (y[i] - rest_y.mean() - (x[i] - rest.mean(axis=0)) @ w) ** 2
        return total

    best = min(linear.ALPHAS, key=error)
    expected = labels[:45].mean() + x_test @ weights(x, y, best)
    assert_allclose(linear.ridge(*splits(labels)).predictions, expected, rtol=1e-6)


@pytest.mark.parametrize("rows", [10, 45])
def test_fewer_columns_give_the_same_predictions(monkeypatch, rows):
    """Columns that only repeat the others, until there are more of them than rows."""
    wide = np.concatenate([B] * 40, axis=1)
    labels = A[:, 0] + B[:, 0, 0]
    narrow, _ = linear.ridge(*splits(labels, b=wide, train=rows))
    classes, _ = linear.logistic_regression(*splits(CLASSES, b=wide, train=rows), 3)
    columns, _ = linear._columns(*splits(labels, b=wide, train=rows))
    assert columns.shape[1] <= rows
    monkeypatch.setattr(linear, "CHOSEN_ON", 0)
    monkeypatch.setattr(linear, "_some_rows", lambda rows, most: np.arange(rows))
    assert linear._columns(*splits(labels, b=wide, train=rows))[0].shape[1] == 244
    assert_allclose(linear.ridge(*splits(labels, b=wide, train=rows))[0], narrow, rtol=1e-6)
    got, _ = linear.logistic_regression(*splits(CLASSES, b=wide, train=rows), 3)
    assert_allclose(got, classes, atol=1e-2)


def test_what_is_missing_takes_the_mean_and_a_column_tells():
    a = A.copy()
    a[:20], a[50], a[30, 1] = np.nan, np.nan, np.nan
    x, x_test = linear._columns(*splits(CLASSES, a=a))
    assert x.shape == (45, 4 + 1 + 6)
    mean, deviation = np.nanmean(a[:45], axis=0), np.nanstd(a[:45], axis=0)
    expected = np.nan_to_num((a - mean) / deviation)
    assert_allclose(np.concatenate([x, x_test])[:, :4], expected, atol=1e-12)
    assert (x[:20, 4] < 0).all() and (x[20:, 4] > 0).all() and x_test[5, 4] == x[0, 4]
    a[:] = np.nan
    a[45:] = 1
    assert np.isfinite(linear.logistic_regression(*splits(CLASSES, a=a), 3).predictions).all()


@pytest.mark.parametrize("count", [(9, 1), (5, 4, 1), (8, 1, 1), (4, 3, 3)])
def test_ten_rows_and_rare_classes(count):
    labels = np.repeat(np.arange(len(count)), count)
    x = RNG.standard_normal((10, 50))
    split = Split({"a": x}, labels)
    got, _ = linear.logistic_regression(split, split, len(count) + 1)
    assert_allclose(got.sum(axis=1), 1)
    assert (got[:, -1] == 0).all() and (got[:, :-1] > 0).all()
    assert np.isfinite(linear.ridge(split, split).predictions).all()
    constant = Split({"a": np.ones((10, 50))}, labels)
    shares, _ = linear.logistic_regression(constant, constant, len(count))
    assert_allclose(shares, np.tile(np.array(count) / 10, (10, 1)), atol=1e-3)


def test_what_is_refused():
    train, test = splits(np.full(N, 2))
    with pytest.raises(InputError, match="all training rows are of class 2; expected two"):
        linear.logistic_regression(train, test, 3)
    many = Split({"a": np.broadcast_to(np.float32(0), (200_000, 600))}, np.zeros((200_000, 2)))
    for model in (linear.one_vs_rest, linear.ridge):
        with pytest.raises(InputError, match="200,000 rows × 600 features are too many"):
            model(many, many)


def of_nine_classes(train, test, seconds):
    return linear.logistic_regression(train, test, 9, seconds)


@pytest.mark.parametrize("fit", [of_nine_classes, linear.one_vs_rest])
def test_what_is_not_done_in_time_says_so(fit):
    """A tenth of a second, where it takes many; some iterations are run all the same."""
    labels = RNG.integers(0, 9, 2000)
    x = Split({"a": RNG.standard_normal((2000, 1000)).astype(np.float32)}, labels)
    if fit is linear.one_vs_rest:
        x = x._replace(labels=np.eye(9, dtype=np.float32)[labels])
    predictions, done = fit(x, x, 0.1)
    assert not done
    assert (predictions.argmax(axis=1) == labels).mean() > 0.3


def test_a_ridge_regression_that_takes_too_long_is_not_begun():
    x = Split({"a": np.zeros((2000, 1500), np.float32)}, np.arange(2000.0))
    with pytest.raises(
        InputError, match=r"2,000 rows × 1,500 features take longer than the fusion"
    ):
        linear.ridge(x, x, 0.1)
