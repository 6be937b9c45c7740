"""Cross-validation: where rows are few, all of them select the epoch, in turns."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from experiments.datasets import Split
from experiments.datasets.preprocess import take
from experiments.training.checkpoint import Checkpoints
from experiments.training.schedule import Schedule
from experiments.training.task import Task
from experiments.training.train import fit

History = list[dict[str, Any]]
Folds = Sequence[tuple[np.ndarray, np.ndarray]]  # of each the rows to train on, and those held out


def cross_validate(
    task: Task,
    optimiser: optax.GradientTransformation,
    rows: Split,
    folds: Folds,
    schedule: Schedule,
    seed: int,
    checkpoints: Sequence[Checkpoints | None],
    report: Callable[[int, dict[str, Any]], None] = lambda fold, row: None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[History, int]:
    """Trains once a fold, and returns the mean history and the epoch that it selects.

    Every fold is trained through all epochs of the schedule. Folds have equally many training rows
    (a few of the larger ones sit out), so that one compiled program trains all of them.
    """
    schedule = schedule._replace(patience=None)
    fewest = min(len(learned) for learned, _ in folds)
    histories = []
    for fold, (learned, held_out) in enumerate(folds):
        learned = np.random.default_rng((seed, fold)).permutation(learned)[:fewest]
        parts = take(rows, np.sort(learned)), take(rows, held_out)
        fitted = fit(
            task,
            optimiser,
            *parts,
            schedule,
            seed + fold,
            checkpoints[fold],
            lambda row, fold=fold: report(fold, row),
            stop=stop,
        )
        histories.append(fitted.history)
    history = [_mean(rows) for rows in zip(*histories, strict=True)]
    return history, schedule.best_epoch(history, task.monitor)


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return jax.tree.map(lambda *values: float(np.mean(values)), *rows) | {"epoch": rows[0]["epoch"]}
