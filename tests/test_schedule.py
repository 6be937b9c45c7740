"""When training ends, and which epoch is the best one, on histories written down by hand."""

import pytest

from experiments.training.schedule import Schedule

NAN = float("nan")


def history(*scores):
    return [{"epoch": i, "validation": {"auc": score}} for i, score in enumerate(scores)]


def test_the_next_epoch_is_never_beyond_the_last():
    schedule = Schedule(epochs=7, batch_size=1, evaluate_every=3)
    found = [schedule.next_epoch([{"epoch": epoch}]) for epoch in (0, 3, 6)]
    assert found == [3, 6, 7]


@pytest.mark.parametrize(
    ("scores", "best", "smooth", "selected"),
    [
        ((0.5, 0.6), 0, 1, True),
        ((0.5, 0.5), 0, 1, False),  # a tie keeps the earlier one
        ((0.5, 0.9, 0.6), 1, 1, False),
        ((0.5, 0.9, 0.8), 1, 2, True),  # (0.9 + 0.8) / 2 against (0.5 + 0.9) / 2
        ((0.5, 0.9, 0.4), 1, 2, False),
        ((NAN, 0.1), 0, 1, True),  # any score is better than none
        ((0.1, NAN), 0, 1, False),
        ((0.1,), 0, 1, False),  # itself
    ],
)
def test_an_epoch_is_selected_by_the_mean_of_its_last_scores(scores, best, smooth, selected):
    schedule = Schedule(epochs=9, batch_size=1, smooth=smooth)
    assert schedule.selects(history(*scores), best, "auc") is selected


@pytest.mark.parametrize(
    ("scores", "best", "bad", "ending"),
    [
        ((0.5, 0.6), 1, 2, None),
        ((0.5, 0.6), 1, 3, "the last 3 steps were bad"),
        ((0.5, 0.4), 0, 0, None),
        ((0.5, 0.4, 0.3), 0, 0, "no gain on validation since epoch 0, 2 evaluations ago"),
        ((0.5, 0.4, 0.3, 0.2, 0.1), 4, 3, "all 4 epochs are done"),
    ],
)
def test_training_ends_for_one_reason(scores, best, bad, ending):
    schedule = Schedule(epochs=4, batch_size=1, patience=2, bad_steps=3)
    found = schedule.ending(history(*scores), best, bad)
    assert found is None if ending is None else found.startswith(ending)
