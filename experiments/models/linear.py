"""Linear models of all features side by side, by scikit-learn: what any fusion has to beat.

Each learns from the training rows, for at most so many seconds, and returns its predictions for the
test rows and whether it was done by then. Every modality [N, …] is flattened and standardised, its
NaN become 0, the mean; where a training row lacks a modality, one more column tells who has it.

Raises:
  InputError: the features fit no memory, there is no time for any fit, or there is nothing to tell
    apart.
"""

import time
import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from experiments.common.errors import InputError
from experiments.datasets import Split

C = (1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties of a logistic regression
ALPHAS = np.logspace(-2, 6, 17)  # penalties of a ridge regression
CHOSEN_ON = 2000  # rows, at most, on which C is chosen, and half as many for a ridge's penalty
MOST_CELLS = 10**8  # training rows × columns
MOST_ITERATIONS = 2000  # of a logistic regression
FLOPS = 2e9  # a second, of products of matrices on one core; no core has fewer


class Fit(NamedTuple):
    """Predictions [N, C] or [N] for the test rows, and whether the model was done in time."""

    predictions: np.ndarray
    done: bool


def logistic_regression(
    train: Split, test: Split, classes: int, seconds: float = float("inf")
) -> Fit:
    """Probabilities [N, C] of classes [N]; 0 for a class that no training row is of.

    C is chosen by log loss in five-fold cross-validation on the training rows, in half the time; in
    fewer folds where there are no two classes of five rows. Rows of a class with fewer rows than
    folds sit out there.
    """
    end = time.monotonic() + seconds
    return _probabilities(*_columns(train, test), train.labels, classes, end)


def one_vs_rest(train: Split, test: Split, seconds: float = float("inf")) -> Fit:
    """Probabilities [N, C] of labels [N, C] in {0, 1}: a logistic regression for each class."""
    end = time.monotonic() + seconds
    x, x_test = _columns(train, test)
    fits = []
    for i, labels in enumerate(train.labels.T):
        if labels.min() == labels.max():
            fits.append(Fit(np.full(len(x_test), float(labels[0])), True))
            continue
        now = time.monotonic()
        share = now + (end - now) / (train.labels.shape[1] - i)
        fit = _probabilities(x, x_test, labels.astype(int), 2, share)
        fits.append(Fit(fit.predictions[:, 1], fit.done))
    return Fit(np.stack([fit.predictions for fit in fits], axis=1), all(fit.done for fit in fits))


def ridge(train: Split, test: Split, seconds: float = float("inf")) -> Fit:
    """Values [N] by ridge regression; the penalty, for a row, by leave-one-out validation."""
    x, x_test = _columns(train, test)
    flops = len(x) * x.shape[1] * min(x.shape)
    if flops > FLOPS * seconds:
        raise InputError(f"{len(x):,} rows × {x.shape[1]:,} features take longer than the fusion")
    labels, some = train.labels.astype(np.float64), _some_rows(len(x), CHOSEN_ON // 2)
    with threadpool_limits(1):
        alpha = RidgeCV(ALPHAS, gcv_mode="eigen").fit(x[some], labels[some]).alpha_
        found = Ridge(alpha * len(x) / len(some)).fit(x, labels).predict(x_test)
    return Fit(found, True)


def _probabilities(
    x: np.ndarray, x_test: np.ndarray, labels: np.ndarray, classes: int, end: float
) -> Fit:
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"all training rows are of class {present[0]}; expected two classes")
    with threadpool_limits(1):  # beside JAX's, more threads wait for each other and nothing else
        now = time.monotonic()
        chosen, complete = _choose_c(x, labels, now + (end - now) / 2)
        model, done = _fitted(x, labels, chosen, end)
        probabilities = np.zeros((len(x_test), classes))
        probabilities[:, present] = model.predict_proba(x_test)
    return Fit(probabilities, done and complete)


def _fitted(
    x: np.ndarray, labels: np.ndarray, c: float, end: float
) -> tuple[LogisticRegression, bool]:
    """A logistic regression, and whether it converged before the `end`, a monotonic time.

    L-BFGS runs for as many iterations as there is time for, by a rough count and then by its speed.
    """
    model = LogisticRegression(C=c, warm_start=True)
    flops = 4 * x.size * len(np.unique(labels))  # of an iteration
    iterations = int(np.clip((end - time.monotonic()) * FLOPS / flops, 10, MOST_ITERATIONS))
    while True:
        began = time.monotonic()
        with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
            model.set_params(max_iter=iterations).fit(x, labels)
        if (done := model.n_iter_.max() < iterations) or iterations == MOST_ITERATIONS:
            return model, bool(done)
        now = time.monotonic()
        affordable = (end - now) / (now - began) * iterations
        if affordable < 1:
            return model, False
        iterations = int(min(affordable, MOST_ITERATIONS))


def _choose_c(x: np.ndarray, labels: np.ndarray, end: float) -> tuple[float, bool]:
    """The C with the smallest mean log loss, of those for which there was time; whether of all."""
    rows = _some_rows(len(labels), CHOSEN_ON)
    count = np.bincount(labels[rows])
    folds = next((k for k in (5, 4, 3, 2) if np.sum(count >= k) >= 2), None)
    if folds is None:
        return C[0], True
    rows = rows[count[labels[rows]] >= folds]
    x, labels, losses = x[rows], labels[rows], {C[0]: np.inf}
    for c in C:
        found = []
        for learned, held_out in StratifiedKFold(folds).split(x, labels):
            if time.monotonic() > end:
                return min(losses, key=losses.__getitem__), False
            model, _ = _fitted(x[learned], labels[learned], c, end)
            predicted = model.predict_proba(x[held_out])
            found.append(log_loss(labels[held_out], predicted, labels=model.classes_))
        losses[c] = np.mean(found)
    return min(losses, key=losses.__getitem__), True


def _some_rows(rows: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _columns(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows as [N, D]; few rows of more columns than that in fewer columns.

    A model with an L2 penalty depends on the columns through inner products of rows alone: with
    X Xᵀ = U S² Uᵀ, the rows of U S are as good as those of X, and those of X_test Xᵀ U S⁻¹ as
    those of X_test.
    """
    rows, columns = len(train.labels), sum(x[0].size for x in train.inputs.values())
    if rows * columns > MOST_CELLS:
        raise InputError(f"{rows:,} rows × {columns:,} features are too many for it")
    pairs = [_standardised(x, test.inputs[name]) for name, x in train.inputs.items()]
    x, x_test = (np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))
    if x.shape[1] <= len(x) or len(x) > CHOSEN_ON or not x.any():
        return x, x_test
    with threadpool_limits(1):
        square, u = np.linalg.eigh(x @ x.T)
        kept = square > 1e-10 * square[-1]
        s, u = np.sqrt(square[kept]), u[:, kept]
        return u * s, x_test @ (x.T @ (u / s))


def _standardised(x: np.ndarray, x_test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A modality [N, …] as columns [N, D], and who has it as one more where a row has not."""
    x, x_test = (part.reshape(len(part), -1).astype(np.float64) for part in (x, x_test))
    here, here_in_test = (~np.isnan(part).all(axis=1) for part in (x, x_test))
    if not here.all():
        x, x_test = np.column_stack([x, here]), np.column_stack([x_test, here_in_test])
    x[:, np.isnan(x).all(axis=0)] = 0
    scaler = StandardScaler().fit(x)
    return np.nan_to_num(scaler.transform(x)), np.nan_to_num(scaler.transform(x_test))
