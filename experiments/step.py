"""A training step, and an epoch as one compiled scan, on data that live on the device.

Parameters, optimiser state, step counter and key are one pytree, and every random number is
derived from the key and the step, so a run that stops and resumes is the uninterrupted one bit
for bit.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deq_fusion_jax import Adjoint, FusionState
from experiments.datasets import Split
from experiments.task import Task, Variables, solver_means
from experiments.warm import Warm, cold_start, put_rows, rows_of, solves_adjoint

PyTree = Any


class TrainState(NamedTuple):
    """Everything that training changes; `warm` is where the rows' next solves start, if kept, and
    `average` the running mean of the weights, if one is."""

    variables: Variables
    optimiser: PyTree
    step: jax.Array
    key: jax.Array
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
    task: Task, optimiser: optax.GradientTransformation, inputs: PyTree, seed: int
) -> TrainState:
    """The state before the first step; the parameters depend on the seed alone."""
    init_key, key = jax.random.split(jax.random.key(seed))
    sample = jax.tree.map(lambda x: x[:2], inputs)
    variables = jax.jit(task.model.init)(init_key, sample)
    warm = None
    if task.warm_start and solves_adjoint(task.model):
        warm = cold_start(task.model, variables, inputs)
    params = variables["params"]
    variables = Variables(params, variables.get("batch_stats", {}))
    average = copied(params) if task.average else None
    start = optimiser.init(params), jnp.zeros((), jnp.int32), key
    return TrainState(variables, *start, warm, average)


def train_step(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    rows: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step on a batch of rows, and what it saw."""
    inputs, labels = jax.tree.map(lambda x: x[rows], tuple(data))
    dropout, jacobian = jax.random.split(jax.random.fold_in(state.key, state.step))
    rngs = {"dropout": dropout}
    if task.jacobian_weight:
        rngs["jacobian"] = jacobian
    start = None
    if state.warm is not None:
        start = rows_of(state.warm, rows)
    elif solves_adjoint(task.model):
        start = cold_start(task.model, state.variables._asdict(), inputs)

    def objective(params: PyTree, adjoint0: Adjoint | None) -> tuple[jax.Array, tuple[Any, ...]]:
        options: dict[str, Any] = {"z0": start.z0, "adjoint0": adjoint0} if start else {}
        prediction, updated = task.model.apply(
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
            loss = loss + task.jacobian_weight * fusion.jacobian_penalty
        rest = FusionState(fusion.modalities, fusion.fused)
        return loss, (updated.get("batch_stats", {}), seen, rest)

    gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
    params, adjoint0 = state.variables.params, start and start.adjoint0
    (grads, adjoint), (batch_stats, seen, rest) = gradient(params, adjoint0)
    updates, optimiser_state = optimiser.update(grads, state.optimiser, params)
    variables = Variables(optax.apply_updates(params, updates), batch_stats)
    seen["gradient_norm"] = optax.tree.norm(grads)
    if adjoint is not None:
        seen["backward_converged"] = jnp.mean(adjoint.failed == 0)
        seen["backward_steps"] = jnp.mean(adjoint.steps)
    warm = state.warm and put_rows(state.warm, rows, Warm(rest, adjoint))
    average = None
    if state.average is not None:
        average = optax.incremental_update(variables.params, state.average, 1 - task.average)
    step = state.step + 1
    return TrainState(variables, optimiser_state, step, state.key, warm, average), seen


@partial(jax.jit, static_argnames=("task", "optimiser", "batch_size", "epochs"), donate_argnums=2)
def run_epochs(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    batch_size: int,
    epochs: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`epochs` passes over shuffled data as one scan; returns what every step saw, [steps]."""
    rows = len(data.labels)
    batches = rows // batch_size

    def order(epoch: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 2**31 - 1), epoch)
        return jax.random.permutation(key, rows)[: batches * batch_size]

    first = state.step // batches
    order_of_all = jax.vmap(order)(first + jnp.arange(epochs)).reshape(-1, batch_size)

    def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(task, optimiser, state, data, batch)

    return jax.lax.scan(step, state, order_of_all)
