"""A training step on the shapes of ROSMAP and MM-IMDB: ours, with warm starts and without.

Synthetic rows, inputs 2 · N(0, 1) and labels at random, so that the loss falls as the rows are
learned by heart. The model is dropout → fusion layer → linear; Adam; `run_epochs` of
`experiments.training.feed`, as the experiments have it.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax

from deq_fusion_jax import Anderson, DEQFusion
from experiments.benchmarks.contenders import MAX_STEPS
from experiments.benchmarks.problem import Problem, Shape, make_problem
from experiments.benchmarks.timing import Contender, timings
from experiments.datasets import Split
from experiments.training.feed import run_epochs
from experiments.training.step import init_state
from experiments.training.task import Prediction, Task, Variables

RATE = 1e-4  # of Adam
CLASSES = 2

LESSONS = (("ROSMAP", 196, (196, 300, 3)), ("MM-IMDB", 1024, (128, 512, 2)))  # rows, and a step's


class Lesson(NamedTuple):
    """What is to be learned.

    Attributes:
      name: of the data that have the shape.
      rows: how many there are.
      shape: rows a step, channels, modalities.
      dropout: rate on the inputs of the fusion.
    """

    name: str
    rows: int
    shape: Shape
    dropout: float


class Classifier(nn.Module):
    """dropout → fusion → linear."""

    fusion: nn.Module
    dropout: float

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        drop = nn.Dropout(self.dropout, deterministic=not train)
        out = self.fusion({name: drop(x) for name, x in inputs.items()}, train=train, **start)
        return Prediction(nn.Dense(CLASSES, name="head")(out.fused), out)


def layer_problem(lesson: Lesson, seed: int, rows: int | None = None) -> Problem:
    """The fusion layer and the inputs of `rows` rows, by default of one step."""
    batch, features, modalities = lesson.shape
    return make_problem((rows or batch, features, modalities), seed)


def synthetic(lesson: Lesson, seed: int) -> Split:
    labels = np.random.default_rng(seed).integers(0, CLASSES, lesson.rows)
    return Split(layer_problem(lesson, seed, lesson.rows).inputs, labels.astype(np.int32))


def initial_params(lesson: Lesson, seed: int):
    """Of the fusion as in the part `layer`, and a small head."""
    key, shape = jax.random.key(seed), (lesson.shape[1], CLASSES)
    head = {"kernel": 0.01 * jax.random.normal(key, shape), "bias": np.zeros(CLASSES, np.float32)}
    return jax.device_get({"fusion": layer_problem(lesson, seed).params, "head": head})


def our_learner(lesson: Lesson, tol: float, seed: int, schedule: str, warm: bool) -> Contender:
    """`DEQFusion`; a step of it is an epoch, and returns the means over its training steps."""
    solver = Anderson(tol=tol, max_steps=MAX_STEPS)
    layer = DEQFusion.official(lesson.shape[1], solver=solver, schedule=schedule)

    def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return cross_entropy(prediction.logits, labels).mean()

    task = Task(
        Classifier(layer, lesson.dropout), loss, lambda *_: {}, lambda x: x, "", warm_start=warm
    )
    optimiser, data = optax.adam(RATE), jax.device_put(synthetic(lesson, seed))
    params = jax.device_put(initial_params(lesson, seed))
    state = init_state(task, optimiser, data.inputs, seed)
    state = state._replace(variables=Variables(params, {}))

    def epoch() -> dict[str, float]:
        nonlocal state
        state, seen = run_epochs(task, optimiser, state, data, lesson.shape[0], 1)
        return {name: float(np.mean(value)) for name, value in seen.items()}

    return Contender(f"ours, {schedule}, {'warm' if warm else 'cold'}", epoch)


def taught(lesson: Lesson, learners: list[Contender], rounds: int) -> list[dict[str, Any]]:
    """A row for each learner: its time a training step, and the means of one epoch after all."""
    times = timings(learners, rounds, parts=lesson.rows // lesson.shape[0])
    return [
        {
            **lesson._asdict(),
            "contender": learner.name,
            "settings": learner.settings,
            **times[learner.name],
            "last": learner.step(),
        }
        for learner in learners
    ]
