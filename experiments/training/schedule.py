"""How long to train, and which epoch to keep: decided from the history alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
      shallow: epochs at the beginning without a solve (`experiments.training.recipe`), of which
        none is selected.
      bad_steps: bad steps in a row (see `experiments.training.step`) after which training stops;
        looked at when evaluating.
    """

    epochs: int
    batch_size: int
    evaluate_every: int = 1
    patience: int | None = None
    smooth: int = 1
    shallow: int = 0
    bad_steps: int = 100

    def is_shallow(self, epoch: int) -> bool:
        """Whether no solve has led to that epoch."""
        return self.shallow > 0 and epoch <= self.shallow

    def next_epoch(self, history: History) -> int:
        """The next one to be evaluated; the last one without a solve is among them."""
        epoch = history[-1]["epoch"]
        end = self.shallow if epoch < self.shallow else self.epochs
        return min(epoch + self.evaluate_every, end, self.epochs)

    def best_epoch(self, history: History, monitor: str) -> int:
        """The first epoch with the best validation score; of equal scores, or where none is
        defined, with the smallest validation loss.

        Epoch 0, the untrained weights, and those without a solve only while there is no other.
        """
        before = sum(row["epoch"] <= self.shallow for row in history)
        if before == len(history):
            return history[-1]["epoch"]
        ends = range(before, len(history))
        best = max(ends, key=lambda end: self._standing(history[: end + 1], monitor))
        return history[best]["epoch"]

    def _standing(self, history: History, monitor: str) -> tuple[float, float]:
        """What the last epoch is selected by: mean score, mean loss negated; -inf: undefined."""
        rows = history[-self.smooth :]
        score = sum(row["validation"][monitor] for row in rows) / len(rows)
        loss = sum(row["validation_loss"] for row in rows) / len(rows)
        score, gain = (x if math.isfinite(x) else -math.inf for x in (score, -loss))
        return score, gain

    def ending(self, history: History, best_epoch: int, bad: int) -> str | None:
        """Why training is over, after `bad` bad steps in a row; None where it is not."""
        epoch = history[-1]["epoch"]
        if epoch >= self.epochs:
            return f"all {self.epochs} epochs are done"
        if bad >= self.bad_steps:
            return f"the last {bad} steps were bad: no finite gradient, or inputs out of all range"
        since = sum(row["epoch"] > max(best_epoch, self.shallow) for row in history)
        if self.patience is not None and since >= self.patience:
            return f"no gain on validation since epoch {best_epoch}, {since} evaluations ago"
        return None
