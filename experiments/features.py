"""Your own features: DEQ fusion of whatever an .npz file, or a CSV file per modality, holds.

    python -m experiments.features data.npz
    python -m experiments.features image.csv text.csv labels.csv
    python -m experiments.features rna.h5ad protein.h5ad --labels diagnosis

See `experiments.datasets.features` for what the file may hold; what is to be learned is found out
from the labels, and how long to train from the number of rows (`experiments.training.settings`).
Each modality: features standardised on the training rows → an encoder (`FeatureEncoder`), which
sees the order of positions → the fusion, and a linear layer on top. Beside the result stand a
prediction that looks at nothing and a linear model of the same rows.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
import tyro

from deq_fusion_jax.baselines import FUSIONS
from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.text import note
from experiments.datasets import Dataset, Split
from experiments.datasets.features import Recipe, Table, read, sha256, strata
from experiments.datasets.found import missing_elsewhere, what_was_found
from experiments.datasets.labels import Wanted
from experiments.datasets.preprocess import draw_split, folds, moments, scaled
from experiments.models.encoders import FeatureEncoder, Positions, mix_rows
from experiments.models.missing import ModalityDropout, presence
from experiments.models.targets import TARGETS, floors
from experiments.models.tokens import fuse, takes_positions
from experiments.run import Job, execute
from experiments.training.config import (
    CommonConfig,
    FusionChange,
    build_fusion,
    require,
    unchanged,
)
from experiments.training.devices import log
from experiments.training.folds import Folds
from experiments.training.recipe import adamw
from experiments.training.results import Results
from experiments.training.settings import Settings, regularisation_for, settings_for
from experiments.training.task import Prediction, Task

ABSENT = 0.3  # modality dropout where rows miss what others have


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Fusion of your own features.

    Attributes:
      data: an .npz file with a key per modality and "labels", or files called after them.
      labels: the column of the labels, where a file has several.
      task: what to learn; auto: found out from the labels.
      hidden: width of the encoders' hidden layer.
      positions: ordered, where the order of the positions of sequences and images tells something,
        or their mean.
      epochs, batch_size, patience: None: by the number of rows.
      mixing: how much of another row is mixed into each modality in training, on average; see
        `mix_rows`. None, here and in the next three: by the number of rows and features.
      dropout: rate in the encoders, in front of the fusion.
      head_dropout: rate behind the fusion.
      average: decay of the running mean of the weights that is evaluated; 0: the weights are.
      modality_dropout: rate at which a modality of a row is hidden in training; None: 0.3 where
        rows of one part lack a modality that those of another have, else 0.
      data_sha256: of the files; not an option. A run on other data is not resumed.
    """

    UNSAID: ClassVar = (*CommonConfig.UNSAID, "data_sha256")
    POSITIONAL: ClassVar = ("data",)

    data: tyro.conf.Positional[tuple[Path, ...]] = ()
    labels: str | None = None
    task: Wanted = "auto"
    features: int = 64
    hidden: int = 128
    positions: Positions = "ordered"
    epochs: int | None = None  # type: ignore[assignment]
    batch_size: int | None = None
    patience: int | None = None  # type: ignore[assignment]
    mixing: float | None = None
    dropout: float | None = None  # type: ignore[assignment]
    head_dropout: float | None = None
    clip: float = 1.0
    average: float | None = None  # type: ignore[assignment]
    modality_dropout: float | None = None
    data_sha256: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.hidden >= 1, "hidden", self.hidden, "1 or more")
        size, rate = self.batch_size, self.modality_dropout
        require(size is None or size >= 1, "batch_size", size, "1 or more")
        mixing, behind = self.mixing or 0, self.head_dropout or 0
        require(0 <= mixing <= 1, "mixing", mixing, "a share from 0 to 1")
        require(0 <= behind < 1, "head_dropout", behind, "0 or more and less than 1")
        usable = rate is None or 0 <= rate < 1
        require(usable, "modality_dropout", rate, "0 or more and less than 1")


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.features")
    if not config.data:
        raise InputError("nothing to read; give an .npz file, or a file per modality")
    return replace(config, data_sha256=sha256(config.data))


def modalities(config: Config) -> tuple[str, ...]:
    return tuple(read_table(config).modalities)


