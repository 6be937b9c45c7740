"""Your own features: DEQ fusion of whatever an .npz file, or a CSV file per modality, holds.

    python -m experiments.features data.npz
    python -m experiments.features image.csv text.csv labels.csv
    python -m experiments.features rna.h5ad protein.h5ad --labels diagnosis

See `experiments.datasets.features` for what the file may hold; what is to be learned is found out
from the labels. Each modality: features standardised on the training rows → linear → ReLU → mean
over positions, where there are any → linear; then the fusion, and a linear layer on top. Beside the
result stand a prediction that looks at nothing and a linear model of the same training rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from deq_fusion_jax.baselines import FUSIONS
from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.datasets import Dataset, Split
from experiments.datasets.features import Recipe, Table, read, sha256, strata
from experiments.datasets.found import what_was_found
from experiments.datasets.labels import Kind, Wanted
from experiments.datasets.preprocess import draw_split, moments, scaled
from experiments.models.missing import ModalityDropout, presence
from experiments.models.targets import TARGETS, floors
from experiments.run import Job, execute
from experiments.training.config import CommonConfig, FusionChange, build_fusion, require, unchanged
from experiments.training.metrics import Results
from experiments.training.schedule import Schedule
from experiments.training.task import Prediction, Task


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Fusion of your own features.

    Attributes:
      data: an .npz file with a key per modality and "labels", or files called after them.
      labels: the column of the labels, where a file has several.
      task: what to learn; auto: found out from the labels.
      hidden: width of the encoders' hidden layer.
      batch_size: rows a step.
      modality_dropout: rate at which a modality of a row is hidden in training.
      data_sha256: of the files; not an option. A run on other data is not resumed.
    """

    UNSAID: ClassVar = (*CommonConfig.UNSAID, "data_sha256")
    POSITIONAL: ClassVar = ("data",)

    data: tyro.conf.Positional[tuple[Path, ...]] = ()
    labels: str | None = None
    task: Wanted = "auto"
    features: int = 64
    hidden: int = 128
    batch_size: int = 64
    modality_dropout: float = 0.0
    data_sha256: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        rate = self.modality_dropout
        require(0 <= rate < 1, "modality_dropout", rate, "0 or more and less than 1")


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.features")
    if not config.data:
        raise InputError("nothing to read; give an .npz file, or a file per modality")
    return replace(config, data_sha256=sha256(config.data))


def modalities(config: Config) -> tuple[str, ...]:
    return tuple(read(config.data).modalities)


class Encoder(nn.Module):
    """linear → ReLU → dropout → mean over positions → linear: [N, …, d] → [N, features].

    A position that is all NaN is left out of the mean.
    """

    features: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        unknown, positions = jnp.isnan(x), range(1, x.ndim - 1)
        there = ~jnp.all(unknown, axis=-1, keepdims=True)
        h = nn.relu(nn.Dense(self.hidden)(jnp.where(unknown, 0, x)))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        count = jnp.maximum(jnp.sum(there, axis=positions), 1)
        return nn.Dense(self.features)(jnp.sum(h * there, axis=positions) / count)


class FeaturesModel(nn.Module):
    """An encoder per modality → fusion → linear: {name: [N, …]} → [N, outputs].

    A modality that is NaN all over a row is missing there.
    """

    fusion: nn.Module
    outputs: int
    features: int
    hidden: int
    dropout: float
    modality_dropout: float = 0.0

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        present = ModalityDropout(self.modality_dropout)(presence(inputs), train)
        encoded = {}
        for name, x in inputs.items():
            encoder = Encoder(self.features, self.hidden, self.dropout, name=f"encode_{name}")
            encoded[name] = encoder(x, train)
        out = self.fusion(encoded, present, train=train, **start)
        return Prediction(nn.Dense(self.outputs, name="head")(out.fused), out)


# --- the data ----------------------------------------------------------------------------------


def prepare(table: Table, seed: int) -> tuple[Dataset, Recipe]:
    """Train, validation and test as the file splits them, or drawn; standardised, and by what."""
    split = table.split
    if split is None:
        split = draw_split(strata(table), seed, table.groups)

    def part(number: int) -> Split:
        rows = np.flatnonzero(split == number)
        return Split({name: x[rows] for name, x in table.modalities.items()}, table.labels[rows])

    parts = part(0), part(1), part(2)
    found = moments(parts[0])
    train, validation, test = (p._replace(inputs=scaled(p.inputs, found)) for p in parts)
    dataset = Dataset(table.name, "real", table.classes, train, validation, test)
    return dataset, Recipe(found, table.known)


def load(config: Config) -> tuple[Kind, Dataset, Recipe]:
    """What kind of labels the files hold, the data, how they were made; says what was found."""
    table = read(config.data, config.labels or "", config.task)
    if taken := [name for name in table.modalities if name in FUSIONS]:
        raise InputError(f"a modality is called {taken[0]}, as a fusion is; rename it")
    dataset, recipe = prepare(table, config.seed)
    for line in what_was_found(table, dataset):
        print(line)
    return table.kind, dataset, recipe


# --- the job -----------------------------------------------------------------------------------


def job(config: Config, change: FusionChange = unchanged) -> Job:
    """The data and what is to be learned from them, with a changed fusion."""
    kind, dataset, recipe = load(config)
    fusion = change(build_fusion(config, tuple(dataset.train.inputs)))
    target = TARGETS[kind](dataset)
    task = Task(
        FeaturesModel(
            fusion,
            target.outputs,
            config.features,
            config.hidden,
            config.dropout,
            config.modality_dropout,
        ),
        target.loss,
        target.metrics,
        target.probabilities,
        monitor=target.monitor,
        jacobian_weight=config.jacobian_weight,
        average=config.average,
    )
    optimiser = optax.adamw(config.learning_rate, weight_decay=config.weight_decay)
    schedule = Schedule(config.epochs, config.batch_size, patience=config.patience)
    beside = floors(dataset, target)
    return Job("features", dataset, task, optimiser, schedule, *beside, recipe)


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    return execute(job(config), config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
