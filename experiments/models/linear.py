"""Linear models of all features side by side, by scikit-learn: what any fusion has to beat.

Each learns from the training rows and returns its predictions for the test rows. Every modality
[N, …] is flattened and standardised, its NaN become 0, the mean; where a training row lacks a
modality, one more column tells who has it.

Raises:
  InputError: it would take longer than some ten seconds, or there is nothing to tell apart.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from experiments.common.errors import InputError
from experiments.datasets import Split

C = (1e-3, 1e-2, 1e-1, 1.0)  # inverse penalties of a logistic regression
ALPHAS = np.logspace(-2, 6, 17)  # penalties of a ridge regression
CHOSEN_ON = 2000  # rows, at most, on which C is chosen, and half as many for a ridge's penalty
MOST_CELLS = 10**8  # training rows × columns
MOST_FLOPS = 10**11


def logistic_regression(train: Split, test: Split, classes: int) -> np.ndarray:
    """Probabilities [N, C] of classes [N]; 0 for a class that no training row is of.

    C is chosen by log loss in five-fold cross-validation on the training rows; in fewer folds where
    there are no two classes of five rows. Rows of a class with fewer rows than folds sit out there.
    """
    _refuse_large(train, classes)
    return _probabilities(*_columns(train, test), train.labels, classes)


def one_vs_rest(train: Split, test: Split) -> np.ndarray:
    """Probabilities [N, C] of labels [N, C] in {0, 1}: a logistic regression for each class."""
    _refuse_large(train, train.labels.shape[1])
    x, x_test = _columns(train, test)

    def of_class(labels: np.ndarray) -> np.ndarray:
        if labels.min() == labels.max():
            return np.full(len(x_test), float(labels[0]))
        return _probabilities(x, x_test, labels.astype(int), 2)[:, 1]

    return np.stack([of_class(labels) for labels in train.labels.T], axis=1)


def ridge(train: Split, test: Split) -> np.ndarray:
    """Values [N] by ridge regression; the penalty, for a row, by leave-one-out validation."""
    _refuse_large(train, 0)
    x, x_test = _columns(train, test)
    labels, some = train.labels.astype(np.float64), _some_rows(len(x), CHOSEN_ON // 2)
    with threadpool_limits(1):
        alpha = RidgeCV(ALPHAS, gcv_mode="eigen").fit(x[some], labels[some]).alpha_
        return Ridge(alpha * len(x) / len(some)).fit(x, labels).predict(x_test)


def _probabilities(
    x: np.ndarray, x_test: np.ndarray, labels: np.ndarray, classes: int
) -> np.ndarray:
    present = np.unique(labels)
    if len(present) < 2:
        raise InputError(f"all training rows are of class {present[0]}; expected two classes")
    model = LogisticRegression(max_iter=2000)
    with threadpool_limits(1):  # beside JAX's, more threads wait for each other and nothing else
        model.set_params(C=_choose_c(model, x, labels)).fit(x, labels)
        probabilities = np.zeros((len(x_test), classes))
        probabilities[:, present] = model.predict_proba(x_test)
    return probabilities


def _choose_c(model: LogisticRegression, x: np.ndarray, labels: np.ndarray) -> float:
    rows = _some_rows(len(labels), CHOSEN_ON)
    count = np.bincount(labels[rows])
    for folds in (5, 4, 3, 2):
        if np.sum(count >= folds) >= 2:
            rows = rows[count[labels[rows]] >= folds]
            choice = GridSearchCV(model, {"C": C}, scoring="neg_log_loss", cv=folds, refit=False)
            return choice.fit(x[rows], labels[rows]).best_params_["C"]
    return C[0]


def _some_rows(rows: int, most: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def _refuse_large(train: Split, outputs: int) -> None:
    """By a rough count of what a logistic regression with so many outputs costs, or ridge (0)."""
    rows, columns = len(train.labels), sum(x[0].size for x in train.inputs.values())
    narrowed = min(columns, rows) if rows <= CHOSEN_ON else columns
    passes = 50 * (rows + 20 * min(rows, CHOSEN_ON))  # 20 fits choose C
    flops = narrowed * (passes * outputs if outputs else rows * narrowed)
    if rows * columns > MOST_CELLS or flops > MOST_FLOPS:
        raise InputError(f"{rows:,} rows × {columns:,} features are too many to fit it in passing")


def _columns(train: Split, test: Split) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows as [N, D]; few rows of more columns than that in fewer columns.

    A model with an L2 penalty depends on the columns through inner products of rows alone: with
    X Xᵀ = U S² Uᵀ, the rows of U S are as good as those of X, and those of X_test Xᵀ U S⁻¹ as
    those of X_test.
    """
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
