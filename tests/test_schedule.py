"""When training ends, and which epoch is the best one, on histories written down by hand."""

import pytest

from experiments.training.schedule import Schedule

NAN = float("nan")


def history(*scores, losses=()):
    losses = losses or [1.0] * len(scores)
    return [
        {"epoch": i, "validation": {"auc": score}, "validation_loss": loss}
        for i, (score, loss) in enumerate(zip(scores, losses, strict=True))
    ]


def test_the_next_epoch_is_never_beyond_the_last():
    schedule = Schedule(epochs=7, batch_size=1, evaluate_every=3)
    found = [schedule.next_epoch([{"epoch": epoch}]) for epoch in (0, 3, 6)]
    assert found == [3, 6, 7]


@pytest.mark.parametrize(
    ("scores", "losses", "smooth", "best"),
    [
        ((0.5, 0.6), (), 1, 1),
        ((0.9, 0.6, 0.5), (), 1, 1),  # epoch 0, the untrained weights, is no result
        ((0.9,), (), 1, 0),  # while there is no other
        ((0.1, 0.5, 0.5), (), 1, 1),  # a tie of score and loss keeps the earlier one
        ((0.1, 0.5, 0.5, 0.5), (9, 3, 1, 2), 1, 2),  # of equal scores the smallest loss
        ((0.1, 0.6, 0.5), (9, 3, 1), 1, 1),
        ((0.5, 0.9, 0.4, 0.8), (), 2, 1),  # (0.5 + 0.9) / 2, then 0.65 and 0.6
        ((0.5, 0.9, 0.8), (), 2, 2),  # (0.9 + 0.8) / 2 against (0.5 + 0.9) / 2
        ((NAN, NAN, 0.1), (), 1, 2),  # any score is better than none
        ((0.1, 0.1, NAN), (), 1, 1),
        ((0.9, NAN, NAN, NAN), (9, 3, 2, 4), 1, 2),  # undefined scores: by the loss alone
    ],
)
def test_an_epoch_is_selected_by_score_then_loss(scores, losses, smooth, best):
    schedule = Schedule(epochs=9, batch_size=1, smooth=smooth)
    assert schedule.best_epoch(history(*scores, losses=losses), "auc") == best


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
