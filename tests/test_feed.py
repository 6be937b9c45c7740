"""Rows from disk are trained on as rows in memory are, and a run may stop within an epoch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from identical import bits, timeless

from experiments import mmimdb
from experiments.common.stopping import StoppedError
from experiments.datasets.mmimdb_sample import sample_file
from experiments.training.checkpoint import Checkpoints
from experiments.training.devices import mesh_of, put_batches
from experiments.training.feed import Resident, feed, order_of_epoch, run_epochs
from experiments.training.schedule import Schedule
from experiments.training.step import FAR, init_state
from experiments.training.train import fit


class Case:
    """A small MM-IMDB: 44 training rows in batches of 8, so five steps an epoch, four and one."""

    def __init__(self, home):
        where = {"data_dir": sample_file(home, 44, 12, 8, seed=1), "cache_dir": home}
        small = {"fusion": "gmu", "features": 8, "hidden": (8, 8), "average": 0.5, **where}
        self.job, memory = (
            mmimdb.job(mmimdb.Config(stream=stream, **small)) for stream in (True, False)
        )
        self.stream, self.split = self.job.dataset.stream, memory.dataset.train
        self.optimiser = optax.adam(1e-2)
        self.whole = self.fit(self.stream)

    def fit(self, train, checkpoints=None, **options):
        what = self.job.task, self.optimiser, train, self.job.dataset.validation
        return fit(*what, Schedule(3, batch_size=8), 0, checkpoints, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("feed"))


def test_from_disk_as_in_memory(case):
    resident = case.fit(case.split)
    for x, y in zip(timeless(case.whole.history), timeless(resident.history), strict=True):
        x["loss"], y["loss"] = x["loss"] or 0, y["loss"] or 0
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), x, y)
    for x, y in zip(*map(jax.tree.leaves, (case.whole.best, resident.best)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


def test_batches_are_spread_over_eight_devices(case):
    rows = case.stream.read(np.arange(32))
    with mesh_of("devices"):
        batches = put_batches(rows, 16)
    image = batches.inputs["image"]
    np.testing.assert_array_equal(image, rows.inputs["image"].reshape(2, 16, -1))
    assert [shard.data.shape for shard in image.addressable_shards] == 8 * [(2, 2, 4096)]


@pytest.mark.parametrize(("asked", "step"), [(1, 4), (2, 5), (3, 9), (5, 14)])
def test_stopped_within_an_epoch_and_resumed_is_the_uninterrupted_run(case, tmp_path, asked, step):
    times, saved = itertools.count(1), Checkpoints(tmp_path, every=1e9)
    with pytest.raises(StoppedError) as stopped:  # asked after every stretch
        case.fit(case.stream, saved, stop=lambda: next(times) >= asked)
    where = f"step {step} is" if step % 5 else f"epoch {step // 5} is"
    assert where in str(stopped.value)
    read = []
    again = case.fit(Counting(case.stream, read), saved)
    assert bits(again.last) == bits(case.whole.last) and bits(again.best) == bits(case.whole.best)
    assert timeless(again.history) == timeless(case.whole.history)
    assert sum(map(len, read)) == 8 * (15 - step)  # not one batch is read a second time


def test_a_save_within_an_epoch_costs_nothing_when_the_run_is_killed(case, tmp_path):
    """Killed without a warning: the newest save, every third time here, is gone on from."""

    class Third(Checkpoints):
        asked = 0

        def due(self):
            self.asked += 1
            return self.asked % 3 == 0

    def killed(epoch, means):
        assert epoch == 0 or set(means()) >= {"loss", "gradient_norm", "bad_steps"}
        if epoch > 2.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.fit(case.stream, Third(tmp_path), progress=killed)
    assert Checkpoints(tmp_path).steps() == [9]
    again = case.fit(case.stream, Checkpoints(tmp_path))
    assert bits(again.last) == bits(case.whole.last)
    assert timeless(again.history) == timeless(case.whole.history)


class Wrapped(mmimdb.mmimdb.Stream):
    """A stream whose batches pass through something first."""

    def __init__(self, stream):
        super().__init__(len(stream), stream.read)


class Counting(Wrapped):
    def __init__(self, stream, read):
        super().__init__(stream)
        self.seen = read

    def read(self, rows):
        if len(rows) % 8 == 0:
            self.seen.append(rows)
        return super().read(rows)


class TestOrder:
    def test_an_epoch_is_a_permutation_of_the_seed_and_the_epoch(self):
        orders = {
            (seed, epoch): np.asarray(order_of_epoch(jax.random.key(seed), epoch, 44))
            for seed in (0, 1)
            for epoch in (0, 1)
        }
        assert all((np.sort(order) == np.arange(44)).all() for order in orders.values())
        assert len({order.tobytes() for order in orders.values()}) == 4

    def test_the_rows_of_a_step_are_the_same_from_disk(self, case):
        """Also where reading begins within an epoch."""
        read = []
        rows = feed(Counting(case.stream, read))
        state = init_state(case.job.task, case.optimiser, rows.examples, 0)
        key = jnp.copy(state.key)
        state = state._replace(step=jnp.int32(3))
        for _ in rows.steps(case.job.task, case.optimiser, state, 8, 3, 7):
            pass
        epochs = [np.asarray(order_of_epoch(key, e, 44))[:40].reshape(5, 8) for e in (0, 1)]
        expected = np.concatenate([epochs[0][3:], epochs[1][:2]])
        assert sorted(map(len, read)) == [8, 8, 16]  # step 3, step 4, steps 5 and 6
        assert sorted(np.concatenate(read)) == sorted(expected.ravel())


class TestBadBatches:
    def run(self, case, change):
        """Two epochs with the rows of the last batch of the first changed."""
        task, optimiser, split = case.job.task, case.optimiser, case.split
        state = init_state(task, optimiser, split.inputs, 0)
        rows = np.asarray(order_of_epoch(state.key, 0, 44))[32:40]
        image = split.inputs["image"].copy()
        image[rows] = change(image[rows])
        data = split._replace(inputs=split.inputs | {"image": image})
        return run_epochs(task, optimiser, state, feed(data).split, 8, 1)

    @pytest.mark.parametrize("factor", [np.nan, np.inf, 1e20, 2 * FAR])
    def test_a_batch_out_of_all_range_changes_nothing(self, case, factor):
        state, seen = self.run(case, lambda x: x * np.float32(factor))
        assert seen["bad"].tolist() == [0, 0, 0, 0, 1] and int(state.bad) == 1
        means = jax.tree.leaves(state.variables.batch_stats)
        assert all(np.isfinite(x).all() and np.abs(x).max() < 100 for x in means)
        usual, _ = self.run(case, lambda x: x)
        assert bits(state.variables) != bits(usual.variables)

    def test_one_within_it_counts(self, case):
        _, seen = self.run(case, lambda x: x * np.float32(FAR / 4))
        assert seen["bad"].tolist() == [0, 0, 0, 0, 0]

    def test_the_first_batch_is_the_measure_and_a_lost_modality_is_none(self, case):
        """Missing values are NaN, which the models of some experiments take."""
        assert isinstance(feed(case.split), Resident)
        state = init_state(case.job.task, case.optimiser, case.split.inputs, 0)
        assert set(state.usual) == {"text", "image"} and not any(map(float, state.usual.values()))
        state, _ = self.run(case, lambda x: x)
        size = np.sqrt(np.mean(case.split.inputs["image"] ** 2))
        assert float(state.usual["image"]) == pytest.approx(size, rel=0.1)
