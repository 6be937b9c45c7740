"""Questions about pictures, with the fusion late, in the middle, early, or of positions.

    python -m experiments.vqa                                   DEQFusion of two vectors, a sample
    python -m experiments.vqa --fusion deq --place middle       DEQFusion at every region
    python -m experiments.vqa --fusion tokens                   the equilibrium over regions, words
    python -m experiments.vqa --data-dir DIR                    VQA v2, read from disk
    python -m experiments.vqa --easy-vqa                        real pictures, of a package
    python -m experiments.vqa --easy-vqa --images 400           few of them, where fusions differ

The sample is synthetic, in the files of VQA v2 (`experiments.datasets.vqa_sample`), and the model
the co-attention of `experiments.models.mcan`; the loss is the binary cross-entropy of the official
accuracies of all answers, which is also the score. With --easy-vqa the data come with a package,
`pip install -e '.[vqa]'`, the model is that of `experiments.models.vqa`, the loss cross-entropy and
the score the share of right answers. γ × the Jacobian penalty is added; AdamW. Scores are told of
all questions and by the kind of answer, beside what can be had without the picture.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.text import number
from experiments.datasets import Dataset, easy_vqa
from experiments.datasets import vqa as data
from experiments.datasets.vqa_answers import PEOPLE, WORTH, normalised
from experiments.models.mcan import MCAN
from experiments.models.tokens import takes_positions
from experiments.models.vqa import Place, VQAModel
from experiments.run import Job, execute
from experiments.training.config import PublishedConfig, build_fusion, require
from experiments.training.metrics import Metrics, accuracies
from experiments.training.recipe import adamw
from experiments.training.results import Results
from experiments.training.schedule import Schedule
from experiments.training.task import Evaluation, Prediction, Task, cross_entropy, softmax


@dataclass(frozen=True, kw_only=True)
class Config(PublishedConfig):
    """Questions about pictures.

    Attributes:
      data_dir: folder with VQA v2's questions, annotations and features of regions; None: the
        sample.
      download: get its questions and annotations first; features are to be had elsewhere.
      easy_vqa: the pictures and questions of the package easy-vqa.
      images: of easy-VQA, pictures to train on, with about ten questions each; None: all.
      place: where deq, weight_tied, concat, … meet the picture: late, middle or early.
      alone: of easy-VQA, middle and early: every cell of a picture is a sample of its own, as
        regions of the sample always are.
      layers, heads: of the co-attention, in the model for the sample; None: 2 and 4.
      batch_size: questions a step.
      data_sha256: of questions and annotations; not an option. A run on others is not resumed.
    """

    UNSAID: ClassVar = (*PublishedConfig.UNSAID, "data_sha256")

    easy_vqa: bool = False
    images: int | None = None
    place: Place = "late"
    alone: bool = False
    layers: int | None = None
    heads: int | None = None
    epochs: int = 15
    features: int = 64
    dropout: float = 0.0
    clip: float = 1.0
    batch_size: int = 64
    jacobian_weight: float = 1.0
    max_steps: int = 50
    data_sha256: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        images, most = self.images, easy_vqa.MOST
        require(images is None or 1 <= images <= most, "images", images, f"1 to {most}")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        for name in ("layers", "heads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 or more")
            if value and self.easy_vqa:
                raise InputError(f"--{name} is of the model for the sample; leave out --easy-vqa")
        for name in ("data_dir", "cache_dir", "download"):
            if self.easy_vqa and getattr(self, name):
                option = name.replace("_", "-")
                raise InputError(f"--{option} is for VQA v2; leave out --easy-vqa")
        if self.download and not self.data_dir:
            raise InputError("--download needs --data-dir, a folder for VQA v2's files")
        if not self.easy_vqa and (images or self.alone):
            name = "--images" if images else "--alone"
            raise InputError(f"{name} is for easy-VQA; add --easy-vqa")
        if self.place == "late":
            require(not self.alone, "alone", "with --place late", "--place middle or early")
        elif self.warm_start and (self.alone or not self.easy_vqa):
            raise InputError("--warm-start keeps one solve a row; use --place late")


def parse_args(args: Sequence[str]) -> Config:
    """The options; files that are to be downloaded are there from then on."""
    config = parse(Config(), args, "python -m experiments.vqa")
    if config.data_dir is None:
        return config
    if config.download:
        data.download(config.data_dir.expanduser())
    return replace(config, data_sha256=data.checksum(config.data_dir.expanduser()))


def modalities(config: Config) -> tuple[str, ...]:
    return data.MODALITIES


def job(config: Config) -> Job:
    """The data and what is to be learned from them."""
    fusion = build_fusion(config, modalities(config))
    if takes_positions(fusion):
        needed = f"none with --fusion {config.fusion}, which takes all positions and words"
        require(config.place == "late", "place", config.place, needed)
        for name in ("layers", "heads"):
            require(getattr(config, name) is None, name, getattr(config, name), needed)
    made = of_easy_vqa(config, fusion) if config.easy_vqa else of_vqa_v2(config, fusion)
    task = Task(
        made.model,
        made.loss,
        made.scores,
        made.probabilities,
        monitor="accuracy",
        jacobian_weight=config.jacobian_weight,
        average=config.average,
        recipe=config.recipe,
    )
    optimiser = adamw(config.learning_rate, config.weight_decay, config.clip)
    epochs, size, patience = config.epochs, config.batch_size, config.patience
    schedule = Schedule(epochs, size, patience=patience, shallow=config.shallow)
    return Job(
        "vqa",
        made.dataset,
        task,
        optimiser,
        schedule,
        floors=lambda _: (made.floors(), ()),
        notes=made.notes,
        examples=made.examples,
    )


class Made(NamedTuple):
    """What differs between the data sets: fields of a `Task` and of a `Job`."""

    dataset: Dataset
    model: nn.Module
    loss: Callable[[Prediction, jax.Array], jax.Array]
    scores: Callable[[np.ndarray, np.ndarray], Metrics]
    probabilities: Callable[[jax.Array], jax.Array]
    floors: Callable[[], Mapping[str, Metrics]]
    notes: Sequence[str] = ()
    examples: Callable[[Evaluation], Sequence[Sequence[str]]] = lambda on_test: ()


# --- VQA v2's files ----------------------------------------------------------------------------


def of_vqa_v2(config: Config, fusion: nn.Module) -> Made:
    """VQA v2, or the synthetic sample."""
    width, heads = config.features, config.heads or 4
    if width % heads and not takes_positions(fusion):
        raise InputError(f"--features {width}: expected a multiple of --heads {heads}")
    found = data.load(config.data_dir, config.seed, config.cache_dir)
    if found.dataset.stream:
        memory = {"--warm-start": config.warm_start, "--refit": config.refit}
        memory["--parallel processes"] = config.parallel == "processes"
        for name, asked in memory.items():
            if asked:
                raise InputError(f"{name} needs the rows in memory; leave it out")
    sizes = len(found.answers), found.words, width, config.layers or 2, heads, width
    model = MCAN(fusion, *sizes, dropout=config.dropout, place=config.place)

    def floors() -> Mapping[str, Metrics]:
        kinds = data.by_kind(found.dataset.test.labels)
        return {name: accuracies(worth, kinds) for name, worth in data.floors(found).items()}

    best = data.ceiling(found).mean()
    notes = [*found.notes, f"The best answers there are have an accuracy of {best:.3f} on test."]
    how = bce_of_accuracies, official_accuracy, likeliest
    return Made(found.dataset, model, *how, floors, notes, partial(examples, found))


def bce_of_accuracies(prediction: Prediction, labels: jax.Array) -> jax.Array:
    """Binary cross-entropy of what every answer is worth, summed over the vocabulary, the mean over
    rows. Labels as in `experiments.datasets.vqa`."""
    logits, rows = prediction.logits, jnp.arange(len(labels))[:, None]
    worth = jnp.asarray(WORTH)[labels[:, PEOPLE:-1]]
    targets = jnp.zeros_like(logits).at[rows, labels[:, :PEOPLE]].add(worth)
    return jnp.mean(jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=1))


def likeliest(logits: jax.Array) -> jax.Array:
    """[N, C] → [N, 2]: the number of the likeliest answer, and its probability. All those of full
    VQA v2 would be 2.7 GB."""
    best = jnp.argmax(logits, axis=1)
    return jnp.stack([best.astype(jnp.float32), jax.nn.sigmoid(jnp.max(logits, axis=1))], axis=1)


def official_accuracy(labels: np.ndarray, predicted: np.ndarray) -> Metrics:
    """Of predicted answers [N, 2], 0 … 1, of all questions and by answer type."""
    return accuracies(data.worth(labels, predicted[:, 0].astype(int)), data.by_kind(labels))


def examples(found: data.VQA, on_test: Evaluation) -> list[list[str]]:
    """Ten test questions: what people said, and the model."""
    lines = [["question", "people", "model", "its probability", "accuracy", "solver steps"]]
    tested, labels = found.tested, found.dataset.test.labels
    assert tested.answers is not None
    worth = data.worth(labels, on_test.probabilities[:, 0].astype(int))
    for row in np.linspace(0, len(labels) - 1, 10).astype(int):
        said = Counter(map(normalised, tested.answers.ten[row])).most_common()
        answer, probability = on_test.probabilities[row]
        lines.append(
            [
                tested.texts[row],
                ", ".join(f"{name} {count}" for name, count in said),
                found.answers[int(answer)],
                number(probability),
                number(worth[row], 1),
                str(on_test.stats.steps[row]) if on_test.stats else "–",
            ]
        )
    return lines


# --- easy-VQA ----------------------------------------------------------------------------------


def of_easy_vqa(config: Config, fusion: nn.Module) -> Made:
    """Real pictures, with one right answer to a question."""
    dataset, vocabulary = easy_vqa.load(config.images or easy_vqa.MOST, config.seed)
    sizes = len(dataset.classes), vocabulary, config.features, config.dropout
    model = VQAModel(fusion, *sizes, config.place, config.alone)

    def floors() -> Mapping[str, Metrics]:
        guess = easy_vqa.question_alone(dataset.train, dataset.test)
        return {"the question alone": scores(dataset.test.labels, guess)}

    return Made(dataset, model, cross_entropy, scores, softmax, floors)


def scores(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Shares of right answers, of all questions and by the kind of the right answer."""
    return accuracies(labels == np.argmax(probabilities, axis=1), easy_vqa.by_kind(labels))


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test questions, report."""
    return execute("vqa", job, config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
