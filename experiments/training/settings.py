"""How to train on data that nobody has tuned anything for: a rule, from the number of rows alone.

    rows          batch, at most    selection
    fewer than    rows / 8, of      five-fold cross-validation, repeated until a thousand rows were
    1,000         16 … 256          held out (three times at most), then a training on all rows
    more                            the validation rows

Everywhere: an evaluation every 20 steps or every epoch, whichever is longer; patience for PATIENCE
steps. The gradient is clipped to norm 1.
"""

from typing import NamedTuple

FEW = 1000  # rows; with fewer, a seventh of them is too small to select an epoch
FOLDS, REPEATS, HELD_OUT = 5, 3, 1000
STEPS_FEW, STEPS = 400, 20_000  # at most
PATIENCE, EVALUATED = 400, 20  # steps
EPOCHS = 100  # at most, and of few rows as many as STEPS_FEW come to


class Settings(NamedTuple):
    """Attributes are options of `experiments.features`, and the folds of a cross-validation."""

    epochs: int
    batch_size: int
    evaluate_every: int
    patience: int
    folds: int
    repeats: int


def settings_for(rows: int, batch_size: int | None = None) -> Settings:
    """The settings for so many rows of training and validation together."""
    few = rows < FEW
    learned = rows - rows // FOLDS
    batch_size = batch_size or int(2 ** min(max((learned // 8).bit_length() - 1, 4), 8))
    batches = max(1, learned // batch_size)
    every = -(-EVALUATED // batches)
    epochs = -(-(STEPS_FEW if few else STEPS) // batches)
    epochs = epochs if few else min(epochs, max(EPOCHS, -(-1000 // batches)))
    patience = -(-PATIENCE // (every * batches))
    repeats = min(max(1, round(HELD_OUT / rows)), REPEATS)
    return Settings(epochs, batch_size, every, patience, FOLDS if few else 0, repeats)
