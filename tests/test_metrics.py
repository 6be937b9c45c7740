"""The metrics against their definitions, counted by hand in NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

from experiments.training.metrics import (
    binary_metrics,
    confusion_counts,
    frequent_labels_floor,
    most_confused,
    multiclass_metrics,
    multilabel_metrics,
    per_class_f1,
    regression_metrics,
    sentiment_metrics,
)


def f1(truth, predicted):
    """2 TP / (2 TP + FP + FN) of two boolean arrays, 0 where that is 0 / 0."""
    hits, misses = (truth & predicted).sum(), (truth ^ predicted).sum()
    return 2 * hits / (2 * hits + misses) if hits + misses else 0.0


def multilabel_by_hand(truth, predicted):
    per_class = np.array([f1(t, p) for t, p in zip(truth.T, predicted.T, strict=True)])
    support = truth.sum(axis=0)
    return {
        "micro_f1": f1(truth.ravel(), predicted.ravel()),
        "macro_f1": per_class.mean(),
        "weighted_f1": per_class @ support / support.sum() if support.sum() else 0.0,
        "samples_f1": np.mean([f1(t, p) for t, p in zip(truth, predicted, strict=True)]),
    }


@pytest.mark.parametrize("seed", range(10))
def test_multilabel_metrics_follow_their_formulas(seed):
    rng = np.random.default_rng(seed)
    labels, probabilities = rng.random((40, 7)) < 0.3, rng.random((40, 7))
    labels[:, 0] = False  # a class that is never true,
    probabilities[:, 1] = 0.1  # one that is never predicted,
    labels[:, 2], probabilities[:, 2] = False, 0.1  # and one that is neither
    got = multilabel_metrics(labels.astype(int), probabilities)
    assert got == pytest.approx(multilabel_by_hand(labels, probabilities > 0.5))


def test_multilabel_extremes():
    empty = np.zeros((3, 2))
    assert set(multilabel_metrics(empty, empty).values()) == {0.0}
    labels = np.eye(3)
    assert set(multilabel_metrics(labels, labels).values()) == {1.0}
    half = multilabel_metrics(labels, np.full((3, 3), 0.5))  # 0.5 is not above the threshold
    assert half["micro_f1"] == 0.0


def test_low_precision_probabilities_are_taken():
    labels = np.eye(3)
    assert multilabel_metrics(labels, jnp.asarray(labels, jnp.bfloat16))["micro_f1"] == 1.0


def test_per_class_f1_multilabel():
    rng = np.random.default_rng(0)
    labels, probabilities = rng.random((30, 3)) < 0.4, rng.random((30, 3))
    got = per_class_f1(labels, probabilities, ["drama", "war", "news"])
    assert list(got) == ["drama", "war", "news"]
    for c, score in enumerate(got.values()):
        assert score["f1"] == pytest.approx(f1(labels[:, c], probabilities[:, c] > 0.5))
        assert score["support"] == labels[:, c].sum()


def test_per_class_f1_multiclass():
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.4, 0.3, 0.3], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.0, 0.6, 0.4]])
    got = per_class_f1(labels, probabilities, ["a", "b", "c"])
    assert got["a"] == {"f1": pytest.approx(2 / 3), "support": 2}
    assert got["b"] == {"f1": pytest.approx(4 / 5), "support": 2}
    assert got["c"] == {"f1": 0.0, "support": 0}


@pytest.mark.parametrize("seed", range(5))
def test_floor_is_the_best_constant_answer_on_train(seed):
    rng = np.random.default_rng(seed)
    share = rng.random(6)
    train, test = rng.random((50, 6)) < share, rng.random((30, 6)) < share

    def constant(chosen, labels):
        return multilabel_by_hand(labels, np.broadcast_to(chosen, labels.shape))

    count = train.sum(axis=0)
    candidates = [count >= n for n in range(51, 0, -1)]
    best = max(candidates, key=lambda chosen: constant(chosen, train)["micro_f1"])
    assert frequent_labels_floor(train, test) == pytest.approx(constant(best, test))


def test_floor_does_not_read_the_test_labels():
    train = np.array([[1, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert frequent_labels_floor(train, np.array([[0, 0, 1]]))["micro_f1"] == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_follow_their_formulas(seed):
    rng = np.random.default_rng(seed)
    labels, probabilities = rng.integers(0, 2, 40), rng.random(40).round(1)  # rounding makes ties
    higher = probabilities[labels == 1][:, None] - probabilities[labels == 0]
    got = binary_metrics(labels, probabilities)
    assert got["accuracy"] == pytest.approx(np.mean((probabilities > 0.5) == labels))
    assert got["f1"] == pytest.approx(f1(labels == 1, probabilities > 0.5))
    assert got["auc"] == pytest.approx(np.mean((higher > 0) + 0.5 * (higher == 0)))


def test_auc_of_a_single_class_is_nan_without_a_warning():
    got = binary_metrics(np.ones(4, int), np.full(4, 0.9))
    assert got["accuracy"] == got["f1"] == 1.0
    assert math.isnan(got["auc"])


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_metrics_follow_their_formulas(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 40)  # class 3 is never true, class 4 neither true nor predicted
    probabilities = rng.dirichlet(np.ones(5), 40)
    probabilities[:, 4] = 0
    predicted = probabilities.argmax(axis=1)
    scores = np.array([f1(labels == c, predicted == c) for c in range(5)])
    support = np.array([(labels == c).sum() for c in range(5)])
    occurs = np.array([c in labels or c in predicted for c in range(5)])
    got = multiclass_metrics(labels, probabilities)
    assert got["accuracy"] == pytest.approx((labels == predicted).mean())
    assert got["weighted_f1"] == pytest.approx(scores @ support / support.sum())
    assert got["macro_f1"] == pytest.approx(scores[occurs].mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multilabel_metrics(np.eye(3), np.zeros((3, 4))), r"\(3, 3\).*\(3, 4\)"),
        (lambda: multilabel_metrics(np.eye(3), np.full((3, 3), 2.5)), "apply sigmoid"),
        (lambda: multilabel_metrics(np.eye(3), np.full((3, 3), np.nan)), "nan"),
        (lambda: multilabel_metrics(3 * np.eye(3), np.eye(3)), "0s and 1s"),
        (lambda: multilabel_metrics(np.ones((3, 1)), np.ones((3, 1))), "binary_metrics"),
        (lambda: binary_metrics(np.ones(3), np.ones((3, 2))), r"\(3,\).*\(3, 2\)"),
        (lambda: multiclass_metrics(np.zeros(3), np.ones((4, 2))), r"\(3,\).*\(4, 2\)"),
        (lambda: multiclass_metrics(np.array([0, 2]), np.ones((2, 2))), "from 0 to 1"),
        (lambda: frequent_labels_floor(np.eye(3), np.eye(4)), r"\(3, 3\).*\(4, 4\)"),
        (lambda: frequent_labels_floor(np.zeros((3, 2)), np.eye(2)), "no frequent label"),
        (lambda: per_class_f1(np.eye(3), np.eye(3), ["a"]), "1 class names for 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", range(5))
def test_regression_metrics_follow_their_formulas(seed):
    rng = np.random.default_rng(seed)
    y = rng.standard_normal(30)
    p = y + rng.standard_normal(30)
    centred, guess = y - y.mean(), p - p.mean()
    expected = {
        "mae": np.abs(y - p).mean(),
        "rmse": np.sqrt(np.mean((y - p) ** 2)),
        "r2": 1 - np.sum((y - p) ** 2) / np.sum(centred**2),
        "pearson": centred @ guess / np.sqrt(centred @ centred * (guess @ guess)),
    }
    assert regression_metrics(y, p) == pytest.approx(expected)


def test_regression_metrics_without_variation():
    flat = regression_metrics(np.ones(4), np.arange(4.0))
    assert math.isnan(flat["r2"]) and math.isnan(flat["pearson"]) and flat["mae"] == 1
    constant = regression_metrics(np.arange(4.0), np.full(4, 1.5))
    assert constant["r2"] == 0 and math.isnan(constant["pearson"])
    with pytest.raises(ValueError, match="expected"):
        regression_metrics(np.ones(4), np.ones((4, 1)))


class TestSentiment:
    def by_scikit_learn(self, y, p):
        def binary(truth, predicted):
            return accuracy_score(truth, predicted), f1_score(truth, predicted, average="weighted")

        def grade(x):
            return np.clip(np.round(x), -3, 3).astype(int)

        clear = y != 0
        acc2, f1 = binary(y >= 0, p >= 0)
        acc2_nonzero, f1_nonzero = binary(y[clear] > 0, p[clear] > 0)
        return {
            "acc7": accuracy_score(grade(y), grade(p)),
            "acc2": acc2,
            "f1": f1,
            "acc2_nonzero": acc2_nonzero,
            "f1_nonzero": f1_nonzero,
            "mae": mean_absolute_error(y, p),
            "pearson": np.corrcoef(y, p)[0, 1],
        }

    @pytest.mark.parametrize("seed", range(10))
    def test_equal_scikit_learn(self, seed):
        rng = np.random.default_rng(seed)
        labels = np.round(rng.uniform(-3, 3, 60), 1)
        labels[: rng.integers(20)] = 0
        predictions = labels + rng.normal(0, 1.5, 60)  # some beyond 3
        predictions[-3:] = 0
        expected = self.by_scikit_learn(labels, predictions)
        assert sentiment_metrics(labels, predictions) == pytest.approx(expected)

    def test_by_hand(self):
        labels, predictions = [-3, -0.4, 0, 0, 0.2, 2.6], [-9, 0.1, -0.2, 0.0, -0.1, 7]
        got = sentiment_metrics(labels, predictions)
        assert got["acc7"] == 1  # all round to the same, the ends after clipping
        assert got["acc2"] == pytest.approx(3 / 6)  # a zero counts as positive: rows 1, 4 and 6
        assert got["acc2_nonzero"] == pytest.approx(2 / 4)  # rows 1 and 6
        assert got["mae"] == pytest.approx((6 + 0.5 + 0.2 + 0 + 0.3 + 4.4) / 6)

    def test_f1_is_weighted_by_the_labels_not_the_predictions(self):
        labels, predictions = np.array([-1.0, 1, 1, 1]), np.array([-1.0, -1, -1, 1])
        # Negative: TP 1, FP 2, FN 0: 1/2, one row. Positive: TP 1, FN 2: 1/2, three rows.
        assert sentiment_metrics(labels, predictions)["f1"] == pytest.approx(0.5)
        labels, predictions = np.array([-1.0, -1, 1, 1]), np.array([-1.0, 1, 1, 1])
        # Negative 2/3, positive 4/5; with the arguments swapped (1/4) 2/3 + (3/4) 4/5.
        assert sentiment_metrics(labels, predictions)["f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)

    @pytest.mark.parametrize("constant", [-2.0, 0.0, 0.3])
    def test_constant_predictions(self, constant):
        labels = np.array([-2.0, 0.0, 1.0, 2.5])
        got = sentiment_metrics(labels, np.full(4, constant))
        assert math.isnan(got["pearson"])
        assert got["acc2"] == (0.75 if constant >= 0 else 0.25)
        assert got["acc2_nonzero"] == (2 / 3 if constant > 0 else 1 / 3)

    def test_no_zeros_and_nothing_but_zeros(self):
        labels = np.array([-1.0, 2.0, 3.0])
        got = sentiment_metrics(labels, np.array([-0.5, 1.0, -1.0]))
        assert got["acc2"] == got["acc2_nonzero"] and got["f1"] == got["f1_nonzero"]
        got = sentiment_metrics(np.zeros(3), np.array([0.0, 1.0, -1.0]))
        assert got["acc2"] == pytest.approx(2 / 3) and got["acc7"] == pytest.approx(1 / 3)
        assert math.isnan(got["acc2_nonzero"]) and math.isnan(got["f1_nonzero"])

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"expected \[N\] for both"):
            sentiment_metrics(np.zeros((3, 1)), np.zeros(3))


def test_confusion_counts_every_row_once():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    probabilities = np.hstack([rng.random((200, 5)), np.zeros((200, 1))])  # never the last
    counts = confusion_counts(labels, probabilities)
    assert counts.shape == (6, 6) and counts.sum() == 200 and not counts[4:].any()
    for label, predicted in ((0, 0), (2, 4)):
        seen = sum(
            y == label and max(range(6), key=p.__getitem__) == predicted
            for y, p in zip(labels, probabilities, strict=True)
        )
        assert counts[label, predicted] == seen


def test_most_confused_are_the_largest_mistakes():
    counts = np.array([[28, 12, 0], [3, 5, 0], [0, 0, 9]])
    assert most_confused(counts, ["cat", "dog", "fish"]) == [
        "cat → dog: 12 of 40",
        "dog → cat: 3 of 8",
    ]
    assert most_confused(counts, ["cat", "dog", "fish"], most=1) == ["cat → dog: 12 of 40"]
    assert most_confused(np.eye(3, dtype=int), ["a", "b", "c"]) == []
