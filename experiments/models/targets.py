"""What the kind of the labels decides: outputs, loss, metrics, and what a fusion has to beat."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.errors import InputError
from experiments.common.text import note
from experiments.datasets import Dataset, Split
from experiments.datasets.features import Kind
from experiments.datasets.preprocess import join
from experiments.models import linear
from experiments.training.devices import log
from experiments.training.metrics import (
    Metrics,
    frequent_labels_floor,
    multiclass_metrics,
    multilabel_metrics,
    regression_metrics,
)
from experiments.training.task import Prediction, cross_entropy, sigmoid, softmax


class Target(NamedTuple):
    """How labels of a kind are learned.

    Attributes:
      outputs: of the model.
      loss, metrics, probabilities, monitor: as in `Task`.
      floor: name and test scores of a prediction that looks at nothing.
      linear: name of a linear model, and its fit: (training rows, test rows, seconds at most).
    """

    outputs: int
    loss: Callable[[Prediction, jax.Array], jax.Array]
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
    probabilities: Callable[[jax.Array], jax.Array]
    monitor: str
    floor: tuple[str, Metrics]
    linear: tuple[str, Callable[[Split, Split, float], linear.Fit]]


def multiclass(dataset: Dataset) -> Target:
    def logistic_regression(train: Split, test: Split, seconds: float) -> linear.Fit:
        return linear.logistic_regression(train, test, len(dataset.classes), seconds)

    share = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if np.count_nonzero(share) < 2:
        raise InputError(f"all training rows are of {dataset.classes[share.argmax()]!r}; resplit")
    always = np.tile(share / share.sum(), (len(dataset.test.labels), 1))
    return Target(
        len(dataset.classes),
        cross_entropy,
        multiclass_metrics,
        softmax,
        "macro_f1",
        ("the most frequent class", multiclass_metrics(dataset.test.labels, always)),
        ("logistic regression", logistic_regression),
    )


def multilabel(dataset: Dataset) -> Target:
    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(prediction.logits, labels).mean()

    if not dataset.train.labels.any():
        raise InputError("no training row has a class; resplit")
    scores = frequent_labels_floor(dataset.train.labels, dataset.test.labels)
    return Target(
        len(dataset.classes),
        loss,
        multilabel_metrics,
        sigmoid,
        "macro_f1",
        ("always the frequent classes", scores),
        ("logistic regression", linear.one_vs_rest),
    )


def regression(dataset: Dataset) -> Target:
    """Learned in units of the training labels' deviation from their mean."""
    for name, part in (("training", dataset.train), ("validation", dataset.validation)):
        if part is not None and np.ptp(part.labels) == 0:  # R² selects the epoch
            raise InputError(f"the {name} rows all have the label {part.labels[0]:g}; resplit")
    mean, deviation = dataset.train.labels.mean(), dataset.train.labels.std()

    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean((prediction.logits[:, 0] - (labels - mean) / deviation) ** 2)

    def values(logits: jax.Array) -> jax.Array:
        return logits[:, 0] * deviation + mean

    scores = regression_metrics(dataset.test.labels, np.full_like(dataset.test.labels, mean))
    return Target(
        1,
        loss,
        regression_metrics,
        values,
        "r2",
        ("the mean", scores),
        ("ridge regression", linear.ridge),
    )


TARGETS: dict[Kind, Callable[[Dataset], Target]] = {
    "multiclass": multiclass,
    "multilabel": multilabel,
    "regression": regression,
}


def floors(
    dataset: Dataset, target: Target, seconds: float
) -> tuple[dict[str, Metrics], list[str]]:
    """Test scores of what a fusion has to beat, and notes on what is not among them.

    The linear model learns from the training and validation rows, for at most so many `seconds`.
    """
    (blind, scores), (name, fit) = target.floor, target.linear
    found, notes = {blind: scores}, []
    train = dataset.train if dataset.validation is None else join(dataset.train, dataset.validation)
    log(f"Fitting {name} beside it, for at most {seconds:.0f} s …")
    try:
        predictions, done = fit(train, dataset.test, seconds)
        found[name] = target.metrics(dataset.test.labels, predictions)
        if not done:
            notes.append(note(f"{name} was not done in {seconds:.0f} s; its scores are of then"))
    except InputError as why:
        notes.append(note(f"no {name} beside the result: {why}"))
    return found, notes
