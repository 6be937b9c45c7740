"""The loaders of CMU-MOSI, by utterances and aligned, and pickles from outside."""

import collections
import io
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.datasets import Split, mosi, mosi_aligned
from experiments.datasets.download import git_blob
from experiments.datasets.pickles import read_pickle

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def shared(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real data {name} is not in {SHARED}")
    return SHARED / name


def quoted(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows))


def write_utterances(folder, train=(3, 5, 4), test=(2, 3), nested=False):
    """Made-up files; recordings have these many utterances and the features tell the class."""
    rng, names, rows = np.random.default_rng(0), [], {"train": [], "test": []}
    for part, sizes in (("train", train), ("test", test)):
        for i, size in enumerate(sizes):
            rows[part] += [f"{part}_{i}_{k + 1}" for k in range(size)]
        rng.shuffle(rows[part])
        names += rows[part]
    names.sort()
    labels = {name: i % 2 for i, name in enumerate(names)}
    quoted(folder / "transcripts.csv", [(n, "A WORD, OR TWO", 7, labels[n]) for n in names])
    for part, chosen in rows.items():
        quoted(folder / f"text_{part}.csv", [(names.index(n), 0.5, "x") for n in chosen])
        for modality, width in mosi.WIDTHS.items():
            x = rng.standard_normal((len(chosen), width))
            x[:, :20] += [[2 * labels[n] - 1] for n in chosen]
            inner = folder / modality if nested else folder
            table = [(*row, labels[n]) for row, n in zip(x.tolist(), chosen, strict=True)]
            quoted(inner / f"{modality}_{part}0.csv", table)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_utterances(tmp_path_factory.mktemp("mosi") / "data")


@pytest.fixture
def copy(small, tmp_path):
    return shutil.copytree(small, tmp_path / "copy")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def utterances(places, width=2):
    """Utterances at the places (recording, position) whose features say where they are."""
    x = np.array([[ord(r), p] for r, p in places], np.float32)[:, :width]
    recordings, positions = zip(*places, strict=True)
    rows = Split({"x": x}, np.arange(len(places), dtype=np.int32) % 2)
    return mosi.Utterances(rows, np.array(recordings, object), np.array(positions))


