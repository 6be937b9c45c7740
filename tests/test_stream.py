"""Rows that stay on disk: the right ones in any order, read ahead by so much, and clean ends."""

import gc
import itertools
import threading
import time
import tracemalloc
import weakref

import h5py
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.datasets import mmimdb, mmimdb_hdf5, prepared
from experiments.datasets.mmimdb_sample import sample_file
from experiments.datasets.stream import Stream

ROWS = 60


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The HDF5 file, and the cache directory where it is prepared."""
    home = tmp_path_factory.mktemp("stream")
    file = sample_file(home, ROWS, 10, 10, seed=1)
    mmimdb.load(file, home, stream=True)
    return file, home


@pytest.fixture(scope="module")
def truth(source):
    """The training rows as the HDF5 file has them."""
    with h5py.File(source[0]) as file:
        keys = {"text": "features", "image": "vgg_features", "labels": "genres"}
        return {name: file[key][:ROWS] for name, key in keys.items()}


@pytest.fixture
def stream(source):
    return mmimdb.load(*source, stream=True).stream


def check(batch, truth, rows):
    assert batch.labels.dtype == np.float32
    np.testing.assert_array_equal(batch.labels, truth["labels"][rows])
    for name in ("text", "image"):
        assert batch.inputs[name].dtype == np.float32
        np.testing.assert_array_equal(batch.inputs[name], truth[name][rows])


def workers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


class TestRows:
    def test_as_read_into_memory(self, source, stream, truth):
        memory = mmimdb.load(*source)
        everything = stream.read(np.arange(ROWS))
        check(everything, truth, slice(None))
        check(memory.train, truth, slice(None))
        np.testing.assert_array_equal(stream.labels(), memory.train.labels)
        assert len(stream) == ROWS and memory.stream is None

    def test_as_decoded_by_tfds(self, source):
        (home,) = source[1].glob("mmimdb_features/*")
        builder = prepared.tfds.builder_from_directory(home)
        ours, theirs = prepared.Examples(builder, "train"), builder.as_data_source("train")
        rows = [59, 0, 16, 0]
        for got, example in zip(ours.__getitems__(rows), theirs.__getitems__(rows), strict=True):
            assert got.pop("id") == example.pop("id").decode()
            assert set(got) == set(example) == {"text", "image", "genres"}
            for name, value in got.items():
                assert value.dtype == example[name].dtype
                np.testing.assert_array_equal(value, example[name])

    def test_rest_of_the_data_set(self, source, truth):
        streamed, memory = mmimdb.load(*source, stream=True), mmimdb.load(*source)
        check(streamed.train, truth, [0, 1])
        for split in ("validation", "test"):
            one, two = getattr(streamed, split), getattr(memory, split)
            np.testing.assert_array_equal(one.labels, two.labels)
            np.testing.assert_array_equal(one.inputs["image"], two.inputs["image"])
        assert streamed[:3] == memory[:3]

    @pytest.mark.parametrize("rows", [[-1], [0, ROWS], [], [[1]]])
    def test_no_such_rows(self, stream, rows):
        with pytest.raises(ValueError, match=r"expected rows from 0 to 59 as an array \[B\], not"):
            stream.read(np.array(rows, int))


class TestBatches:
    @pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (4, 2), (50, 3)])
    def test_any_order_with_rows_again(self, stream, truth, ahead, threads):
        orders = np.random.default_rng(0).integers(0, ROWS, (12, 7))
        batches = list(stream.batches(orders, ahead, threads))
        assert len(batches) == len(orders)
        for batch, rows in zip(batches, orders, strict=True):
            check(batch, truth, rows)
        assert not workers()

    def test_from_the_middle(self, stream, truth):
        orders = np.random.default_rng(1).permutation(ROWS).reshape(10, 6)
        for done in (3, 9):
            for batch, rows in zip(stream.batches(orders[done:]), orders[done:], strict=True):
                check(batch, truth, rows)
        assert list(stream.batches(orders[10:])) == []

    def test_two_at_once(self, stream, truth):
        orders = np.arange(ROWS).reshape(6, 10)
        both = zip(stream.batches(orders), stream.batches(orders[::-1]), strict=True)
        for i, (one, two) in enumerate(both):
            check(one, truth, orders[i])
            check(two, truth, orders[5 - i])

    @pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (3, 2)])
    def test_never_more_than_ahead_and_one(self, stream, ahead, threads):
        made, most = [], []

        def read_rows(rows):
            split = stream.read(rows)
            made.append(weakref.ref(split.labels))
            most.append(sum(ref() is not None for ref in made))
            return split

        watched = Stream(ROWS, read_rows)
        batches = watched.batches(np.arange(ROWS).reshape(20, 3), ahead, threads)
        for got in range(1, 21):
            batch = next(batches)
            until = time.monotonic() + 30  # the caller works so long that all there will be is read
            while len(made) < min(got + ahead, 20) and time.monotonic() < until:
                time.sleep(0.001)
            time.sleep(0.002)  # one too many would come now
            assert len(made) == min(got + ahead, 20)
            assert sum(ref() is not None for ref in made) == min(ahead, 20 - got) + 1
            del batch  # which nothing else holds
            assert sum(ref() is not None for ref in made) == min(ahead, 20 - got)
        assert next(batches, None) is None and max(most) == ahead + 1

    def test_orders_are_asked_for_when_needed(self, stream):
        asked = []

        def orders():
            for row in itertools.count():
                asked.append(row)
                yield np.array([row % ROWS])

        batches = stream.batches(orders(), ahead=3)
        for got in range(1, 6):
            next(batches)
            assert len(asked) == got + 3
        batches.close()
        assert not workers()

    def test_nothing_ahead(self, stream):
        with pytest.raises(ValueError, match="ahead is 0; expected 1 or more"):
            next(stream.batches([np.arange(2)], ahead=0))


class TestEnds:
    def test_break_and_exception_end_the_threads(self, stream):
        orders = np.arange(ROWS).reshape(30, 2)
        for _ in stream.batches(orders):
            assert workers()
            break
        gc.collect()
        assert not workers()
        batches = stream.batches(orders)
        with pytest.raises(ZeroDivisionError):
            for _ in batches:
                _ = 1 / 0
        batches.close()
        assert not workers()

    def test_error_comes_in_its_place(self, stream, truth):
        orders = [np.array([0, 1]), np.array([2]), np.array([ROWS]), np.array([3])]
        batches = stream.batches(orders, ahead=4)
        check(next(batches), truth, [0, 1])
        check(next(batches), truth, [2])
        with pytest.raises(ValueError, match="expected rows from 0 to 59"):
            next(batches)
        assert not workers() and next(batches, None) is None

    def test_error_of_the_orders(self, stream):
        def orders():
            yield np.array([0])
            raise OSError("no more")

        with pytest.raises(OSError, match="no more"):
            list(stream.batches(orders()))
        assert not workers()

    @pytest.mark.parametrize("harm", ["changed", "cut short"])
    def test_damage_while_reading(self, source, tmp_path, truth, harm):
        stream = mmimdb.load(source[0], tmp_path, stream=True).stream
        (path,) = tmp_path.glob("mmimdb_features/*/*train*")
        content = bytearray(path.read_bytes())
        middle = len(content) // 2  # in row 29 or so
        content[middle : middle + 100] = bytes(100)
        path.write_bytes(content if harm == "changed" else content[:middle])
        batches = stream.batches(np.arange(ROWS).reshape(15, 4))
        for step in range(6):
            check(next(batches), truth, slice(4 * step, 4 * step + 4))
        with pytest.raises(InputError, match=r"cannot be read any more .*delete it, and") as caught:
            list(batches)
        message = str(caught.value)
        assert str(path.parent) in message and "\n" not in message and not workers()
        check(mmimdb.load(source[0], tmp_path).train, truth, slice(None))  # prepared again

    def test_no_row_is_wrong_where_the_file_is_cut(self, source, tmp_path, truth):
        stream = mmimdb.load(source[0], tmp_path, stream=True).stream
        (path,) = tmp_path.glob("mmimdb_features/*/*train*")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        read = 0
        for row in range(ROWS):
            try:
                check(stream.read(np.array([row])), truth, [row])
                read += 1
            except InputError:
                pass
        assert 20 < read < 40


class TestRefusals:
    def test_features_computed_elsewhere(self, source, tmp_path):
        with pytest.raises(InputError, match=r"--stream with --features-npz: .*out$"):
            mmimdb.load(*source, features_npz=tmp_path / "any.npz", stream=True)

    def test_raw(self, tmp_path):
        (tmp_path / "split.json").write_text("{}")
        with pytest.raises(InputError, match=r"--stream with raw posters and plots: .*out$"):
            mmimdb.load(tmp_path, tmp_path / "cache", stream=True)
        with pytest.raises(InputError, match=r"--stream with raw posters and plots: .*out$"):
            mmimdb.load(variant="raw", download=True, stream=True)


def test_memory_is_that_of_some_rows(tmp_path, monkeypatch):
    """Writing a sample, preparing it and an epoch of it hold a small part of the rows."""
    monkeypatch.setattr("experiments.datasets.mmimdb_sample._BLOCK", 24)
    monkeypatch.setattr(mmimdb_hdf5, "_CHUNK", 12)
    rows, size = 600, 600 * 4 * (300 + 4096)
    tracemalloc.start()
    try:
        file = sample_file(tmp_path, rows, 4, 4)
        stream = mmimdb.load(file, tmp_path, stream=True).stream
        orders = np.random.default_rng(0).permutation(rows).reshape(60, 10)
        assert sum(len(batch.labels) for batch in stream.batches(orders)) == rows
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size / 3, f"{peak / 2**20:.1f} MiB for rows of {size / 2**20:.1f} MiB"
