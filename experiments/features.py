"""Your own features: DEQ fusion of whatever an .npz file, or a CSV file per modality, holds.

    python -m experiments.features data.npz
    python -m experiments.features image.csv text.csv labels.csv

See `experiments.datasets.features` for what the file may hold; what is to be learned is found out
from the labels. Each modality: features standardised on the training rows → linear → ReLU → mean
over positions, where there are any → linear; then the fusion, and a linear layer on top.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.cli import parse
from experiments.config import CommonConfig, build_fusion, require
from experiments.datasets import Dataset, Split
from experiments.datasets.features import Kind, Table, missing, read
from experiments.datasets.preprocess import draw_split, standardise
from experiments.errors import InputError, exit_cleanly
from experiments.evaluate import (
    Metrics,
    Results,
    frequent_labels_floor,
    multiclass_metrics,
    multilabel_metrics,
    regression_metrics,
)
from experiments.run import Job, execute
from experiments.task import Prediction, Task, sigmoid, softmax
from experiments.train import Schedule


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Fusion of your own features.

    Attributes:
      data: an .npz file with a key per modality and "labels", or .csv files called after them.
      hidden: width of the encoders' hidden layer.
      batch_size: rows a step.
    """

    POSITIONAL: ClassVar = ("data",)

    data: tyro.conf.Positional[tuple[Path, ...]] = ()
    features: int = 64
    hidden: int = 128
    batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.features")
    if not config.data:
        raise InputError("nothing to read; give an .npz file, or a .csv file per modality")
    return config


def modalities(config: Config) -> tuple[str, ...]:
    return tuple(read(config.data).modalities)


class Encoder(nn.Module):
    """linear → ReLU → dropout → mean over positions → linear: [N, …, d] → [N, features]."""

    features: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        h = nn.relu(nn.Dense(self.hidden)(x))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        return nn.Dense(self.features)(jnp.mean(h, axis=range(1, h.ndim - 1)))


class FeaturesModel(nn.Module):
    """An encoder per modality → fusion → linear: {name: [N, …]} → [N, outputs].

    A modality that is NaN all over a row is missing there.
    """

    fusion: nn.Module
    outputs: int
    features: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        encoded, mask = {}, {}
        for name, x in inputs.items():
            mask[name] = ~jnp.all(jnp.isnan(x), axis=range(1, x.ndim))
            known = jnp.where(jnp.isnan(x), 0, x)
            encoder = Encoder(self.features, self.hidden, self.dropout, name=f"encode_{name}")
            encoded[name] = encoder(known, train)
        out = self.fusion(encoded, mask, train=train, **start)
        return Prediction(nn.Dense(self.outputs, name="head")(out.fused), out)


# --- what the kind of the labels decides -------------------------------------------------------


class Target(NamedTuple):
    """How labels of a kind are learned.

    Attributes:
      outputs: of the model.
      loss, metrics, probabilities, monitor: as in `Task`.
      floor: name and test scores of a prediction that looks at nothing.
    """

    outputs: int
    loss: Callable[[Prediction, jax.Array], jax.Array]
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
    probabilities: Callable[[np.ndarray], np.ndarray]
    monitor: str
    floor: tuple[str, Metrics]


def multiclass(dataset: Dataset) -> Target:
    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(prediction.logits, labels).mean()

    share = np.bincount(dataset.train.labels, minlength=len(dataset.classes))
    always = np.tile(share / share.sum(), (len(dataset.test.labels), 1))
    floor = "the most frequent class", multiclass_metrics(dataset.test.labels, always)
    outputs = len(dataset.classes)
    return Target(outputs, loss, multiclass_metrics, softmax, "macro_f1", floor)


def multilabel(dataset: Dataset) -> Target:
    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(prediction.logits, labels).mean()

    scores = frequent_labels_floor(dataset.train.labels, dataset.test.labels)
    floor = "frequent classes only", scores
    outputs = len(dataset.classes)
    return Target(outputs, loss, multilabel_metrics, sigmoid, "macro_f1", floor)


def regression(dataset: Dataset) -> Target:
    """Learned in units of the training labels' deviation from their mean."""
    mean, deviation = dataset.train.labels.mean(), dataset.train.labels.std() or 1

    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        return 0.5 * jnp.mean((prediction.logits[:, 0] - (labels - mean) / deviation) ** 2)

    def values(logits: np.ndarray) -> np.ndarray:
        return logits[:, 0] * deviation + mean

    scores = regression_metrics(dataset.test.labels, np.full_like(dataset.test.labels, mean))
    return Target(1, loss, regression_metrics, values, "r2", ("the mean", scores))


TARGETS: dict[Kind, Callable[[Dataset], Target]] = {
    "multiclass": multiclass,
    "multilabel": multilabel,
    "regression": regression,
}


# --- the job -----------------------------------------------------------------------------------


def prepare(table: Table, seed: int) -> Dataset:
    """Train, validation and test as the file splits them, or drawn; standardised."""
    split = table.split
    if split is None:
        split = draw_split(table.labels, table.kind == "multiclass", seed)

    def part(number: int) -> Split:
        rows = np.flatnonzero(split == number)
        return Split({name: x[rows] for name, x in table.modalities.items()}, table.labels[rows])

    train, validation, test = standardise(part(0), part(1), part(2))
    return Dataset(table.name, "real", table.classes, train, validation, test)


def say_what_was_found(table: Table) -> None:
    rows = len(table.labels)
    kind = f"{table.kind}, {len(table.classes)} classes" if table.classes else table.kind
    print(f"{table.name}: {rows} rows, {kind}")
    for name, x in table.modalities.items():
        absent = missing(x).sum()
        note = f", missing in {absent} rows" if absent else ""
        print(f"  {name} {list(x.shape[1:])}{note}")


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    table = read(config.data)
    say_what_was_found(table)
    dataset = prepare(table, config.seed)
    target = TARGETS[table.kind](dataset)
    fusion = build_fusion(config, tuple(dataset.train.inputs))
    task = Task(
        FeaturesModel(fusion, target.outputs, config.features, config.hidden, config.dropout),
        target.loss,
        target.metrics,
        target.probabilities,
        monitor=target.monitor,
        jacobian_weight=config.jacobian_weight,
    )
    optimiser = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    schedule = Schedule(config.epochs, config.batch_size, patience=config.patience)
    name, scores = target.floor
    return execute(Job("features", dataset, task, optimiser, schedule, {name: scores}), config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
