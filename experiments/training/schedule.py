"""How long to train, and which epoch to keep: decided from the history alone."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

History = Sequence[Mapping[str, Any]]  # one row an evaluation; see `experiments.training.train.fit`


class Schedule(NamedTuple):
    """How long to train.

    Attributes:
      epochs: passes over the training rows, at most.
      batch_size: rows a step; a last incomplete batch of an epoch is left out (the order changes
        every epoch). More than there are rows means all rows.
      evaluate_every: epochs between two evaluations on the validation split.
      patience: evaluations without a gain after which training stops; None: never.
      smooth: an epoch is selected by the mean score of so many evaluations, its own the last.
      bad_steps: bad steps in a row (see `experiments.training.step`) after which training stops;
        looked at when evaluating.
    """

    epochs: int
    batch_size: int
    evaluate_every: int = 1
    patience: int | None = None
    smooth: int = 1
    bad_steps: int = 100

    def next_epoch(self, history: History) -> int:
        """The next one to be evaluated."""
        return min(history[-1]["epoch"] + self.evaluate_every, self.epochs)

    def selects(self, history: History, best_epoch: int, monitor: str) -> bool:
        """Whether the newest epoch is better than `best_epoch`, by the validation score."""
        scores = [row["validation"][monitor] for row in history]
        best = next(i for i, row in enumerate(history) if row["epoch"] == best_epoch)
        ends = len(scores) - 1, best
        score, highest = (np.mean(scores[: end + 1][-self.smooth :]) for end in ends)
        return bool(score > highest or (np.isfinite(score) and not np.isfinite(highest)))

    def ending(self, history: History, best_epoch: int, bad: int) -> str | None:
        """Why training is over, after `bad` bad steps in a row; None where it is not."""
        epoch = history[-1]["epoch"]
        if epoch >= self.epochs:
            return f"all {self.epochs} epochs are done"
        if bad >= self.bad_steps:
            return f"the last {bad} steps were bad: no finite gradient, or inputs out of all range"
        since = sum(row["epoch"] > best_epoch for row in history)
        if self.patience is not None and since >= self.patience:
            return f"no gain on validation since epoch {best_epoch}, {since} evaluations ago"
        return None
