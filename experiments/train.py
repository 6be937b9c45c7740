"""`fit`: train until the schedule says stop, and keep what does best on validation."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.checkpoint import Checkpoints
from experiments.datasets import Dataset, Split
from experiments.datasets.preprocess import join
from experiments.step import TrainState, copied, init_state, run_epochs
from experiments.stopping import StoppedError
from experiments.task import Task, Variables, evaluate, solver_means

PyTree = Any


class Schedule(NamedTuple):
    """How long to train.

    Attributes:
      epochs: passes over the training rows, at most.
      batch_size: rows a step; a last incomplete batch of an epoch is left out (the order changes
        every epoch). More than there are rows means all rows.
      evaluate_every: epochs between two evaluations on the validation split.
      patience: evaluations without a gain after which training stops; None: never.
      smooth: an epoch is selected by the mean score of so many evaluations, its own the last.
    """

    epochs: int
    batch_size: int
    evaluate_every: int = 1
    patience: int | None = None
    smooth: int = 1


class Fitted(NamedTuple):
    """The outcome of `fit`.

    Attributes:
      best: variables of the best evaluation by validation.
      last: the state after the last step.
      history: one row an evaluation; see `fit`.
      best_epoch: epoch of `best`.
    """

    best: Variables
    last: TrainState
    history: list[dict[str, Any]]
    best_epoch: int


def fit(
    task: Task,
    optimiser: optax.GradientTransformation,
    train: Split,
    validation: Split,
    schedule: Schedule,
    seed: int,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    test: Split | None = None,
    keep: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Trains until `schedule` says stop, and keeps the variables that do best on validation, or
    those of the epoch `keep`.

    Every evaluation, the one before the first step included, adds a row to the history,
    {"epoch", "loss", "validation_loss", "validation": {metric: value}, "solver": {…} of the
    validation rows, "train": {…} means over the steps since the last row, "gates", "seconds"},
    and hands it to `report`. Where a save is due, and at the end, a checkpoint is saved; where
    `checkpoints` holds any, training goes on from the newest whole one. Training that has produced
    a NaN stops there.
    With `test` every row also has "test": {metric: value}, which nothing here looks at. Once `stop`
    says so, the next row is saved and a StoppedError raised.
    """
    batch_size = min(schedule.batch_size, len(train.labels))
    train, validation, test = jax.device_put((train, validation, test))
    state = init_state(task, optimiser, train.inputs, seed)
    best, best_epoch, history = copied(state.learned), 0, []
    saved = checkpoints and checkpoints.restore({"state": state, "best": best})
    if saved:
        _, tree, metadata = saved
        state, best = tree["state"], tree["best"]
        history, best_epoch = metadata["history"], metadata["best_epoch"]

    def evaluate_now(epoch: int, seen: dict[str, jax.Array], seconds: float) -> dict[str, Any]:
        result = evaluate(task, state.learned, validation)
        means = {name: float(np.mean(value)) for name, value in seen.items()}
        watched = {"test": evaluate(task, state.learned, test).metrics} if test else {}
        return {
            "epoch": epoch,
            "loss": means.get("loss"),
            "validation_loss": result.loss,
            "validation": result.metrics,
            "solver": _floats(solver_means(result.stats)) or None,
            "train": means,
            "gates": {name: float(gate.mean()) for name, gate in (result.gates or {}).items()},
            "seconds": seconds,
            **watched,
        }

    if not history:
        history.append(evaluate_now(0, {}, 0.0))
    for row in history:
        report(row)
    while not _is_over(history, best_epoch, schedule):
        start = time.monotonic()
        epochs = min(schedule.evaluate_every, schedule.epochs - history[-1]["epoch"])
        state, seen = run_epochs(task, optimiser, state, train, batch_size, epochs)
        row = evaluate_now(history[-1]["epoch"] + epochs, seen, 0.0)
        row["seconds"] = history[-1]["seconds"] + time.monotonic() - start
        history.append(row)
        if _is_chosen(history, best_epoch, keep, task.monitor, schedule.smooth):
            best, best_epoch = copied(state.learned), row["epoch"]
        over, stopped = _is_over(history, best_epoch, schedule), stop()
        if checkpoints and (checkpoints.due() or over or stopped):
            metadata = {"history": history, "best_epoch": best_epoch}
            checkpoints.save(int(state.step), {"state": state, "best": best}, metadata)
        report(row)
        if stopped and not over:
            raise StoppedError(f"epoch {row['epoch']} is saved")
    return Fitted(best, state, history, best_epoch)


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
    validation. Where it comes to no finite score in the chosen epoch, the first training stands.
    """
    assert dataset.validation is not None
    everyone = join(dataset.train, dataset.validation)
    schedule = schedule._replace(epochs=chosen.history[-1]["epoch"], patience=None)
    options["keep"] = chosen.best_epoch
    again = fit(task, optimiser, everyone, dataset.validation, schedule, *args, **options)
    return again if again.best_epoch == chosen.best_epoch else chosen


def _is_chosen(
    history: list[dict[str, Any]], best_epoch: int, keep: int | None, monitor: str, smooth: int
) -> bool:
    """Whether the newest epoch is the one to keep, or better than the best one before."""
    scores = [row["validation"][monitor] for row in history]
    best = next(i for i, row in enumerate(history) if row["epoch"] == best_epoch)
    if keep is not None:
        return history[-1]["epoch"] == keep and bool(np.isfinite(scores[-1]))
    score, highest = (np.mean(scores[: end + 1][-smooth:]) for end in (len(scores) - 1, best))
    return bool(score > highest or (np.isfinite(score) and not np.isfinite(highest)))


def _is_over(history: list[dict[str, Any]], best_epoch: int, schedule: Schedule) -> bool:
    """Whether all epochs are done, patience has run out, or the loss is not finite any more."""
    if history[-1]["epoch"] >= schedule.epochs:
        return True
    if history[-1]["loss"] is not None and not np.isfinite(history[-1]["loss"]):
        return True
    since = sum(row["epoch"] > best_epoch for row in history)
    return schedule.patience is not None and since >= schedule.patience


def _floats(tree: PyTree) -> PyTree:
    return jax.tree.map(float, tree)
