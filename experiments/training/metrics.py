"""Metrics of predictions, by scikit-learn, as plain dicts of floats.

N samples, C classes. Probabilities lie in [0, 1]; a class is predicted where p > 0.5.
F1 of a class = 2 TP / (2 TP + FP + FN), and 0 where that is 0 / 0 (nothing there, nothing
predicted). Then micro: the formula on counts summed over classes; macro: mean over classes;
weighted: mean over classes by support (number of true samples); samples: F1 of each row, averaged.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    r2_score,
    roc_auc_score,
    root_mean_squared_error,
)

from experiments.datasets.vqa_answers import vqa_accuracy as vqa_accuracy  # one of them, too

Metrics = Mapping[str, float]


def multilabel_metrics(labels: ArrayLike, probabilities: ArrayLike) -> Metrics:
    """Micro, macro, weighted and samples F1 of labels [N, C] in {0, 1} and probabilities [N, C]."""
    labels, probabilities = _multilabel(labels, probabilities)
    return _f1_scores(labels, probabilities > 0.5)


def per_class_f1(
    labels: ArrayLike, probabilities: ArrayLike, names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{name: {"f1", "support"}} for each of the C classes, in their order.

    Labels [N, C] in {0, 1} are multilabel (p > 0.5); labels [N] in 0 … C-1 are multiclass (argmax).
    """
    if np.ndim(labels) == 1:
        labels, probabilities = _multiclass(labels, probabilities)
        classes = np.arange(probabilities.shape[1])
        truth = labels[:, None] == classes
        predicted = probabilities.argmax(axis=1)[:, None] == classes
    else:
        truth, probabilities = _multilabel(labels, probabilities)
        predicted = probabilities > 0.5
    if len(names) != truth.shape[1]:
        raise ValueError(f"{len(names)} class names for {truth.shape[1]} classes; give one each")
    scores = [
        float(f1_score(t, p, zero_division=0)) for t, p in zip(truth.T, predicted.T, strict=True)
    ]
    support = truth.sum(axis=0)
    return {
        n: {"f1": f1, "support": int(s)} for n, f1, s in zip(names, scores, support, strict=True)
    }


