"""Cross-validation, against a `fit` of each fold by itself."""

import jax
import numpy as np
import pytest
from identical import bits, timeless
from test_train import Deq

from experiments.common.stopping import StoppedError
from experiments.datasets.preprocess import folds, take
from experiments.training.checkpoint import Checkpoints
from experiments.training.folds import cross_validate
from experiments.training.schedule import Schedule
from experiments.training.train import fit

pytestmark = pytest.mark.slow
SCHEDULE = Schedule(epochs=4, batch_size=5, evaluate_every=2)


@pytest.fixture(scope="module")
def deq():
    return Deq()


@pytest.fixture(scope="module")
def parts(deq):
    return folds(deq.train.labels.astype(int), None, 3, 1, 0)


@pytest.fixture(scope="module")
def whole(deq, parts):
    return cross_validate(deq.task, deq.optimiser, deq.train, parts, SCHEDULE, seed=3)


def test_each_fold_is_trained_as_it_would_be_alone(deq, parts, whole):
    """22 rows in folds of 8, 7 and 7: the larger training parts leave a row out."""
    assert [len(learned) for learned, _ in parts] == [14, 15, 15]
    histories = []
    rng = np.random.default_rng(3)
    for fold, (learned, held_out) in enumerate(parts):
        rows = take(deq.train, np.sort(rng.permutation(learned)[:14])), take(deq.train, held_out)
        alone = fit(deq.task, deq.optimiser, *rows, SCHEDULE, seed=3 + fold)
        histories.append(alone.history)
        for got, expected in zip(
            jax.tree.leaves(whole.last.variables),
            jax.tree.leaves(alone.last.variables),
            strict=True,
        ):
            np.testing.assert_allclose(got[fold], expected, rtol=1e-3, atol=1e-4)
    for row, *of_each in zip(whole.history, *histories, strict=True):
        assert row["epoch"] == of_each[0]["epoch"]
        if row["loss"] is not None:
            losses = [other["loss"] for other in of_each]
            assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        held_out = [len(rows) for _, rows in parts]  # together: each row counts as much
        losses = [other["validation_loss"] for other in of_each]
        assert row["validation_loss"] == pytest.approx(
            np.average(losses, weights=held_out), rel=1e-3
        )
        scores = [other["validation"]["accuracy"] for other in of_each]
        assert row["validation"]["accuracy"] == pytest.approx(np.average(scores, weights=held_out))
    assert whole.best_epoch == SCHEDULE.best_epoch(whole.history, "accuracy") > 0


def test_a_stopped_one_goes_on_bit_for_bit(deq, parts, whole, tmp_path):
    def train(stop):
        saved = Checkpoints(tmp_path / "checkpoints")
        how = parts, SCHEDULE, 3, saved
        return cross_validate(deq.task, deq.optimiser, deq.train, *how, stop=stop)

    with pytest.raises(StoppedError):
        train(lambda: True)
    resumed = train(lambda: False)
    assert bits(resumed.last) == bits(whole.last)
    assert timeless(resumed.history) == timeless(whole.history)
