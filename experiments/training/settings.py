"""How long to train on data that nobody has tuned anything for: a rule, by the number of rows.

    rows                 what selects the epoch                                            batch
    fewer than 1,000     the rows that five folds hold out, together; repeated until they  rows / 8,
                         are some 300, three times at most; 400 steps                      16 … 256
    1,000 or more        the validation rows; 20,000 steps at most, and 100 epochs, or
                         1,000 steps where that is more

Everywhere there is an evaluation every 20 steps or every epoch, whichever takes longer, and
training ends after 400 steps without a gain. What is given is taken as it is.
"""

from typing import NamedTuple

from experiments.training.schedule import Schedule

FEW = 1000  # rows; of fewer a seventh is too small to select an epoch
FOLDS, REPEATS, HELD_OUT = 5, 3, 300
EVALUATED, PATIENCE = 20, 400  # steps


class Settings(NamedTuple):
    """How long to train, and by how many folds, how many times over, to select the epoch."""

    schedule: Schedule
    folds: int
    repeats: int

    def __str__(self) -> str:
        epochs, batch, every, patience, *_ = self.schedule
        again = f", {self.repeats} times over" if self.repeats > 1 else ""
        selected = f"{self.folds} folds{again}" if self.folds else "validation rows"
        return (
            f"by the number of rows: batch {batch}, at most {epochs} epochs, an evaluation every "
            f"{every}, patience for {patience}; selected by {selected}"
        )


def settings_for(
    rows: int,
    split: bool = False,
    epochs: int | None = None,
    batch_size: int | None = None,
    patience: int | None = None,
) -> Settings:
    """The settings for so many training and validation rows; `split`: which are which is given."""
    folds = FOLDS if rows < FEW and not split else 0
    learned = rows - rows // (folds or 7)
    size = batch_size or 2 ** min(max((learned // 8).bit_length() - 1, 4), 8)
    batches = max(1, learned // size)
    every = -(-EVALUATED // batches)
    if epochs is None:
        longest = 400 if rows < FEW else max(1000, min(20_000, 100 * batches))
        epochs = every * -(-longest // (every * batches))  # a rest would be compiled apart
    patience = patience or -(-PATIENCE // (every * batches))
    schedule = Schedule(epochs, size, every, patience, smooth=3 if folds else 1)
    return Settings(schedule, folds, min(max(1, round(HELD_OUT / rows)), REPEATS))
