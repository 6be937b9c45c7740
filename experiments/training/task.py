"""A `Task`, what a model is to learn, and `evaluate`, how well it does on a split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deq_fusion_jax import FusionOutput, SolveStats
from experiments.datasets import Split
from experiments.datasets.preprocess import take
from experiments.datasets.stream import Stream, stays_on_disk
from experiments.training.devices import device_count, replicate, shard
from experiments.training.recipe import Recipe

PyTree = Any
Metrics = dict[str, float]


class Prediction(NamedTuple):
    """What a model of an experiment returns from (inputs, train).

    Attributes:
      logits: [N, C].
      fusion: the fusion's own output.
      extras: whatever else the experiment's loss needs.
    """

    logits: jax.Array
    fusion: FusionOutput
    extras: Any = None


class Variables(NamedTuple):
    """What a model has learned."""

    params: PyTree
    batch_stats: PyTree


def undivided(labels: np.ndarray) -> Mapping[str, np.ndarray]:
    return {}


@dataclass(frozen=True)
class Task:
    """What to learn. Equal tasks, of several seeds say, share one compiled training step.

    Attributes:
      model: (inputs, train=…, z0=…, adjoint0=…) → `Prediction`; the last two go to its fusion,
        and are only given where that solves an equilibrium.
      loss: (prediction, labels) → [] mean over the batch, without the Jacobian penalty; of the
        logits and extras, since the rows of the fusion's output may be the cells of a picture.
      metrics: (labels, probabilities) → {name: value}.
      probabilities: logits → probabilities, or whatever is predicted; traceable.
      monitor: the validation metric that selects the epoch.
      jacobian_weight: γ; γ × the Jacobian penalty is added to the loss.
      average: decay δ of the running mean of the weights, ā ← δ ā + (1 - δ) a after every step,
        which is what is evaluated; 0: the weights themselves are.
      warm_start: start the solves of a row from its last ones; see `experiments.training.warm`.
      recipe: how a fusion with a solver is trained.
      parts: labels → {name: [N] bool}, rows whose solves the results tell apart.
    """

    model: nn.Module
    loss: Callable[[Prediction, jax.Array], jax.Array]
    metrics: Callable[[np.ndarray, np.ndarray], Mapping[str, float]]
    probabilities: Callable[[jax.Array], jax.Array]
    monitor: str
    jacobian_weight: float = 0.0
    average: float = 0.0
    warm_start: bool = False
    recipe: Recipe = Recipe()
    parts: Callable[[np.ndarray], Mapping[str, np.ndarray]] = undivided


def cross_entropy(prediction: Prediction, labels: jax.Array) -> jax.Array:
    """Mean over rows, of classes [N]."""
    loss = optax.softmax_cross_entropy_with_integer_labels
    return loss(prediction.logits, labels).mean()


def softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(logits)


def sigmoid(logits: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(logits)


class Evaluation(NamedTuple):
    """A model on a whole split, on the host.

    Attributes:
      probabilities: [N, C].
      metrics: of the task.
      loss: mean over the rows.
      stats: `SolveStats` over all rows, None where nothing is solved.
      gates: {modality: [N]} mean |α_i| over a sample's channels, None where there are none.
    """

    probabilities: np.ndarray
    metrics: Metrics
    loss: float
    stats: SolveStats | None
    gates: dict[str, np.ndarray] | None


def evaluate(task: Task, variables: Variables, split: Split, batch_size: int = 256) -> Evaluation:
    """Runs the model on a split in batches; a row's result does not depend on its batch."""
    rows, batch_size = len(split.labels), _divisible(batch_size)
    padded = -(-rows // batch_size) * batch_size
    index = np.minimum(np.arange(padded), rows - 1).reshape(-1, batch_size)
    if stays_on_disk(split):
        batches = Stream(rows, partial(take, split)).batches(index)
        each = [jax.device_get(_predict_one(task, variables, batch)) for batch in batches]
        found = jax.tree.map(lambda *x: np.stack(x), *each)
    else:
        found = _predict(task, variables, split, index)
    return _evaluation(task, np.asarray(split.labels), found, np.arange(rows))


def evaluate_folds(
    task: Task, variables: Variables, split: Split, held_out: Sequence[np.ndarray]
) -> Evaluation:
    """One evaluation of all rows [n] that are held out by a fold, each by the model of its fold.

    The variables are stacked, with a leading axis of the folds.
    """
    width = _divisible(max(map(len, held_out)))
    index = np.stack([np.resize(rows, width) for rows in held_out])
    found = _predict_folds(task, variables, split, index)
    ends = [fold * width + np.arange(len(rows)) for fold, rows in enumerate(held_out)]
    labels = np.asarray(split.labels)[np.concatenate(held_out)]
    return _evaluation(task, labels, found, np.concatenate(ends))


def _divisible(rows: int) -> int:
    """As many rows or some more, so that the devices have equally many."""
    devices = device_count()
    return -(-rows // devices) * devices


def _evaluation(task: Task, labels: np.ndarray, found: PyTree, rows: np.ndarray) -> Evaluation:
    """Of what `_predict` found, in batches, these rows, whose labels are given."""
    predicted, finite, stats, gates, losses = jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[rows], found
    )
    metrics = dict(task.metrics(labels, predicted))
    if not finite.all():  # a model that has diverged has no score
        metrics = dict.fromkeys(metrics, float("nan"))
    return Evaluation(predicted, metrics, float(np.mean(losses)), stats, gates)


@partial(jax.jit, static_argnames=("task",))
def _predict(task: Task, variables: Variables, split: Split, index: jax.Array) -> PyTree:
    """Of row numbers [batches, B]: what is predicted, [batches, B, …], which logits were finite,
    stats, gates and losses."""

    def of_rows(rows: jax.Array) -> PyTree:
        return _predict_batch(task, variables, take(split, rows))

    return replicate(jax.lax.map(of_rows, index))


@partial(jax.jit, static_argnames=("task",))
def _predict_one(task: Task, variables: Variables, batch: Split) -> PyTree:
    """`_predict` of one batch, without the axis of batches."""
    return replicate(_predict_batch(task, variables, batch))


@partial(jax.jit, static_argnames=("task",))
def _predict_folds(task: Task, variables: Variables, split: Split, index: jax.Array) -> PyTree:
    """`_predict` of a batch for each fold, row numbers [folds, B], by its own variables."""

    def of_fold(fold: tuple[Variables, jax.Array]) -> PyTree:
        return _predict_batch(task, fold[0], take(split, fold[1]))

    return replicate(jax.lax.map(of_fold, (variables, index)))


def _predict_batch(task: Task, variables: Variables, batch: Split) -> PyTree:
    inputs, labels = shard(tuple(batch))
    prediction: Any = task.model.apply(variables._asdict(), inputs, train=False)
    fusion = prediction.fusion
    gates = jax.tree.map(
        lambda gate: jnp.mean(jnp.abs(gate), axis=range(1, gate.ndim)), fusion.gates
    )
    one_row = jax.tree.map(lambda x: x[:, None], (prediction._replace(fusion=None), labels))
    logits = prediction.logits
    finite = jnp.isfinite(logits).all(axis=range(1, logits.ndim))
    predicted = task.probabilities(jnp.nan_to_num(logits, posinf=0, neginf=0))
    return predicted, finite, fusion.stats, gates, jax.vmap(task.loss)(*one_row)


def solver_means(stats: SolveStats | None) -> dict[str, jax.Array]:
    """Fraction converged, mean and largest step count and largest residual of a batch."""
    if stats is None:
        return {}
    return {
        "converged": jnp.mean(stats.converged),
        "mean_steps": jnp.mean(stats.steps),
        "max_steps": jnp.max(stats.steps),
        "residual": jnp.max(stats.residual),
    }
