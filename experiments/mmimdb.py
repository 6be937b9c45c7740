"""MM-IMDB: the genres of a movie from its plot and its poster (paper §4, MM-IMDB).

    python -m experiments.mmimdb                         the built-in sample (synthetic), no network
    python -m experiments.mmimdb --data-dir DIR          multimodal_imdb.hdf5, or the raw mmimdb/
    python -m experiments.mmimdb --download              fetches multimodal_imdb.hdf5 first

Features go through maxout networks, raw posters and plots through a small CNN and a small text
encoder; the fusion is followed by one linear layer. Binary cross-entropy plus γ × the Jacobian
penalty; AdamW, the fusion at a tenth of the rate. On the real data the defaults are those of the
paper's code, and the result to expect is a micro-F1 around 0.6 and a macro-F1 above 0.5.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.core import FrozenDict

from experiments.common.cli import parse
from experiments.common.errors import exit_cleanly
from experiments.datasets import Dataset, mmimdb
from experiments.datasets.text import tokenised
from experiments.models.encoders import MaxoutMLP, PlotEncoder, PosterCNN
from experiments.models.tokens import fuse, takes_positions
from experiments.run import Job, execute
from experiments.training.config import PublishedConfig, build_fusion, require
from experiments.training.metrics import frequent_labels_floor, multilabel_metrics
from experiments.training.recipe import adamw
from experiments.training.results import Results
from experiments.training.schedule import Schedule
from experiments.training.task import Prediction, Task, sigmoid


@dataclass(frozen=True, kw_only=True)
class Config(PublishedConfig):
    """Genres of movies from plot and poster; without --data-dir, a built-in synthetic sample.

    The defaults are those of the paper's code; the sample has smaller ones, see `SAMPLE`.

    Attributes:
      epochs: passes over the training rows, at most.
      variant: features or raw, where data_dir has both.
      features_npz: precomputed features (BERT, ResNet, …) in place of the data's own, matched by
        "ids"; arrays "text" and/or "image" [N, d].
      hidden: width of the first maxout layer of the text and of the image encoder.
      dropout: rate in the encoders.
      batch_size: rows a step.
      learning_rate: of AdamW.
      weight_decay: of AdamW.
      patience: epochs without a better validation macro-F1 before training stops.
      vocabulary: words of the raw plots that are told apart.
      plot_length: words of a raw plot that are read.
      stream: leave the training rows on disk and read the next batches while the device works, for
        data larger than memory (features).
    """

    epochs: int = 100
    variant: Literal["features", "raw"] | None = None
    features_npz: Path | None = None
    hidden: tuple[int, int] = (512, 1024)
    dropout: float = 0.3
    batch_size: int = 256
    learning_rate: float = 1e-3
    fusion_rate: float = 0.1
    weight_decay: float = 1e-2
    patience: int = 6
    vocabulary: int = 20_000
    plot_length: int = 200
    stream: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "plot_length"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(min(self.hidden) >= 1, "hidden", self.hidden, "1 or more")
        require(self.vocabulary >= 3, "vocabulary", self.vocabulary, "3 or more")
        for name in ("warm_start", "refit"):
            alone = not (self.stream and getattr(self, name))
            require(alone, "stream", f"with --{name.replace('_', '-')}", "one of the two")


SAMPLE = Config(
    epochs=40, features=128, hidden=(128, 128), batch_size=128, fusion_rate=1.0, patience=15
)


def parse_args(args: Sequence[str]) -> Config:
    """The configuration of a command line; its defaults depend on whether it names real data."""
    program = "python -m experiments.mmimdb"
    config = parse(SAMPLE, args, program)
    real = config.data_dir is not None or config.download
    return parse(Config(), args, program) if real else config


def modalities(config: Config) -> tuple[str, ...]:
    return ("text", "image")


class MMIMDBModel(nn.Module):
    """An encoder per modality → fusion → linear: {"text", "image"} → logits [N, 23]."""

    encoders: FrozenDict[str, nn.Module]  # hashable, as a task is
    fusion: nn.Module
    classes: int = 23

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        encoded = {name: self.encoders[name](x, train) for name, x in inputs.items()}
        out = fuse(self.fusion, encoded, train=train, **start)
        return Prediction(nn.Dense(self.classes, name="head")(out.fused), out)


def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
    """Mean binary cross-entropy over rows and genres."""
    return optax.sigmoid_binary_cross_entropy(prediction.logits, labels).mean()


def read(config: Config, tokens: bool = False) -> tuple[Dataset, dict[str, nn.Module]]:
    """The data, ready for the device, and an encoder for each modality, into `tokens` if raw."""
    dataset = mmimdb.load(
        config.data_dir,
        config.cache_dir,
        config.variant,
        config.features_npz,
        download=config.download,
        stream=config.stream,
    )
    dataset, vocabulary = tokenised(dataset, config.vocabulary, config.plot_length)
    encoders: dict[str, nn.Module] = {}
    width, raw = config.features, dict[str, Any](dropout=config.dropout, tokens=tokens)
    for name, x in dataset.train.inputs.items():
        if x.dtype == np.int32:
            encoders[name] = PlotEncoder(vocabulary, width, **raw)
        elif x.ndim == 4:
            encoders[name] = PosterCNN(width, **raw)
        else:
            hidden = config.hidden[0] if name == "text" else config.hidden[1]
            encoders[name] = MaxoutMLP((hidden, width), config.dropout)
    return dataset, encoders


def job(config: Config) -> Job:
    """The data and what is to be learned from them."""
    fusion = build_fusion(config, modalities(config))
    dataset, encoders = read(config, takes_positions(fusion))
    task = Task(
        MMIMDBModel(FrozenDict(encoders), fusion, len(dataset.classes)),
        loss,
        multilabel_metrics,
        sigmoid,
        monitor="macro_f1",
        jacobian_weight=config.jacobian_weight,
        average=config.average,
        recipe=config.recipe,
    )
    labels = dataset.stream.labels() if dataset.stream else dataset.train.labels
    floor = frequent_labels_floor(labels, dataset.test.labels)
    epochs, size, patience = config.epochs, config.batch_size, config.patience
    schedule = Schedule(epochs, size, patience=patience, shallow=config.shallow)
    optimiser = adamw(config.learning_rate, config.weight_decay, config.clip)
    floors = {"always the frequent genres": floor}
    return Job("mmimdb", dataset, task, optimiser, schedule, floors=lambda _: (floors, ()))


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    return execute("mmimdb", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