class TestUtterances:
    def test_real(self, cache):
        folder = shared("mosi_bclstm")
        train, test = mosi.load(folder, cache)
        for part, name, rows, recordings in ((train, "train", 1447, 62), (test, "test", 752, 31)):
            assert len(set(part.recordings)) == recordings
            assert part.rows.labels.shape == (rows,) and part.rows.labels.dtype == np.int32
            for modality, width in (("text", 100), ("audio", 73), ("video", 100)):
                text = (folder / f"{modality}_{name}0.csv").read_text().replace('"', "")
                table = np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float64)
                got = part.rows.inputs[modality]
                assert got.shape == (rows, width) and got.dtype == np.float32
                np.testing.assert_array_equal(got, table[:, :-1].astype(np.float32))
                np.testing.assert_array_equal(part.rows.labels, table[:, -1])
        assert not set(train.recordings) & set(test.recordings)
        # Row 1 of train is line 40 of the transcripts (the first column counts from 0).
        line = (folder / "transcripts.csv").read_text().splitlines()[39]
        assert line.startswith(f'"{train.recordings[0]}_{train.positions[0]}"')

    def test_checksums_are_those_of_the_published_files(self):
        folder = shared("mosi_bclstm")
        for remote in mosi.remotes():
            path = folder / remote.name
            assert (path.stat().st_size, git_blob(path)) == (remote.size, remote.git_blob)

    def test_flat_and_nested_folders_are_the_same_data(self, small, tmp_path, cache):
        nested = write_utterances(tmp_path / "nested", nested=True)
        for a, b in zip(mosi.load(small, cache), mosi.load(nested, cache), strict=True):
            np.testing.assert_array_equal(a.rows.inputs["video"], b.rows.inputs["video"])
            assert a.recordings.tolist() == b.recordings.tolist()
        assert len(list(cache.glob("mosi/*"))) == 1, "the same content is prepared once"

    def test_downloads(self, small, cache, monkeypatch):
        def fetch(remote, folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(small / remote.name, folder)

        monkeypatch.setattr(mosi, "fetch", fetch)
        assert len(mosi.load(None, cache, download=True)[0].positions) == 12
        assert len(mosi.load(None, cache)[1].positions) == 5


def replace(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def first_cell(path, new):
    text = path.read_text()
    path.write_text(f'"{new}"' + text[text.index(",") :])


def last_cell(path, new):
    """Of the first line."""
    line, rest = path.read_text().split("\n", 1)
    path.write_text(line[: line.rindex(",") + 1] + f'"{new}"\n' + rest)


def other_label(path):
    last_cell(path, 1 - int(path.read_text().split("\n", 1)[0][-2]))


def same_label(folder):
    for path in folder.glob("*.csv"):
        if path.name not in ("text_train.csv", "text_test.csv"):
            path.write_text(path.read_text().replace(',"0"\n', ',"1"\n'))


def cut(path):
    path.write_text(path.read_text().rstrip("\n").rsplit("\n", 1)[0] + "\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "video_test0.csv").unlink(), "has no video/video_test0.csv of CMU-MOSI"),
        (lambda d: (d / "transcripts.csv").unlink(), "has no transcripts.csv of CMU-MOSI; ask"),
        (lambda d: first_cell(d / "audio_train0.csv", "nan"), "line 1, column 1 is NaN"),
        (lambda d: first_cell(d / "audio_train0.csv", "a"), "audio_train0.csv is not a table"),
        (lambda d: first_cell(d / "text_test0.csv", '1","2'), "line 1 has 102 columns; expected 1"),
        (lambda d: last_cell(d / "video_train0.csv", "2"), "line 1 ends with 2; expected a label"),
        (lambda d: last_cell(d / "video_train0.csv", "0.5"), "line 1 ends with 0.5; expected a"),
        (lambda d: other_label(d / "audio_test0.csv"), "another label in row 1 than"),
        (lambda d: cut(d / "audio_test0.csv"), "has 4 rows; expected 5, as"),
        (lambda d: cut(d / "text_train.csv"), "has 11 rows; expected 12, as"),
        (lambda d: (d / "text_train0.csv").write_text("\n"), "text_train0.csv is empty"),
        (lambda d: (d / "text_train0.csv").write_bytes(b"\xff\xfe"), "cannot be read as a CSV"),
        (lambda d: first_cell(d / "text_train.csv", "17"), "'17'; expected the number of a line"),
        (lambda d: first_cell(d / "text_train.csv", "-1"), "'-1'; expected the number of a line"),
        (lambda d: first_cell(d / "text_test.csv", "1.5"), "'1.5'; expected the number of a line"),
        (lambda d: last_cell(d / "transcripts.csv", "positive"), "line 1 is not of the form"),
        (lambda d: replace(d / "transcripts.csv", "train_0_1", "train"), "'train' is no identifi"),
        (lambda d: replace(d / "transcripts.csv", "train_0_1", "a_b"), "'a_b' is no identifier"),
        (lambda d: replace(d / "transcripts.csv", "train_0_2", "train_0_1"), "is there twice"),
        (lambda d: replace(d / "transcripts.csv", "train_0", "test_0"), "there twice|in both"),
        (lambda d: replace(d / "transcripts.csv", "test_1_1", "train_1_9"), "expected no record"),
        (same_label, "all 12 training rows have the same label"),
    ],
)  # fmt: skip
def test_bad_utterances(copy, cache, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message) as caught:
        mosi.load(copy, cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*/*")), "a failed build left something behind"


class TestHoldOut:
    def test_whole_recordings(self):
        train = utterances([(r, p + 1) for r in "abcdefghij" for p in range(5)])
        for seed in range(5):
            rest, validation = mosi.hold_out(train, 0.2, seed)
            assert len(set(validation.recordings)) == 2
            assert not set(rest.recordings) & set(validation.recordings)
            for part in (rest, validation):  # a row's features, recording and position stay one row
                where = [(ord(r), p) for r, p in zip(part.recordings, part.positions, strict=True)]
                np.testing.assert_array_equal(part.rows.inputs["x"], where)
            assert len(rest.positions) + len(validation.positions) == 50
            again = mosi.hold_out(train, 0.2, seed)[1]
            assert again.recordings.tolist() == validation.recordings.tolist()
        chosen = {frozenset(mosi.hold_out(train, 0.2, s)[1].recordings) for s in range(5)}
        assert len(chosen) > 1, "the seed chooses"

    def test_one_recording_cannot_be_shared_out(self):
        with pytest.raises(InputError, match=r"cannot hold out 0.2 of 1 recordings"):
            mosi.hold_out(utterances([("a", 1), ("a", 2)]), 0.2, 0)


class TestWindows:
    @pytest.mark.parametrize("context", [0, 1, 3])
    def test_equals_the_definition(self, context):
        places = [("b", 2), ("a", 1), ("b", 1), ("a", 2), ("b", 5), ("b", 3), ("c", 7)]
        part = utterances(places)
        got = mosi.windows(part, context)
        np.testing.assert_array_equal(got.labels, part.rows.labels)
        assert got.inputs["x"].shape == (7, 2 * context + 1, 2)
        for row, (recording, position) in enumerate(places):
            for column, step in enumerate(range(-context, context + 1)):
                there = (recording, position + step) in places
                expected = [ord(recording), position + step] if there else [np.nan, np.nan]
                np.testing.assert_array_equal(got.inputs["x"][row, column], expected)

    def test_no_window_reaches_into_another_part(self, small, cache):
        train, _ = mosi.load(small, cache)
        rest, validation = mosi.hold_out(train, 0.3, 0)
        own = {tuple(x) for x in validation.rows.inputs["text"]}
        seen = mosi.windows(validation, 5).inputs["text"].reshape(-1, 100)
        assert {tuple(x) for x in seen if not np.isnan(x).any()} == own
        assert not own & {tuple(x) for x in rest.rows.inputs["text"]}


# --- aligned -----------------------------------------------------------------------------------

ROWS = {"train": 6, "dev": 3, "test": 4}


def write_aligned(folder, audio=True, nested=False, rows=ROWS):
    text, sound = (folder / "text", folder / "audio") if nested else (folder, folder)
    for place in (text, sound):
        place.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, n in rows.items():
        labels = np.arange(n) % 7 - 3
        words = {-1: "BAD BAD", 0: "SO SO", 1: "GOOD"}
        lines = [f"THE MOVIE WAS {words[int(np.sign(y))]} REALLY\t{float(y)}" for y in labels]
        (text / f"{name}.tsv").write_bytes("\r\n".join(["text\tlabel", *lines, ""]).encode())
    if audio:
        arrays = [rng.standard_normal((n, 50, 5)) for n in rows.values()]
        (sound / mosi_aligned.AUDIO).write_bytes(pickle.dumps(arrays))
    return folder


@pytest.fixture
def aligned(tmp_path):
    return write_aligned(tmp_path / "aligned")


class TestAligned:
    def test_real_text(self):
        folder = shared("mosi_cmbert_text")
        data = mosi_aligned.load(folder)
        sizes = [len(part.labels) for part in (data.train, data.validation, data.test)]
        assert sizes == [1284, 229, 686] and list(data.train.inputs) == ["text"]
        assert data.validation.inputs["text"][1].startswith("BUT UH IT WAS WORTH THE FREE MOVIE")
        assert data.validation.labels[1] == np.float32(1.6)
        assert all(np.abs(part.labels).max() == 3 for part in (data.train, data.test))

    def test_checksums_are_those_of_the_published_files(self):
        folder = shared("mosi_cmbert_text")
        for remote in mosi_aligned.remotes():
            path = folder / remote.name
            assert (path.stat().st_size, git_blob(path)) == (remote.size, remote.git_blob)

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
    def test_audio(self, tmp_path, nested, protocol):
        folder = write_aligned(tmp_path, nested=nested)
        (path,) = folder.glob(f"**/{mosi_aligned.AUDIO}")
        arrays = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps(tuple(arrays), protocol))
        data = mosi_aligned.load(folder)
        for part, expected in zip((data.train, data.validation, data.test), arrays, strict=True):
            assert part.inputs["audio"].dtype == np.float32
            np.testing.assert_array_equal(part.inputs["audio"], expected.astype(np.float32))

    def test_states_take_the_place_of_the_text(self, aligned, tmp_path):
        states = {
            part: np.full((ROWS[name], 50, 8), i, np.float64)
            for i, (part, name) in enumerate(mosi_aligned.PARTS.items())
        }
        np.savez(tmp_path / "states.npz", **states)
        data = mosi_aligned.load(aligned, text_npz=tmp_path / "states.npz")
        np.testing.assert_array_equal(data.validation.inputs["text"], states["validation"])
        assert set(data.test.inputs) == {"text", "audio"}

    def test_downloads_the_text(self, tmp_path, monkeypatch):
        source = write_aligned(tmp_path / "source", audio=False)

        def fetch(remote, folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / remote.name, folder)

        monkeypatch.setattr(mosi_aligned, "fetch", fetch)
        assert len(mosi_aligned.load(None, tmp_path / "cache", True).train.labels) == 6


def arrays(*shapes):
    return [np.zeros(shape, np.float32) for shape in shapes]


GOOD = ((6, 50, 5), (3, 50, 5), (4, 50, 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (dict.fromkeys("abc", 1), "holds a dict of 3; expected a sequence of three arrays"),
        (np.zeros((3, 2)), "holds a ndarray of 3; expected a sequence of three arrays"),
        (7, "holds a int; expected a sequence of three arrays"),
        (arrays(*GOOD[:2]), "holds a list of 2; expected a sequence"),
        (arrays((5, 50, 5), *GOOD[1:]), r"train part has shape \(5, 50, 5\); expected \(6, 50, 5"),
        (arrays(GOOD[0], GOOD[2], GOOD[1]), r"validation part .* a row for each of dev.tsv"),
        (arrays(GOOD[0], GOOD[1], (4, 50, 74)), r"test part has shape \(4, 50, 74\)"),
        (["a", "b", "c"], "train part is no array of numbers"),
        ([[[1, 2], [3]], 1, 2], "train part is no array of numbers"),
        ([np.full(shape, np.nan) for shape in GOOD], "row 1 of the train part has no number"),
    ],
)
def test_bad_audio(aligned, content, message):
    (aligned / mosi_aligned.AUDIO).write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message) as caught:
        mosi_aligned.load(aligned)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "dev.tsv").unlink(), "dev.tsv is not there; ask for the download"),
        (lambda d: (d / "dev.tsv").write_text(""), "starts with ''; expected the header"),
        (lambda d: (d / "dev.tsv").write_text("a\tb\nx\t1\n"), r"starts with 'a\\tb'; expected"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\n"), "no rows below its header"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\nx\n"), "line 2 has 1 cells"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\nx\ty\t1\n"), "line 2 has 3 cells"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\nx\ty\n"), "line 2 ends with 'y'"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\nx\t3.5\n"), "a label from -3 to 3"),
        (lambda d: (d / "dev.tsv").write_text("text\tlabel\nx\tnan\n"), "a label from -3 to 3"),
        (lambda d: (d / "dev.tsv").write_bytes(b"\xff\xfe\x00"), "cannot be read as text"),
        (lambda d: (d / mosi_aligned.AUDIO).write_bytes(b""), "cannot be read as a pickle"),
        (lambda d: (d / mosi_aligned.AUDIO).write_bytes(b"hello"), "cannot be read as a pickle"),
    ],
)  # fmt: skip
def test_bad_aligned_files(aligned, damage, message):
    damage(aligned)
    with pytest.raises(InputError, match=message):
        mosi_aligned.load(aligned)


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"train": np.ones((6, 50, 8))}, "holds train; expected train, validation, test"),
        ({"train": (6, 50, 8), "validation": (3, 50, 7), "test": (4, 50, 8)}, "validation part"),
        ({"train": (6, 49, 8), "validation": (3, 49, 8), "test": (4, 49, 8)}, "train part"),
        ({"train": (6, 8), "validation": (3, 8), "test": (4, 8)}, r"shape \(6, 8\); expected \(6,"),
        ({"train": (6, 50, 0), "validation": (3, 50, 0), "test": (4, 50, 0)}, "train part"),
    ],
)
def test_bad_states(aligned, tmp_path, states, message):
    made = {name: np.ones(x) if isinstance(x, tuple) else x for name, x in states.items()}
    np.savez(tmp_path / "states.npz", **made)
    with pytest.raises(InputError, match=message):
        mosi_aligned.load(aligned, text_npz=tmp_path / "states.npz")


