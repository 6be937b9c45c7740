"""`fit`: train until the schedule says stop, and keep what does best on validation."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.errors import InputError
from experiments.common.memory import release_memory
from experiments.common.stopping import StoppedError
from experiments.datasets import Dataset, Split
from experiments.datasets.preprocess import join
from experiments.datasets.stream import Stream, stays_on_disk
from experiments.training.checkpoint import Checkpoints
from experiments.training.devices import any_process, put, share_of
from experiments.training.feed import Feed, feed
from experiments.training.schedule import Schedule
from experiments.training.step import Seen, TrainState, copied, init_state
from experiments.training.task import (
    Evaluation,
    Task,
    Variables,
    evaluate,
    solver_means,
)

PyTree = Any
Progress = Callable[[float, Callable[[], dict[str, float]]], None]


class Fitted(NamedTuple):
    """The outcome of `fit`.

    Attributes:
      best: variables of the best evaluation by validation.
      last: the state after the last step.
      history: one row an evaluation; see `fit`.
      best_epoch: epoch of `best`.
      ending: why training stopped, in words.
    """

    best: Variables
    last: TrainState
    history: list[dict[str, Any]]
    best_epoch: int
    ending: str


def fit(
    task: Task,
    optimiser: optax.GradientTransformation,
    train: Split | Stream,
    validation: Split,
    schedule: Schedule,
    seed: int,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    test: Split | None = None,
    keep: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda epoch, means: None,
    start: Variables | None = None,
) -> Fitted:
    """Trains until `schedule` says stop, and keeps the variables that do best on validation, or
    those of the epoch `keep`.

    Every evaluation, the one before the first step included, adds a row to the history,
    {"epoch", "loss", "validation_loss", "validation": {metric: value}, "solver": {…} of the
    validation rows, "train": {…} means over the good steps since the last row and the number of
    "bad_steps", "gates", "seconds"}, and hands it to `report`. Where a save is due, and at the end,
    a checkpoint is saved; where `checkpoints` holds any, training goes on from the newest whole
    one. With `test` every row also has "test": {metric: value}, which nothing here looks at. Once
    `stop` says so, what there is is saved and a StoppedError raised.

    `progress` is told where training begins or goes on, and then after every call to the device how
    far it has come: the epoch with its fraction, and a function of no arguments that fetches the
    means so far. A `Stream` is trained on a few steps a call, so there a checkpoint may lie within
    an epoch. Within a mesh (`jax.set_mesh`, see `experiments.training.devices`) every batch is
    sharded over the devices. `start` are weights to begin with, in place of random ones.
    """
    rows = feed(train)
    batch_size = share_of(schedule.batch_size, rows.rows)
    state = init_state(task, optimiser, rows.examples, seed, start)
    splits = _put(validation), test and _put(test)
    training = Training(task, schedule, *splits, keep, checkpoints, state, copied(state.learned))
    return train_to_the_end(training, optimiser, rows, batch_size, report, stop, progress)


def _put(split: Split) -> Split:
    """On the device, unless its rows stay on disk."""
    return split if stays_on_disk(split) else put(split)


def train_to_the_end(
    training: "Training",
    optimiser: optax.GradientTransformation,
    rows: Feed,
    batch_size: int,
    report: Callable[[dict[str, Any]], None],
    stop: Callable[[], bool],
    progress: Progress,
) -> Fitted:
    """Restores the training and goes on until its schedule says stop; see `fit`."""
    training.restore()
    if not training.history:
        training.evaluate(epoch=0)
    for row in training.history:
        report(row)
    if not training.ending():
        progress(training.step / (rows.rows // batch_size), training.means)
    while not training.ending():
        train_to_next_evaluation(training, optimiser, rows, batch_size, stop, progress)
        due, stopped = training.asked(stop)
        report(training.history[-1])
        if due or training.ending():
            training.save()
        if stopped:
            raise StoppedError(f"epoch {training.history[-1]['epoch']} is saved")
    return training.fitted()


def train_to_next_evaluation(
    training: "Training",
    optimiser: optax.GradientTransformation,
    rows: Feed,
    batch_size: int,
    stop: Callable[[], bool],
    progress: Progress,
) -> None:
    """Trains to the end of the next epoch to be evaluated, and evaluates it; saves on the way."""
    batches = rows.rows // batch_size
    began = time.monotonic() - training.seconds
    epoch = training.schedule.next_epoch(training.history)
    first, end = training.step, epoch * batches
    task = training.task_of(epoch, batches)
    steps = rows.steps(task, optimiser, training.state, batch_size, first, end)
    for step, state, seen in steps:
        training.step, training.state = step, state
        training.sums = _added(training.sums, seen)
        progress(step / batches, training.means)
        if step < end:
            due, stopped = training.asked(stop)
            if due:
                training.seconds = time.monotonic() - began
                training.save()
            if stopped:
                raise StoppedError(f"step {step} is saved")
    training.evaluate(epoch, began)


@dataclass
class Training:
    """A training under way: all that a checkpoint holds, and what is done between two epochs.

    Attributes:
      task, schedule, validation, test, keep, checkpoints: as `fit` was given them.
      state: after `step` steps; its buffers are donated to the next one.
      best, best_epoch: the variables to keep so far, and their epoch.
      history: one row an evaluation.
      sums: of what the steps saw since the last row.
      seconds: that these steps took, as of the last save.
    """

    task: Task
    schedule: Schedule
    validation: Split
    test: Split | None
    keep: int | None
    checkpoints: Checkpoints | None
    state: TrainState
    best: Variables
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: Seen = field(default_factory=dict)
    seconds: float = 0.0
    step: int = 0

    def restore(self) -> None:
        """Goes on from the newest whole checkpoint, if there is one."""
        tree = {"state": self.state, "best": self.best}
        saved = self.checkpoints and self.checkpoints.restore(tree)
        if saved:
            self.step, tree, metadata = saved
            self.state, self.best = tree["state"], tree["best"]
            self.history, self.best_epoch = metadata["history"], metadata["best_epoch"]
            self.sums = jax.tree.map(jnp.float32, metadata["sums"])
            self.seconds = metadata["seconds"]

    def save(self) -> None:
        if self.checkpoints:
            metadata = {"history": self.history, "best_epoch": self.best_epoch}
            metadata |= {"sums": _floats(self.sums), "seconds": self.seconds}
            tree = {"state": self.state, "best": self.best}
            self.checkpoints.save(self.step, tree, metadata)
            release_memory()

    def asked(self, stop: Callable[[], bool]) -> tuple[bool, bool]:
        """Whether to save, and whether to stop then; all processes have to ask."""
        due, stopped = any_process(bool(self.checkpoints and self.checkpoints.due()), stop())
        return due or stopped, stopped

    def task_of(self, epoch: int, batches: int = 0) -> Task:
        """What is trained up to an epoch of so many batches, and evaluated there: one without a
        solve in the first ones."""
        task = self.task
        if not self.schedule.is_shallow(epoch):
            begin = self.schedule.shallow * batches
            return replace(task, recipe=task.recipe._replace(begin=begin))
        recipe = task.recipe._replace(warmup=0)
        return replace(task, recipe=recipe, model=recipe.shallow(task.model))

    def evaluate(self, epoch: int, began: float | None = None) -> None:
        """Adds a row to the history, and keeps the variables if they are the ones to keep.

        `began` is when training went on from the last row, by the monotonic clock.
        """
        row = self.row(self.task_of(epoch))
        seconds = 0.0
        if began is not None:
            seconds = self.history[-1]["seconds"] + time.monotonic() - began
        self.history.append({"epoch": epoch} | row | {"seconds": seconds})
        self.sums, self.seconds = {}, 0.0
        if self._is_chosen():
            self.best, self.best_epoch = copied(self.state.learned), epoch

    def row(self, task: Task) -> dict[str, Any]:
        """What the evaluation of the state adds to the history."""
        learned = self.state.learned
        row = row_of(evaluate(task, learned, self.validation), self.means())
        if self.test:
            row["test"] = evaluate(task, learned, self.test).metrics
        return row

    def _is_chosen(self) -> bool:
        """Whether the newest epoch is `keep`, or without `keep` better than the best one before."""
        monitor, newest = self.task.monitor, self.history[-1]
        if self.keep is None:
            return self.schedule.best_epoch(self.history, monitor) == newest["epoch"]
        score = newest["validation"][monitor]
        return newest["epoch"] == self.keep and bool(np.isfinite(score))

    def means(self) -> dict[str, float]:
        """Of what the steps saw since the last row."""
        return _means(self.sums)

    def ending(self) -> str | None:
        """Why training is over; None where it is not."""
        return self.schedule.ending(self.history, self.best_epoch, int(jnp.max(self.state.bad)))

    def fitted(self) -> Fitted:
        ending = self.ending()
        assert ending is not None
        return Fitted(self.best, self.state, self.history, self.best_epoch, ending)


def selected(
    task: Task,
    optimiser: optax.GradientTransformation,
    inputs: PyTree,
    seed: int,
    checkpoints: Checkpoints,
) -> Variables | None:
    """The variables that a training has selected so far; None where it has saved none."""
    state = init_state(task, optimiser, inputs, seed)
    found = checkpoints.restore({"state": state, "best": state.learned})
    return found[1]["best"] if found else None


def refit(
    chosen: Fitted,
    task: Task,
    optimiser: optax.GradientTransformation,
    dataset: Dataset,
    schedule: Schedule,
    *args: Any,
    **options: Any,
) -> Fitted:
    """Trains anew on the validation rows too, as long as before, and keeps the epoch chosen then.

    The other arguments are those of `fit`. What the history says of the validation rows is no
    validation.

    Raises:
      InputError: it comes to no finite score in the chosen epoch.
    """
    assert dataset.validation is not None
    everyone = join(dataset.train, dataset.validation)
    schedule = schedule._replace(epochs=chosen.history[-1]["epoch"], patience=None)
    options["keep"] = chosen.best_epoch
    again = fit(task, optimiser, everyone, dataset.validation, schedule, *args, **options)
    if again.best_epoch != chosen.best_epoch:
        raise InputError(
            f"the training on all rows broke down before epoch {chosen.best_epoch}, which was "
            "selected; a smaller --learning-rate may help"
        )
    return again


def row_of(found: Evaluation, means: dict[str, float]) -> dict[str, Any]:
    """What an evaluation adds to the history."""
    return {
        "loss": means.get("loss"),
        "validation_loss": found.loss,
        "validation": found.metrics,
        "solver": _floats(solver_means(found.stats)) or None,
        "train": means,
        "gates": {name: float(gate.mean()) for name, gate in (found.gates or {}).items()},
    }


# --- what the steps saw ------------------------------------------------------------------------


@jax.jit
def _added(sums: Seen, seen: Seen) -> Seen:
    """Sums over the good steps, {name: []}, and "bad" over all, and "steps", with some more."""
    good = seen["bad"] == 0
    more = {name: jnp.sum(jnp.where(good, x, 0)) for name, x in seen.items()}
    more |= {"bad": jnp.sum(seen["bad"]), "steps": jnp.float32(good.size)}
    return {name: sums.get(name, 0.0) + x for name, x in more.items()}


def _means(sums: Seen) -> dict[str, float]:
    """Means over the good steps, NaN where there was none, and the number of bad steps."""
    if not sums:
        return {}
    found = _floats(sums)
    bad = found.pop("bad")
    good = found.pop("steps") - bad
    return {name: x / good if good else float("nan") for name, x in found.items()} | {
        "bad_steps": bad
    }


def _floats(tree: PyTree) -> PyTree:
    return jax.tree.map(float, tree)
