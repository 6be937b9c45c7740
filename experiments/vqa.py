"""Questions about pictures: easy-VQA, with the fusion late, in the middle, early, or of positions.

    python -m experiments.vqa                                   DEQFusion of two vectors
    python -m experiments.vqa --fusion tokens                   the equilibrium over cells and words
    python -m experiments.vqa --fusion deq --place middle       DEQFusion at every cell
    python -m experiments.vqa --images 400                      few pictures, where fusions differ

The data come with a package, `pip install -e '.[vqa]'`; the model and the places are described in
`experiments.models.vqa`. Cross-entropy plus γ × the Jacobian penalty; AdamW. Scores are accuracies,
of all questions and by the kind of answer. Beside them stands the most frequent answer to each
question, whatever the picture.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.datasets import easy_vqa
from experiments.models.tokens import takes_positions
from experiments.models.vqa import Place, VQAModel
from experiments.run import Job, execute
from experiments.training.config import CommonConfig, build_fusion, require
from experiments.training.metrics import Metrics, accuracies
from experiments.training.recipe import adamw
from experiments.training.results import Results
from experiments.training.schedule import Schedule
from experiments.training.task import Task, cross_entropy, softmax


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    """Questions about pictures.

    Attributes:
      images: pictures to train on, with about ten questions each.
      place: where deq, weight_tied, concat, … meet the picture: late, middle or early.
      alone: middle and early, every cell of a picture is a sample of its own.
      batch_size: questions a step.
    """

    images: int = easy_vqa.MOST
    place: Place = "late"
    alone: bool = False
    epochs: int = 10
    features: int = 64
    dropout: float = 0.0
    clip: float = 1.0
    batch_size: int = 64
    jacobian_weight: float = 1.0
    max_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        images, most = self.images, easy_vqa.MOST
        require(1 <= images <= most, "images", images, f"1 to {most}")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        if self.place == "late":
            require(not self.alone, "alone", "with --place late", "--place middle or early")
        if self.alone and self.warm_start:
            raise InputError("--warm-start keeps one solve a row; leave it out with --alone")


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.vqa")


def modalities(config: Config) -> tuple[str, ...]:
    return easy_vqa.MODALITIES


def scores(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Shares of right answers, of all questions and by the kind of the right answer."""
    return accuracies(labels == np.argmax(probabilities, axis=1), easy_vqa.by_kind(labels))


def job(config: Config) -> Job:
    """The data and what is to be learned from them."""
    fusion = build_fusion(config, modalities(config))
    if takes_positions(fusion):
        needed = f"none with --fusion {config.fusion}, which takes all cells and words"
        require(config.place == "late", "place", config.place, needed)
    dataset, vocabulary = easy_vqa.load(config.images, config.seed)
    sizes = len(dataset.classes), vocabulary, config.features, config.dropout
    task = Task(
        VQAModel(fusion, *sizes, config.place, config.alone),
        cross_entropy,
        scores,
        softmax,
        monitor="accuracy",
        jacobian_weight=config.jacobian_weight,
        average=config.average,
        recipe=config.recipe,
    )
    guess = easy_vqa.question_alone(dataset.train, dataset.test)
    floors: Mapping[str, Metrics] = {"the question alone": scores(dataset.test.labels, guess)}
    optimiser = adamw(config.learning_rate, config.weight_decay, config.clip)
    epochs, size, patience = config.epochs, config.batch_size, config.patience
    schedule = Schedule(epochs, size, patience=patience, shallow=config.shallow)
    return Job("vqa", dataset, task, optimiser, schedule, floors=lambda _: (floors, ()))


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test questions, report."""
    return execute("vqa", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