# --- pickles from outside ----------------------------------------------------------------------


class Evil:
    """Unpickled by pickle.load, it makes a folder."""

    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


class TestPickles:
    @pytest.mark.parametrize("protocol", range(6))
    def test_arrays_in_containers(self, tmp_path, protocol):
        array = np.arange(6.0).reshape(2, 3)
        content = {"a": [array, (array.T, np.float32([1])), None, True, 1.5, "x"], "b": b"\xff"}
        (tmp_path / "p").write_bytes(pickle.dumps(content, protocol))
        got = read_pickle(tmp_path / "p")
        np.testing.assert_array_equal(got["a"][1][0], array.T)
        np.testing.assert_array_equal(got["a"][0], array)
        assert got["a"][2:] == [None, True, 1.5, "x"] and got["b"] == b"\xff"

    @pytest.mark.parametrize("protocol", [0, 2, 4])
    @pytest.mark.parametrize("wrapped", [False, True])
    def test_calls_are_refused_and_not_made(self, tmp_path, protocol, wrapped):
        path, made = tmp_path / "p", tmp_path / "made"
        code = f"__import__('os').mkdir({str(made)!r})"
        for evil in (Evil(os.mkdir, str(made)), Evil(eval, code)):
            content = [np.zeros(3), evil]
            if wrapped:  # inside an array of objects
                content = np.array(content, object)
            path.write_bytes(pickle.dumps(content, protocol))
            with pytest.raises(InputError, match=r"asks for .*(mkdir|eval), which could do anyth"):
                read_pickle(path)
            assert not made.exists()
        pickle.loads(path.read_bytes())
        assert made.is_dir(), "plain pickle.load would have made it"

    @pytest.mark.parametrize(
        "content",
        [
            collections.OrderedDict(a=1),
            np.float64(1),
            Path("x"),
            Evil(np.load, "x"),
            Evil(getattr, "x", "y"),
            np.ma.zeros(2),
        ],
    )
    def test_whatever_else_is_refused(self, tmp_path, content):
        (tmp_path / "p").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"asks for .*expected a pickle of NumPy arrays"):
            read_pickle(tmp_path / "p")

    def test_other_codecs_are_refused(self, tmp_path):
        (tmp_path / "p").write_bytes(b"c_codecs\nencode\n(Vx\nVzip\ntR.")
        with pytest.raises(InputError, match="asks for the codec 'zip'"):
            read_pickle(tmp_path / "p")

    def test_damage(self, tmp_path):
        whole = pickle.dumps([np.arange(50.0)])
        path = tmp_path / "p"
        for end in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:end])
            with pytest.raises(InputError, match="cannot be read as a pickle"):
                read_pickle(path)
        with pytest.raises(InputError, match="cannot be read"):
            read_pickle(tmp_path / "nowhere")
