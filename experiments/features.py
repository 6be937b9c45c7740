"""Your own features: DEQ fusion of whatever an .npz file, or a CSV file per modality, holds.

    python -m experiments.features data.npz
    python -m experiments.features image.csv text.csv labels.csv

See `experiments.datasets.features` for what the file may hold; what is to be learned is found out
from the labels, and how long to train from the number of rows (`experiments.training.settings`).
Each modality: features standardised on the training rows → an encoder (`FeatureEncoder`), which
sees the order of positions → the fusion, and a linear layer on top. Beside the result stand a
prediction that looks at nothing and a linear model of the same rows.
"""

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from experiments.datasets.features import RARE, Kind, Table, read, rows_by_class, sha256, strata
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
      data: an .npz file with a key per modality and "labels", or .csv files called after them.
      hidden: width of the encoders' hidden layer.
      positions: ordered, where the order of the positions of sequences and images tells something,
        or their mean.
      epochs, batch_size, patience: None: by the number of rows.
      modality_dropout: rate at which a modality of a row is hidden in training; None: 0.3 where
        validation or test rows lack what the training rows have, else 0.
      data_sha256: of the files; not an option. A run on other data is not resumed.
    """

    UNSAID: ClassVar = (*CommonConfig.UNSAID, "data_sha256")
    POSITIONAL: ClassVar = ("data",)

    data: tyro.conf.Positional[tuple[Path, ...]] = ()
    features: int = 64
    hidden: int = 128
    positions: Positions = "ordered"
    epochs: int | None = None  # type: ignore[assignment]
    batch_size: int | None = None
    patience: int | None = None  # type: ignore[assignment]
    modality_dropout: float | None = None
    data_sha256: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden >= 1, "hidden", self.hidden, "1 or more")
        size, rate = self.batch_size, self.modality_dropout
        require(size is None or size >= 1, "batch_size", size, "1 or more")
        usable = rate is None or 0 <= rate < 1
        require(usable, "modality_dropout", rate, "0 or more and less than 1")


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.features")
    if not config.data:
        raise InputError("nothing to read; give an .npz file, or a .csv file per modality")
    return replace(config, data_sha256=sha256(config.data))


def modalities(config: Config) -> tuple[str, ...]:
    return tuple(read(config.data).modalities)


class FeaturesModel(nn.Module):
    """An encoder per modality → fusion → linear: {name: [N, …]} → [N, outputs].

    A modality that is NaN all over a row is missing there.
    """

    fusion: nn.Module
    outputs: int
    features: int
    hidden: int
    dropout: float
    modality_dropout: float
    positions: Positions

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        present = ModalityDropout(self.modality_dropout)(presence(inputs), train)
        encoded = {}
        for name, x in inputs.items():
            options = self.features, self.hidden, self.dropout, self.positions
            encoded[name] = FeatureEncoder(*options, name=f"encode_{name}")(x, train)
        out = self.fusion(encoded, present, train=train, **start)
        return Prediction(nn.Dense(self.outputs, name="head")(out.fused), out)


# --- the data ----------------------------------------------------------------------------------


def prepare(table: Table, seed: int) -> tuple[Dataset, Callable[[dict], dict]]:
    """Train, validation and test as the file splits them, or drawn; standardised, and how."""
    split = draw_split(strata(table), seed) if table.split is None else table.split

    def part(number: int) -> Split:
        rows = np.flatnonzero(split == number)
        return Split({name: x[rows] for name, x in table.modalities.items()}, table.labels[rows])

    parts = part(0), part(1), part(2)
    found = moments(parts[0])
    train, validation, test = (p._replace(inputs=scaled(p.inputs, found)) for p in parts)
    dataset = Dataset(table.name, "real", table.classes, train, validation, test)
    return dataset, partial(scaled, found=found, xp=jnp)


def what_was_found(table: Table, dataset: Dataset) -> Iterator[str]:
    """Lines that tell what was read, and what may be wrong with it."""
    kind = f"{table.kind}, {len(table.classes)} classes" if table.classes else table.kind
    yield f"{table.name}: {len(table.labels)} rows, {kind}"
    for name, x in table.modalities.items():
        yield f"  {name} {list(x.shape[1:])}{_unknown(x)}"
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    drawn = "drawn with equal shares of the labels" if table.split is None else "as given"
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in parts.items() if part)
    yield f"  {sizes} rows, {drawn}"
    yield from _labels_found(table, dataset)
    columns = sum(x[0].size for x in table.modalities.values())
    if columns > 10 * len(dataset.train.labels):
        yield (
            f"Note: {columns:,} features of {len(dataset.train.labels):,} training rows are easily "
            "learned by heart;\n      fewer features, or a larger --dropout, may help."
        )


def _unknown(x: np.ndarray) -> str:
    """How much of a modality is NaN: rows, positions, and single values."""
    nan = np.isnan(x)
    rows, positions = nan.all(axis=tuple(range(1, x.ndim))).sum(), nan.all(axis=-1).sum()
    padding = positions - rows * x[0, ..., 0].size
    single = nan.sum() - positions * x.shape[-1]
    counts = [
        (rows, "missing in {:,} rows"),
        (padding, "padded at {:,} positions"),
        (single, "{:,} unknown values take the mean"),
    ]
    return "".join(", " + text.format(count) for count, text in counts if count)


def _labels_found(table: Table, dataset: Dataset) -> Iterator[str]:
    """Rows by class, or where the numbers lie."""
    labels = table.labels
    if table.kind == "regression":
        yield f"  labels {labels.min():.4g} to {labels.max():.4g}, mean {labels.mean():.4g}"
        if len(np.unique(labels)) <= 20 and (labels == labels.round()).all():
            yield "Note: whole numbers saved as floats are a regression; for classes save integers."
        return
    count, learned = (rows_by_class(x, len(table.classes)) for x in (labels, dataset.train.labels))
    most = np.argsort(-count, kind="stable")
    by_class = ", ".join(f"{table.classes[i]}: {count[i]}" for i in most)
    yield "  " + textwrap.shorten(by_class, 78, placeholder=" …")
    if table.split is None and (rare := (count < RARE).sum()):
        yield f"Note: rows of classes with fewer than {RARE} ({rare} classes) stay in train."
    if idle := [table.classes[i] for i in np.flatnonzero(learned == 0)]:
        yield textwrap.shorten(f"Note: no training row is of {', '.join(idle)}.", 80)


def load(config: Config) -> tuple[Kind, Dataset, Callable[[dict], dict]]:
    """What kind of labels the files hold, the data, how they were made; says what was found."""
    table = read(config.data)
    if taken := [name for name in table.modalities if name in FUSIONS]:
        raise InputError(f"a modality is called {taken[0]}, as a fusion is; rename it")
    build_fusion(config, tuple(table.modalities))  # refused before anything is said of the data
    dataset, standardised = prepare(table, config.seed)
    for line in what_was_found(table, dataset):
        print(line)
    return table.kind, dataset, standardised


# --- the job -----------------------------------------------------------------------------------


def job(config: Config, change: FusionChange = unchanged) -> Job:
    """The data and what is to be learned from them, with a changed fusion."""
    kind, dataset, standardised = load(config)
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
    return Job("features", dataset, task, optimiser, schedule, *beside, standardised)


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    return execute("features", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
