"""Cross-validation: where rows are few, all of them select the epoch, in turns."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.datasets import Dataset, Split
from experiments.datasets.preprocess import join
from experiments.training.checkpoint import Checkpoints
from experiments.training.devices import put, share_of
from experiments.training.feed import Folded
from experiments.training.schedule import Schedule
from experiments.training.step import copied, init_state
from experiments.training.task import Task, evaluate_folds
from experiments.training.train import Fitted, Progress, Training, fit, row_of, train_to_the_end

Folds = Sequence[tuple[np.ndarray, np.ndarray]]  # of each the rows to train on, and those held out


def cross_validate(
    task: Task,
    optimiser: optax.GradientTransformation,
    rows: Split,
    folds: Folds,
    schedule: Schedule,
    seed: int,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = lambda epoch, means: None,
) -> Fitted:
    """As `fit`, with a model for each fold, all of them trained in turns by one program.

    The history has the scores of all rows that a fold holds out, together, each predicted by the
    model of its fold, and by them the epoch is selected. `best` and `last` are stacked, with a
    leading axis of the folds. All folds train on equally many rows; a few rows of the larger ones
    sit out.
    """
    learned = _equally_many([learned for learned, _ in folds], seed)
    fed = Folded(put(rows), put(learned))
    batch_size = share_of(schedule.batch_size, fed.rows)
    states = [init_state(task, optimiser, rows.inputs, seed + i) for i in range(len(folds))]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    how = fed.split, None, None, checkpoints, state, copied(state.learned)
    training = Folding(task, schedule, *how, held_out=[held_out for _, held_out in folds])
    return train_to_the_end(training, optimiser, fed, batch_size, report, stop, progress)


def select(
    task: Task,
    optimiser: optax.GradientTransformation,
    dataset: Dataset,
    folds: Folds,
    schedule: Schedule,
    seed: int,
    checkpoints: Checkpoints | None = None,
    report: Callable[[dict[str, Any]], None] = lambda row: None,
    test: Split | None = None,
    **options: Any,
) -> Fitted:
    """The training that selects the epoch: `fit`, or where there are folds `cross_validate`."""
    assert dataset.validation is not None
    if folds:
        what = join(dataset.train, dataset.validation), folds, schedule, seed, checkpoints, report
        return cross_validate(task, optimiser, *what, **options)
    train, validation = dataset.stream or dataset.train, dataset.validation
    how = schedule, seed, checkpoints, report
    return fit(task, optimiser, train, validation, *how, test=test, **options)


@dataclasses.dataclass
class Folding(Training):
    """A training of a model for each fold; `validation` has the rows of all of them.

    Attributes:
      held_out: of each fold the rows that it is evaluated on.
    """

    held_out: Sequence[np.ndarray] = ()

    def row(self, task: Task) -> dict[str, Any]:
        learned, rows = self.state.learned, self.validation
        return row_of(evaluate_folds(task, learned, rows, self.held_out), self.means())


def _equally_many(rows: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """[folds, n], as many of each as the smallest one has, in ascending order."""
    fewest = min(map(len, rows))
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.permutation(some)[:fewest]) for some in rows])