class FeaturesModel(nn.Module):
    """An encoder per modality → fusion → linear: {name: [N, …]} → [N, outputs].

    A modality that is NaN all over a row is missing there. The other fields are options of
    `Config`.
    """

    fusion: nn.Module
    outputs: int
    features: int
    hidden: int
    mixing: float
    dropout: float
    head_dropout: float
    modality_dropout: float
    positions: Positions

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        present = ModalityDropout(self.modality_dropout)(presence(inputs), train)
        encoded, tokens = {}, takes_positions(self.fusion)
        options = self.features, self.hidden, self.dropout, self.positions, tokens
        for name, x in inputs.items():
            if train and self.mixing:
                x = mix_rows(self.make_rng("dropout"), x, x, self.mixing)
            encoded[name] = FeatureEncoder(*options, name=f"encode_{name}")(x, train)
        out = fuse(self.fusion, encoded, present, train=train, **start)
        fused = nn.Dropout(self.head_dropout, deterministic=not train)(out.fused)
        return Prediction(nn.Dense(self.outputs, name="head")(fused), out)


# --- the data ----------------------------------------------------------------------------------


def validation_is_given(table: Table) -> bool:
    return table.split is not None and bool((table.split == 1).any())


def split_of(table: Table, seed: int) -> np.ndarray:
    """[N] 0, 1 or 2, as the file has it; what it does not say is drawn."""
    if table.split is not None and validation_is_given(table):
        return table.split
    return draw_split(strata(table), seed, table.groups, table.split)


def prepare(table: Table, split: np.ndarray) -> tuple[Dataset, Recipe]:
    """Train, validation and test rows, standardised, and by what."""

    def part(number: int) -> Split:
        rows = np.flatnonzero(split == number)
        return Split({name: x[rows] for name, x in table.modalities.items()}, table.labels[rows])

    parts = part(0), part(1), part(2)
    found = moments(parts[0])
    train, validation, test = (p._replace(inputs=scaled(p.inputs, found)) for p in parts)
    dataset = Dataset(table.name, "real", table.classes, train, validation, test)
    return dataset, Recipe(found, table.known)


def drawn_folds(table: Table, split: np.ndarray, settings: Settings, seed: int) -> Folds:
    """Folds of the training and validation rows together, in this order; none of many rows."""
    if not settings.folds:
        return ()
    rows = np.concatenate([np.flatnonzero(split == part) for part in (0, 1)])
    groups = None if table.groups is None else table.groups[rows]
    return folds(strata(table)[rows], groups, settings.folds, settings.repeats, seed)


# --- the job -----------------------------------------------------------------------------------


def read_table(config: Config) -> Table:
    """What the files hold, as the options have it read."""
    return read(config.data, config.labels or "", config.task)


def load(config: Config) -> Table:
    """What the files hold, with modalities and a fusion that can be."""
    table = read_table(config)
    if taken := [name for name in table.modalities if name in FUSIONS]:
        raise InputError(f"a modality is called {taken[0]}, as a fusion is; rename it")
    build_fusion(config, tuple(table.modalities))  # refused before anything is said of the data
    return table


def modality_dropout(config: Config, dataset: Dataset) -> float:
    """As given; else ABSENT where rows of some part lack a modality that those of another have."""
    if config.modality_dropout is not None:
        return config.modality_dropout
    return ABSENT if list(missing_elsewhere(dataset)) else 0.0


def job(config: Config, change: FusionChange = unchanged) -> Job:
    """The data and what is to be learned from them, with a changed fusion."""
    table = load(config)
    split = split_of(table, config.seed)
    dataset, recipe = prepare(table, split)
    for line in what_was_found(table, dataset):
        log(line)
    rows = int(np.sum(split < 2))
    given = validation_is_given(table), config.epochs, config.batch_size, config.patience
    settings = settings_for(rows, *given)
    regularised = regularisation_for(rows, table.columns, config)
    rate = modality_dropout(config, dataset)
    target = TARGETS[table.kind](dataset)
    task = Task(
        FeaturesModel(
            change(build_fusion(config, tuple(table.modalities))),
            target.outputs,
            config.features,
            config.hidden,
            *regularised[:3],
            rate,
            config.positions,
        ),
        target.loss,
        target.metrics,
        target.probabilities,
        monitor=target.monitor,
        jacobian_weight=config.jacobian_weight,
        average=regularised.average,
        recipe=config.recipe,
    )
    return Job(
        "features",
        dataset,
        task,
        adamw(config.learning_rate, config.weight_decay, config.clip),
        settings.schedule._replace(shallow=config.shallow),
        drawn_folds(table, split, settings, config.seed),
        partial(floors, dataset, target),
        [
            note(f"{settings}; {regularised}"),
            *([note(f"modality dropout is {rate:g}")] if rate else []),
        ],
        recipe,
    )


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    return execute("features", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
