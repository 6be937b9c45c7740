"""A training step: from a state and a batch to the next state and what was seen.

Parameters, optimiser state, step counter and key are one pytree, and every random number is
derived from the key and the step, so a run that stops and resumes is the uninterrupted one bit
for bit.

A step is bad, counted, and changes nothing where its loss or gradient is not finite, or where the
inputs of a modality are FAR times as large as in the good batches before: one such batch would
spoil the running statistics of batch normalisation for many steps.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from deq_fusion_jax import Adjoint
from experiments.datasets import Split
from experiments.training.devices import put, replicate, shard
from experiments.training.task import Task, Variables, solver_means
from experiments.training.warm import Warm, cold_start, put_rows, rows_of, solves_adjoint, state_of

PyTree = Any
Seen = dict[str, jax.Array]  # what a step saw: {name: []}
FAR = 100.0


class TrainState(NamedTuple):
    """Everything that training changes.

    Attributes:
      variables, optimiser: what is learned, and the optimiser's own state.
      step: [] int32, steps done, bad ones included.
      key: of the run; never changes.
      bad: [] int32, bad steps in a row up to now.
      usual: {modality: []} running mean of the inputs' `sizes` in good batches; 0 before the first.
      warm: where the rows' next solves start, if that is kept.
      average: the running mean of the weights, if there is one.
    """

    variables: Variables
    optimiser: PyTree
    step: jax.Array
    key: jax.Array
    bad: jax.Array
    usual: dict[str, jax.Array]
    warm: Warm | None = None
    average: PyTree | None = None

    @property
    def learned(self) -> Variables:
        """What is evaluated."""
        if self.average is None:
            return self.variables
        return self.variables._replace(params=self.average)


def copied(tree: PyTree) -> PyTree:
    """Fresh buffers: those of the training state are donated to its next step."""
    return jax.tree.map(jnp.copy, tree)


def init_state(
    task: Task,
    optimiser: optax.GradientTransformation,
    inputs: PyTree,
    seed: int,
    start: Variables | None = None,
) -> TrainState:
    """The state before the first step; the parameters depend on the seed alone, or are `start`."""
    init_key, key = jax.random.split(jax.random.key(seed))
    sample = jax.tree.map(lambda x: x[:2], inputs)
    variables = start._asdict() if start else _initialised(task.model, init_key, sample)
    warm = None
    if task.warm_start and solves_adjoint(task.model):
        warm = cold_start(task.model, variables, inputs)
    params = variables["params"]
    variables = Variables(params, variables.get("batch_stats", {}))
    average = copied(params) if task.average else None
    zero = jnp.zeros((), jnp.int32)
    usual = jax.tree.map(jnp.zeros_like, sizes(sample))
    state = TrainState(variables, optimiser.init(params), zero, key, zero, usual, warm, average)
    return put(copied(state))  # no two of them in one buffer


@partial(jax.jit, static_argnames="model")  # compiled once for all seeds
def _initialised(model: nn.Module, key: jax.Array, inputs: PyTree) -> PyTree:
    return model.init(key, inputs)


def sizes(inputs: PyTree) -> dict[str, jax.Array]:
    """Root mean square of every floating-point modality of a batch; what is missing (NaN) aside."""
    real = {name: x for name, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {name: jnp.sqrt(jnp.nanmean(jnp.square(x))) for name, x in real.items()}


def train_step(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    batch: Split,
    rows: jax.Array | None = None,
) -> tuple[TrainState, Seen]:
    """One optimiser step on a batch, and what it saw; `rows` are its row numbers, for warm starts.

    Among what it saw, "bad" is 1 for a bad step, whose other numbers mean nothing.
    """
    inputs, labels = shard(tuple(batch))
    start = solver_start(task, state, inputs, rows)
    gradient = gradient_of(task, state, inputs, labels, start)
    good, usual = judge(state, inputs, gradient.seen)

    def unless_bad(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda x, y: jnp.where(good, x, y), new, old)

    variables, optimiser_state = updated(task, optimiser, state, gradient)
    variables = unless_bad(variables, state.variables)
    average = state.average
    if average is not None:
        mean = optax.incremental_update(variables.params, average, 1 - task.average)
        average = unless_bad(mean, average)
    warm = state.warm
    if warm is not None and start is not None and rows is not None:
        warm = put_rows(warm, rows, unless_bad(gradient.ends, start))
    after = TrainState(
        variables,
        unless_bad(optimiser_state, state.optimiser),
        state.step + 1,
        state.key,
        jnp.where(good, 0, state.bad + 1),
        unless_bad(usual, state.usual),
        warm,
        average,
    )
    return replicate((after, gradient.seen | {"bad": (~good).astype(jnp.float32)}))


class Gradient(NamedTuple):
    """What a forward and a backward pass over a batch come to.

    Attributes:
      params: of the loss, Jacobian penalty included, with respect to the parameters.
      batch_stats: running statistics after the batch.
      seen: {name: []}, as `fit` reports them.
      ends: where the solves ended; the adjoint is None where none was solved.
    """

    params: PyTree
    batch_stats: PyTree
    seen: Seen
    ends: Warm


def solver_start(
    task: Task, state: TrainState, inputs: PyTree, rows: jax.Array | None
) -> Warm | None:
    """Where the solves of a batch start; None where the model solves no adjoint."""
    if not solves_adjoint(task.model):
        return None
    if state.warm is not None:
        assert rows is not None, "warm starts are kept by row"
        return shard(rows_of(state.warm, rows))
    return cold_start(task.model, state.variables._asdict(), inputs)


def gradient_of(
    task: Task, state: TrainState, inputs: PyTree, labels: jax.Array, start: Warm | None
) -> Gradient:
    """The gradient of loss + γ × Jacobian penalty. Its keys are derived from the step."""
    dropout, jacobian = jax.random.split(jax.random.fold_in(state.key, state.step))
    rngs = {"dropout": dropout}
    if task.jacobian_weight:
        rngs["jacobian"] = jacobian
    model = task.recipe.loosened(task.model, state.step)
    weight = task.recipe.jacobian_weight(task.jacobian_weight, state.step)

    def objective(params: PyTree, adjoint0: Adjoint | None) -> tuple[jax.Array, tuple[Any, ...]]:
        options: dict[str, Any] = {"adjoint0": adjoint0} if start else {}
        if start and state.warm is not None:  # else the fusion knows where to start
            options["z0"] = start.z0
        prediction, changed = model.apply(
            {"params": params, "batch_stats": state.variables.batch_stats},
            inputs,
            train=True,
            rngs=rngs,
            mutable=["batch_stats"],
            **options,
        )
        fusion = prediction.fusion
        loss = task.loss(prediction, labels)
        seen = {"loss": loss, **solver_means(fusion.stats)}
        if fusion.jacobian_penalty is not None:
            seen["jacobian_penalty"] = fusion.jacobian_penalty
            loss = loss + weight * fusion.jacobian_penalty
        rest = state_of(task.model, fusion)
        return loss, (changed.get("batch_stats", {}), seen, rest)

    differentiate = jax.grad(objective, argnums=(0, 1), has_aux=True)
    adjoint0 = start and start.adjoint0
    (grads, adjoint), (batch_stats, seen, rest) = differentiate(state.variables.params, adjoint0)
    seen["gradient_norm"] = optax.tree.norm(grads)
    if adjoint is not None:
        seen["backward_converged"] = jnp.mean(adjoint.failed == 0)
        seen["backward_steps"] = jnp.mean(adjoint.steps)
    return Gradient(grads, batch_stats, seen, Warm(rest, adjoint))


def judge(state: TrainState, inputs: PyTree, seen: Seen) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether a step is good, [] bool, and the `usual` sizes of inputs with this batch's."""
    good = jnp.isfinite(seen["loss"]) & jnp.isfinite(seen["gradient_norm"])
    usual = state.usual
    for name, size in sizes(inputs).items():
        before = usual[name]
        good &= (before == 0) | ~(size > FAR * before)
        size = jnp.where(before == 0, size, 0.9 * before + 0.1 * size)
        usual = usual | {name: jnp.where(jnp.isfinite(size), size, before)}
    return good, usual


def updated(
    task: Task, optimiser: optax.GradientTransformation, state: TrainState, gradient: Gradient
) -> tuple[Variables, PyTree]:
    """Variables and optimiser state after the optimiser's step, be it good or bad."""
    params = state.variables.params
    updates, optimiser_state = optimiser.update(gradient.params, state.optimiser, params)
    if "fusion" in params:
        rate = task.recipe.rate(state.step)
        updates = {**updates, "fusion": optax.tree.scale(rate, updates["fusion"])}
    return Variables(optax.apply_updates(params, updates), gradient.batch_stats), optimiser_state