def confusion_counts(labels: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
    """How often a true class (row) is predicted as which (column), [C, C].

    Labels are [N] in 0 … C-1, probabilities [N, C]; the predicted class is the argmax.
    """
    labels, probabilities = _multiclass(labels, probabilities)
    classes = range(probabilities.shape[1])
    return confusion_matrix(labels, probabilities.argmax(axis=1), labels=classes)


def most_confused(counts: np.ndarray, names: Sequence[str], most: int = 10) -> list[str]:
    """The most frequent mistakes in [C, C] counts, "cat → dog: 12 of 40", the largest first."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, wrong.shape), strict=True)
    return [
        f"{names[i]} → {names[j]}: {wrong[i, j]:,} of {counts[i].sum():,}"
        for i, j in pairs
        if wrong[i, j]
    ]


def frequent_labels_floor(train_labels: ArrayLike, test_labels: ArrayLike) -> Metrics:
    """The score of a model that looks at nothing: the frequent labels, for every test sample.

    Predicted are the classes S(t) whose share of the training samples is at least t, with the t
    that maximises micro-F1 on the training labels, 2 Σ_S n_c / (N |S| + Σ_c n_c), where n_c is the
    number of training samples of class c; the larger t in a tie. The test labels only score it.
    """
    train, test = _indicator(train_labels), _indicator(test_labels)
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"train labels {train.shape} and test labels {test.shape} differ in C")
    count = train.sum(axis=0)
    thresholds = np.unique(count[count > 0])[::-1]
    if not thresholds.size:
        raise ValueError(f"train labels {train.shape} are all 0: there is no frequent label")
    chosen = count >= thresholds[:, None]  # [thresholds, C]
    micro_f1 = 2 * (chosen @ count) / (len(train) * chosen.sum(axis=1) + count.sum())
    return _f1_scores(test, np.broadcast_to(chosen[micro_f1.argmax()], test.shape))


def binary_metrics(labels: ArrayLike, probabilities: ArrayLike) -> Metrics:
    """Accuracy, F1 of class 1 and ROC AUC of labels [N] in {0, 1} and probabilities of 1 [N].

    AUC compares a positive with a negative: it is NaN where all labels are the same.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if labels.ndim != 1 or labels.shape != probabilities.shape:
        raise ValueError(
            f"labels {labels.shape} and probabilities {probabilities.shape}: expected [N] for both,"
            " the probability of class 1 for each sample"
        )
    labels, probabilities = _multilabel(labels[:, None], probabilities[:, None])
    labels, probabilities = labels[:, 0], probabilities[:, 0]
    one_class = len(np.unique(labels)) < 2
    return {
        "accuracy": float(accuracy_score(labels, probabilities > 0.5)),
        "f1": float(f1_score(labels, probabilities > 0.5, zero_division=0)),
        "auc": float("nan") if one_class else float(roc_auc_score(labels, probabilities)),
    }


def multiclass_metrics(labels: ArrayLike, probabilities: ArrayLike) -> Metrics:
    """Accuracy, weighted and macro F1 of labels [N] in 0 … C-1 and probabilities [N, C].

    The predicted class is the argmax. The macro mean runs over the classes that occur among the
    labels or the predictions, so a class absent from a small test set does not count as a failure.
    """
    labels, probabilities = _multiclass(labels, probabilities)
    predicted = probabilities.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "weighted_f1": float(f1_score(labels, predicted, average="weighted", zero_division=0)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def accuracies(right: np.ndarray, parts: Mapping[str, np.ndarray]) -> Metrics:
    """Shares of right [N] bool in all rows, and by part {name: [N] bool}; NaN where it has none."""

    def share(of: np.ndarray) -> float:
        return float(of.mean()) if of.size else float("nan")

    return {"accuracy": share(right)} | {name: share(right[rows]) for name, rows in parts.items()}


def classification_metrics(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Accuracy, F1 and AUC for two classes; accuracy, weighted and macro F1 for more."""
    if probabilities.shape[1] == 2:
        return binary_metrics(labels, probabilities[:, 1])
    return multiclass_metrics(labels, probabilities)


def regression_metrics(labels: ArrayLike, predictions: ArrayLike) -> Metrics:
    """Mean absolute and root mean squared error, R² and Pearson correlation; both [N] floats.

    R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)². It and the correlation are NaN where they are 0 / 0.
    """
    labels, predictions = np.asarray(labels, float), np.asarray(predictions, float)
    if labels.ndim != 1 or labels.shape != predictions.shape or not labels.size:
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape}: expected [N] for both"
        )
    varied = len(labels) > 1 and np.ptp(labels) > 0
    both = varied and np.ptp(predictions) > 0
    return {
        "mae": float(mean_absolute_error(labels, predictions)),
        "rmse": float(root_mean_squared_error(labels, predictions)),
        "r2": float(r2_score(labels, predictions)) if varied else float("nan"),
        "pearson": float(np.corrcoef(labels, predictions)[0, 1]) if both else float("nan"),
    }


def sentiment_metrics(labels: ArrayLike, predictions: ArrayLike) -> Metrics:
    """The scores of CMU-MOSI, of labels [N] from -3 to 3 and predictions [N].

    acc7: y and ŷ, clipped to -3 … 3, round to the same whole number (halves to the even one).
    acc2, f1: y ≥ 0 against ŷ ≥ 0, so a label of zero counts as positive.
    acc2_nonzero, f1_nonzero: y > 0 against ŷ > 0 in the rows with y ≠ 0; NaN where there is none.
    mae, pearson: as in `regression_metrics`, of ŷ as it is.

    Both F1 are weighted: means over the two classes by their number of true samples.
    """
    errors = regression_metrics(labels, predictions)
    labels, predictions = np.asarray(labels, float), np.asarray(predictions, float)
    clear = labels != 0
    grades = [np.round(np.clip(values, -3, 3)) for values in (labels, predictions)]
    accuracy, f1 = _accuracy_f1(labels >= 0, predictions >= 0)
    accuracy_nonzero, f1_nonzero = _accuracy_f1(labels[clear] > 0, predictions[clear] > 0)
    return {
        "acc7": float(np.mean(grades[0] == grades[1])),
        "acc2": accuracy,
        "f1": f1,
        "acc2_nonzero": accuracy_nonzero,
        "f1_nonzero": f1_nonzero,
        "mae": errors["mae"],
        "pearson": errors["pearson"],
    }


def _accuracy_f1(truth: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    if not len(truth):
        return float("nan"), float("nan")
    f1 = f1_score(truth, predicted, average="weighted", zero_division=0)
    return float(accuracy_score(truth, predicted)), float(f1)


def _f1_scores(labels: np.ndarray, predicted: np.ndarray) -> Metrics:
    if labels.shape[1] < 2:
        raise ValueError(f"labels {labels.shape} have a single class; use binary_metrics")
    averages = ("micro", "macro", "weighted", "samples")
    return {
        f"{average}_f1": float(f1_score(labels, predicted, average=average, zero_division=0))
        for average in averages
    }


def _indicator(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim != 2 or not labels.size or not np.isin(labels, (0, 1)).all():
        raise ValueError(
            f"labels {labels.shape} {labels.dtype}: expected 0s and 1s of shape [N, C]"
        )
    return labels.astype(np.int64)


def _probabilities(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values).astype(np.float64)
    if not ((values >= 0) & (values <= 1)).all():  # NaN fails too
        raise ValueError(
            f"probabilities span {values.min():.3g} to {values.max():.3g}, expected 0 to 1; "
            "apply sigmoid or softmax to logits, and look for NaN in the model"
        )
    return values


def _multilabel(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(labels) != np.shape(probabilities):
        raise ValueError(
            f"labels {np.shape(labels)} and probabilities {np.shape(probabilities)}: "
            "expected the same shape [N, C] for both"
        )
    return _indicator(labels), _probabilities(probabilities)


def _multiclass(labels: ArrayLike, probabilities: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    if labels.ndim != 1 or probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(
            f"labels {labels.shape}, probabilities {probabilities.shape}: expected [N] and [N, C]"
        )
    classes = probabilities.shape[1]
    if not labels.size or not np.isin(labels, np.arange(classes)).all():
        raise ValueError(
            f"labels {labels.shape}: expected at least one, all from 0 to {classes - 1}"
        )
    return labels.astype(np.int64), _probabilities(probabilities)
