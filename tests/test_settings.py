"""The rule that says how long to train, at the sizes it is for."""

import pytest

from experiments.features import Config
from experiments.training.settings import regularisation_for, settings_for


@pytest.mark.parametrize(
    ("rows", "batch", "steps", "folds", "repeats"),
    [
        (28, 16, 400, 5, 3),
        (240, 16, 400, 5, 1),
        (999, 64, 400, 5, 1),
        (1000, 64, 1300, 0, 1),  # 13 batches an epoch, 100 epochs
        (1700, 128, 1100, 0, 1),
        (10_000, 256, 3300, 0, 1),
        (50_000, 256, 16_700, 0, 1),
        (500_000, 256, 20_000, 0, 1),
    ],
)
def test_from_28_rows_to_half_a_million(rows, batch, steps, folds, repeats):
    settings = settings_for(rows)
    schedule = settings.schedule
    learned = rows - rows // (folds or 7)
    batches = max(1, learned // schedule.batch_size)
    assert (schedule.batch_size, settings.folds) == (batch, folds)
    assert settings.repeats == repeats or not folds
    assert steps <= schedule.epochs * batches < steps + schedule.evaluate_every * batches
    assert schedule.epochs % schedule.evaluate_every == 0  # one compiled program for all of it
    between = schedule.evaluate_every * batches
    assert 20 <= between < 20 + batches
    assert schedule.patience >= 1 and schedule.patience * between >= 400


def test_what_is_given_is_taken():
    schedule = settings_for(28, epochs=7, batch_size=9, patience=2).schedule
    assert (schedule.epochs, schedule.batch_size, schedule.patience) == (7, 9, 2)
    assert settings_for(28, split=True).folds == 0
    assert "batch 9, at most 7 epochs" in str(settings_for(28, epochs=7, batch_size=9))


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (28, 141, (0.3, 0, 0.5, 0.95)),
        (999, 1000, (0.3, 0, 0.5, 0.95)),
        (127, 4, (0.1, 0, 0.5, 0.95)),
        (1000, 10_000, (0, 0.3, 0, 0)),
    ],
)
def test_what_regularises(rows, columns, expected):
    ruled = regularisation_for(rows, columns)
    assert ruled == regularisation_for(rows, columns, Config()) == expected
    given = regularisation_for(rows, columns, Config(mixing=0.0, average=0.5))
    assert given == (0.0, *expected[1:3], 0.5)
    assert "average 0.5" in str(given)
