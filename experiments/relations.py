"""Questions about chains of relations, synthetic: does iteration pay where answers take steps?

    python -m experiments.relations                                   the equilibrium over positions
    python -m experiments.relations --fusion tokens_unrolled --unroll-steps 10
    python -m experiments.relations --fusion cross_attention
    python -m experiments.relations --start RUN_DIR                   go on from other weights

See `experiments.datasets.relations`. Training and validation rows ask for one to three steps, test
rows for up to six: half of them for more than was ever seen. Every position goes through a small
network of its own (`FeatureEncoder`), and to the fusion as it is, or, where that takes none, in the
mean over positions. Scores are accuracies, of all rows and by depth; beside them stands what can be
known with less than everything, exactly.

One application of the map finds the pair of a relation, one more hands its name on to the next
relation: k steps take 2 k - 1 applications, or fewer where the scene has put pairs together before.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.datasets import relations as data
from experiments.models.encoders import FeatureEncoder
from experiments.models.tokens import fuse, takes_positions
from experiments.run import Job, execute
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import CommonConfig, build_fusion, require
from experiments.training.metrics import Metrics, accuracies
from experiments.training.recipe import adamw
from experiments.training.results import Results
from experiments.training.run_directory import options_of, saved_config
from experiments.training.schedule import Schedule
from experiments.training.task import Prediction, Task, Variables, cross_entropy, softmax
from experiments.training.train import selected


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Chains of relations between objects.

    Attributes:
      objects: n, on a board of n × n.
      train, validation, test: rows.
      deepest: steps that training and validation rows ask for, at most.
      data_seed: of the rows.
      start: directory of another run of this experiment, whose selected weights are begun with. It
        may have seen shorter chains, or another fusion with the same cell, tokens or
        tokens_unrolled.
      hidden: width of the encoders' hidden layer.
      batch_size: rows a step.
    """

    fusion: str = "tokens"
    objects: int = 8
    train: int = 20_000
    validation: int = 2_000
    test: int = 6_000
    deepest: int = 3
    data_seed: int = 0
    start: Path | None = None
    epochs: int = 20
    features: int = 32
    hidden: int = 64
    dropout: float = 0.0
    learning_rate: float = 3e-3
    clip: float = 1.0
    batch_size: int = 64
    jacobian_weight: float = 1.0
    max_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = data.FEWEST
        require(self.objects >= fewest, "objects", self.objects, f"{fewest} or more")
        usable = 1 <= self.deepest <= data.DEEPEST
        require(usable, "deepest", self.deepest, f"1 to {data.DEEPEST}")
        for name in ("train", "validation", "test", "hidden", "batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(self.data_seed >= 0, "data_seed", self.data_seed, "0 or more")


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.relations")


def modalities(config: Config) -> tuple[str, ...]:
    return ("scene", "question")


class RelationsModel(nn.Module):
    """An encoder per modality → fusion → linear: {"scene", "question"} → logits [N, objects]."""

    fusion: nn.Module
    objects: int
    features: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        sizes, tokens = (self.features, self.hidden, self.dropout), takes_positions(self.fusion)
        encoded = {
            name: FeatureEncoder(*sizes, "mean", tokens, name=f"encode_{name}")(x, train)
            for name, x in inputs.items()
        }
        out = fuse(self.fusion, encoded, train=train, **start)
        return Prediction(nn.Dense(self.objects, name="head")(out.fused), out)


def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy of the answers."""
    return cross_entropy(prediction, labels[:, 0])


def by_depth(labels: np.ndarray) -> dict[str, np.ndarray]:
    """{"depth 1": [N] bool, …}, which rows of labels [N, 2] ask for so many steps."""
    depths = labels[:, 1]
    return {f"depth {depth}": depths == depth for depth in np.unique(depths)}


def scores(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Shares of right answers, of all rows and by depth."""
    return accuracies(labels[:, 0] == np.argmax(probabilities, axis=1), by_depth(labels))


def weights_of(run_dir: Path, task: Task) -> Variables:
    """The weights that another run has selected.

    Raises:
      InputError: it is none of this experiment, has saved none, or they do not fit the task.
    """
    saved = saved_config(run_dir)
    if saved is None or saved.get("experiment") != "relations":
        raise InputError(f"--start {run_dir}: expected the directory of a run of this experiment")
    config = parse_args(options_of(saved))
    other, folder = job(config), Checkpoints(run_dir / "checkpoints")
    inputs = other.dataset.train.inputs
    kept = replace(other.task, warm_start=config.warm_start)
    weights = selected(kept, other.optimiser, inputs, config.seed, folder)
    if weights is None:
        raise InputError(f"--start {run_dir}: expected a run that has saved a checkpoint")
    row = {name: x[:1] for name, x in inputs.items()}
    expected = jax.eval_shape(task.model.init, jax.random.key(0), row)["params"]
    if jax.tree.map(jnp.shape, weights.params) != jax.tree.map(jnp.shape, expected):
        raise InputError(
            f"--start {run_dir}: its weights, of --fusion {config.fusion} --features "
            f"{config.features} --hidden {config.hidden} --objects {config.objects}, do not fit; "
            "expected the same sizes and a fusion with the same cell"
        )
    return weights


def job(config: Config) -> Job:
    """The data and what is to be learned from them."""
    fusion = build_fusion(config, modalities(config))
    streams = np.random.default_rng(config.data_seed).spawn(3)
    sizes = (
        (config.train, config.deepest),
        (config.validation, config.deepest),
        (config.test, data.DEEPEST),
    )
    train, validation, test = (
        data.draw(rng, *size, config.objects) for rng, size in zip(streams, sizes, strict=True)
    )
    dataset = data.dataset(train, validation, test)
    task = Task(
        RelationsModel(fusion, config.objects, config.features, config.hidden, config.dropout),
        loss,
        scores,
        softmax,
        monitor="accuracy",
        jacobian_weight=config.jacobian_weight,
        average=config.average,
        recipe=config.recipe,
        parts=by_depth,
    )
    floors: Mapping[str, Metrics] = {
        name: scores(dataset.test.labels, guess) for name, guess in data.bayes(test).items()
    }
    optimiser = adamw(config.learning_rate, config.weight_decay, config.clip)
    epochs, size, patience = config.epochs, config.batch_size, config.patience
    schedule = Schedule(epochs, size, patience=patience, shallow=config.shallow)
    return Job(
        "relations",
        dataset,
        task,
        optimiser,
        schedule,
        floors=lambda _: (floors, ()),
        start=partial(weights_of, config.start, task) if config.start else None,
    )


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    return execute("relations", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
