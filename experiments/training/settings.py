"""How long to train on data that nobody has tuned anything for: a rule, by the number of rows.

    rows                 what selects the epoch                                            batch
    fewer than 1,000     the rows that five folds hold out, together; repeated until they  rows / 8,
                         are some 300, three times at most; 400 steps                      16 … 256
    1,000 or more        the validation rows; 20,000 steps at most, and 100 epochs, or
                         1,000 steps where that is more

Everywhere there is an evaluation every 20 steps or every epoch, whichever takes longer, and
training ends after 400 steps without a gain. What is given is taken as it is.

What regularises follows from the number of rows, too, and of features, over all modalities:

    rows                               mixing   dropout before, behind the fusion   average
    fewer than 1,000, and fewer than
    features                           0.3      0      0.5                          0.95
    fewer than 1,000                   0.1      0      0.5                          0.95
    1,000 or more                      0        0.3    0                            0

The learning rate and the Jacobian weight are the same for all: see CommonConfig. How all of this
was chosen: experiments/README.md.
"""

from typing import Any, NamedTuple

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


class Regularisation(NamedTuple):
    """What keeps a model from learning its rows by heart; see `experiments.features.Config`."""

    mixing: float
    dropout: float
    head_dropout: float
    average: float

    def __str__(self) -> str:
        return (
            f"mixing {self.mixing:g}, dropout {self.dropout:g} in front of the fusion and "
            f"{self.head_dropout:g} behind it, average {self.average:g}"
        )


def regularisation_for(rows: int, columns: int, given: Any = None) -> Regularisation:
    """That of so many training and validation rows and features, but what `given` has attributes
    for that are not None.

    Where rows are few, others mixed into them regularise, the more where every row is far from the
    others; of few features that would wipe out what tells two classes apart. Dropout in front of
    the fusion harms DEQ fusion: under group normalisation a sample looks another without it than
    with it.
    """
    ruled = Regularisation(0.0, 0.3, 0.0, 0.0)
    if rows < FEW:
        ruled = Regularisation(0.3 if rows < columns else 0.1, 0.0, 0.5, 0.95)
    values = {name: getattr(given, name, None) for name in ruled._fields}
    return ruled._replace(**{name: x for name, x in values.items() if x is not None})
