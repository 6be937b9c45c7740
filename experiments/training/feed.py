"""How training rows reach the device: all of them at once, for one model or for those of several
folds, or batch by batch from disk.

In any case the rows of step s are the same: an epoch is a permutation drawn from the run's key and
the epoch, cut into batches; a last incomplete batch is left out.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.datasets import Split
from experiments.datasets.stream import Stream
from experiments.training.devices import own_rows, put, put_batches
from experiments.training.step import Seen, TrainState, copied, train_step
from experiments.training.task import Task

PyTree = Any


class Resident(NamedTuple):
    """All rows live on the device, and epochs are one compiled scan."""

    split: Split

    @property
    def rows(self) -> int:
        return len(self.split.labels)

    @property
    def examples(self) -> PyTree:
        """Inputs of as many rows as the state has to know of."""
        return self.split.inputs

    def steps(
        self,
        task: Task,
        optimiser: optax.GradientTransformation,
        state: TrainState,
        batch_size: int,
        first: int,
        end: int,
    ) -> Iterator[tuple[int, TrainState, Seen]]:
        """Trains from step `first` to `end`: (steps done, state, what the steps saw), once."""
        epochs = (end - first) // (self.rows // batch_size)
        yield end, *run_epochs(task, optimiser, state, self.split, batch_size, epochs)


class Streamed(NamedTuple):
    """Rows stay on disk; the next batches are read while the device works.

    Batches are handed over several at a time: what a compiled step needs beside its arguments is
    allocated once a call, which costs a CPU as much as a seventh of a large step.
    """

    stream: Stream
    stretch: int = 4  # steps a call

    @property
    def rows(self) -> int:
        return len(self.stream)

    @property
    def examples(self) -> PyTree:
        return self.stream.read(np.arange(2)).inputs

    def steps(
        self,
        task: Task,
        optimiser: optax.GradientTransformation,
        state: TrainState,
        batch_size: int,
        first: int,
        end: int,
    ) -> Iterator[tuple[int, TrainState, Seen]]:
        """As `Resident.steps`, after every stretch."""
        orders = self._orders(copied(state.key), batch_size, first, end)  # the state's is donated
        done, before = first, None
        for rows in self.stream.batches(orders):
            batches = put_batches(rows, batch_size)
            state, seen = _run_batches(task, optimiser, state, batches)
            jax.block_until_ready(before)  # two calls under way, or all rows would be in memory
            done, before = done + len(seen["bad"]), seen
            yield done, state, seen

    def _orders(
        self, key: jax.Array, batch_size: int, first: int, end: int
    ) -> Iterator[np.ndarray]:
        """The row numbers of every stretch that this process reads.

        An epoch is cut into the same stretches wherever reading begins, so that a resumed run is
        computed by the same programs.
        """
        batches, of_epoch = self.rows // batch_size, -1
        while first < end:
            epoch, batch = divmod(first, batches)
            if epoch != of_epoch:
                order, of_epoch = np.asarray(order_of_epoch(key, epoch, self.rows)), epoch
            last = min(batch + self.stretch - batch % self.stretch, batches, batch + end - first)
            rows = order[batch * batch_size : last * batch_size].reshape(-1, batch_size)
            yield own_rows(rows).ravel()
            first += last - batch


class Folded(NamedTuple):
    """Rows of which every fold has its own, `learned` [folds, n]; states are stacked."""

    split: Split
    learned: jax.Array

    @property
    def rows(self) -> int:
        return self.learned.shape[1]

    def steps(
        self,
        task: Task,
        optimiser: optax.GradientTransformation,
        state: TrainState,
        batch_size: int,
        first: int,
        end: int,
    ) -> Iterator[tuple[int, TrainState, Seen]]:
        """As `Resident.steps`; what the steps saw is [folds, steps]."""
        epochs = (end - first) // (self.rows // batch_size)
        yield end, *_run_epochs_of_folds(task, optimiser, state, *self, batch_size, epochs)


Feed = Resident | Streamed | Folded


@partial(jax.jit, static_argnames="rows")
def order_of_epoch(key: jax.Array, epoch: jax.Array, rows: int) -> jax.Array:
    """The rows [rows] in the order of that epoch."""
    key = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), epoch)
    return jax.random.permutation(key, rows)


@partial(jax.jit, static_argnames=("task", "optimiser"), donate_argnums=2)
def _run_batches(
    task: Task, optimiser: optax.GradientTransformation, state: TrainState, batches: Split
) -> tuple[TrainState, Seen]:
    """A step for every batch of arrays [steps, B, …]."""
    return jax.lax.scan(partial(train_step, task, optimiser), state, batches)


@partial(jax.jit, static_argnames=("task", "optimiser", "batch_size", "epochs"), donate_argnums=2)
def run_epochs(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    batch_size: int,
    epochs: int,
) -> tuple[TrainState, Seen]:
    """`epochs` passes over shuffled data as one scan; returns what every step saw, [steps]."""
    return _pass_over(
        task, optimiser, state, data, jnp.arange(len(data.labels)), batch_size, epochs
    )


@partial(jax.jit, static_argnames=("task", "optimiser", "batch_size", "epochs"), donate_argnums=2)
def _run_epochs_of_folds(
    task: Task,
    optimiser: optax.GradientTransformation,
    states: TrainState,
    data: Split,
    learned: jax.Array,
    batch_size: int,
    epochs: int,
) -> tuple[TrainState, Seen]:
    """`run_epochs` for every fold, in turns: on a CPU that is faster than side by side."""

    def of_fold(fold: tuple[TrainState, jax.Array]) -> tuple[TrainState, Seen]:
        return _pass_over(task, optimiser, fold[0], data, fold[1], batch_size, epochs)

    return jax.lax.map(of_fold, (states, learned))


def _pass_over(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    rows: jax.Array,
    batch_size: int,
    epochs: int,
) -> tuple[TrainState, Seen]:
    """Steps for `epochs` passes over these rows [n], each in its own order."""
    batches = len(rows) // batch_size

    def order(epoch: jax.Array) -> jax.Array:
        return rows[order_of_epoch(state.key, epoch, len(rows))[: batches * batch_size]]

    first = state.step // batches
    orders = jax.vmap(order)(first + jnp.arange(epochs)).reshape(-1, batch_size)
    return scan_steps(task, optimiser, state, data, orders)


def scan_steps(
    task: Task,
    optimiser: optax.GradientTransformation,
    state: TrainState,
    data: Split,
    orders: jax.Array,
) -> tuple[TrainState, Seen]:
    """A step for every row of row numbers [steps, B]."""

    def step(state: TrainState, rows: jax.Array) -> tuple[TrainState, Seen]:
        batch = jax.tree.map(lambda x: x[rows], data)
        return train_step(task, optimiser, state, batch, rows)

    return jax.lax.scan(step, state, orders)


def feed(train: Split | Stream) -> Resident | Streamed:
    return Streamed(train) if isinstance(train, Stream) else Resident(put(train))
