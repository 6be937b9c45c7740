"""Damaged files: each reader either reads what it is given or says in one line what is wrong.

python -m pytest tests/test_fuzz.py --hypothesis-profile thorough      (12,000 files)

And whole files of a known table, written in many ways: read as that table, or refused.
"""

import json
import pickle
import warnings
from collections import Counter

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments import report
from experiments.common.errors import InputError
from experiments.datasets import features, mmimdb_hdf5, mosi_aligned, mosi_csv, multiomics
from experiments.datasets.mmimdb_raw import read_movies, read_poster
from experiments.datasets.mmimdb_sample import sample_file
from experiments.datasets.mosi import locate
from experiments.datasets.precomputed import read_features
from tests.test_datasets_mosi import write_aligned, write_utterances
from tests.test_datasets_multiomics import write_rosmap

TOKENS = [b"nan", b"inf", b"-1e999", b"1e308", b"\x00", b"\xff\xfe", b",", b'"', b"\n", b"\t", b"{"]
TOKENS += [b"[" * 3000, b"9" * 400, b"../../x", b"null", b"-1", b"0.5", b"\r", b" "]
place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("flip"), place, st.integers(1, 255)),
    st.tuples(st.just("insert"), place, st.sampled_from(TOKENS)),
    st.tuples(st.just("replace"), place, st.sampled_from(TOKENS)),
    st.tuples(st.just("delete"), place, st.integers(1, 200)),
    st.tuples(st.just("repeat"), place, st.integers(1, 200)),
    st.tuples(st.just("cut"), place, st.none()),
)
changes = st.lists(change, min_size=1, max_size=4)


def damaged(whole, changes):
    data = bytearray(whole)
    for kind, where, what in changes:
        at = int(where * len(data))
        if kind == "flip" and data:
            data[at] ^= what
        elif kind == "insert":
            data[at:at] = what
        elif kind == "replace":
            data[at : at + len(what)] = what
        elif kind == "delete":
            del data[at : at + what]
        elif kind == "repeat":
            data[at:at] = data[at : at + what]
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def table_of_features(folder):
    rng = np.random.default_rng(0)
    x = {"a": rng.standard_normal((12, 3)), "b": rng.standard_normal((12, 2, 2))}
    rest = {"labels": np.arange(12) % 2, "mask": np.ones((12, 2)), "split": np.arange(12) % 3}
    path = npz(folder / "data.npz", **x, **rest)
    return path, lambda: features.read([path])


def csv_of_features(folder):
    rows = "".join(f"{i}.5,{i % 3},-1e3\n" for i in range(12))
    (folder / "a.csv").write_text("x,y,z\n" + rows)
    (folder / "labels.csv").write_text("".join(f"{'yes' if i % 2 else 'no'}\n" for i in range(12)))
    return folder / "a.csv", lambda: features.read([folder / "a.csv", folder / "labels.csv"])


def csv_of_labels(folder):
    _, read = csv_of_features(folder)
    return folder / "labels.csv", read


def sparse_features(folder):
    csv_of_features(folder)
    path = folder / "thin.npz"
    scipy.sparse.save_npz(path, scipy.sparse.eye_array(12, 5, format="csr"))
    return path, lambda: features.read([path, folder / "labels.csv"])


def array_of_features(folder):
    csv_of_features(folder)
    np.save(folder / "a.npy", np.ones((12, 2)))
    return folder / "a.npy", lambda: features.read([folder / "a.npy", folder / "labels.csv"])


def omics(folder):
    source = multiomics.Source(multiomics.COHORTS["rosmap"], write_rosmap(folder))
    return folder / "2_tr.csv", lambda: multiomics.read_tables(source, "train")


def utterances(folder):
    files = locate(write_utterances(folder))
    return folder / "transcripts.csv", lambda: mosi_csv.read_part(files, "train")


def sentences(folder):
    path = write_aligned(folder, audio=False) / "train.tsv"
    return path, lambda: mosi_aligned.read_table(path)


def audio(folder):
    labels = {part: np.zeros(2) for part in mosi_aligned.PARTS}
    path = folder / "audio.pickle"
    path.write_bytes(pickle.dumps([np.ones((2, 50, 5)) for _ in labels], protocol=2))
    return path, lambda: mosi_aligned.read_audio(path, labels)


def hdf5(folder):
    path = sample_file(folder, train=3, validation=2, test=2, seed=0)

    def read():
        with mmimdb_hdf5.open_hdf5(path) as file:
            for rows in mmimdb_hdf5.read_layout(file).rows.values():
                list(mmimdb_hdf5.read_rows(file, rows))

    return path, read


def precomputed(folder):
    path = npz(folder / "bert.npz", ids=np.array(["01", "02"]), text=np.ones((2, 4)))
    return path, lambda: read_features(path)


def poster(folder):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "1.jpeg")
    return folder / "1.jpeg", lambda: read_poster(folder / "1.jpeg", (8, 6))


def movies(folder):
    (folder / "dataset").mkdir()
    for name in ("1", "2", "3"):
        movie = {"plot": ["A plot"], "genres": ["Drama"]}
        (folder / "dataset" / f"{name}.json").write_text(json.dumps(movie))
    (folder / "split.json").write_text('{"train": ["1"], "dev": ["2"], "test": ["3"]}')
    return folder / "split.json", lambda: read_movies(folder)


def run_directory(folder):
    about = {"config": {"a": 1}, "command": "python"}
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "results.json").write_text(json.dumps({"test": {"f1": 0.5}, "experiment": "x"}))
    (folder / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n')
    return folder / "results.json", lambda: report.read_run(folder)


READERS = [table_of_features, csv_of_features, csv_of_labels, sparse_features, array_of_features]
READERS += [omics, utterances, sentences, audio]
READERS += [hdf5, precomputed, poster, movies, run_directory]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Every reader's whole file, which it reads, in a folder of its own."""
    found = {}
    for make in READERS:
        folder = tmp_path_factory.mktemp(make.__name__) / "data"
        folder.mkdir()
        path, read = make(folder)
        read()
        found[make.__name__] = path, path.read_bytes(), read
    return found


@pytest.mark.parametrize("reader", [make.__name__ for make in READERS])
def test_a_damaged_file_is_read_or_refused_in_one_line(prepared, reader):
    path, whole, read = prepared[reader]

    @given(changes)
    def check(changes):
        path.write_bytes(damaged(whole, changes))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                read()
        except InputError as error:
            assert str(error).strip()

    check()


# --- CSV files of a known table --------------------------------------------------------------

WORDS = ("NA", "", "?", "nan", "N/A", "null", "-", "None", "#N/A")
IDS = {  # what may stand over the ids, and what they are
    "index": (("",), lambda rng, rows: rng.permutation(900)[:rows].astype(str)),
    "counted": (("", "id"), lambda rng, rows: np.arange(rows).astype(str)),
    "padded": (
        ("", "patient_id"),
        lambda rng, rows: np.char.zfill(rng.permutation(999)[:rows].astype(str), 4),
    ),
    "words": (
        ("", "sample", "code"),
        lambda rng, rows: np.char.add("p", rng.permutation(99)[:rows].astype(str)),
    ),
    "numbers": (("mouse", "id"), lambda rng, rows: rng.permutation(900)[:rows].astype(str)),
    "none": ((), lambda rng, rows: np.arange(rows).astype(str)),
}


class Form:
    """How one file writes its cells."""

    def __init__(self, rng, ids):
        def pick(*options):
            return options[rng.integers(len(options))]

        self.ids = ids
        self.separator = pick(",", ",", ";", "\t")
        self.decimal = pick(".", ",") if self.separator != "," else "."
        self.end = pick("\n", "\r\n")
        self.encoding = pick("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")
        heads = ["names", "names", "accents", "counted", "none"] + (
            ["years"] if ids != "none" else []
        )
        self.header = pick(*heads)
        self.over_ids = pick(*(IDS[ids][0] or ("",)))
        chances = rng.random(4) < (0.3, 0.1, 0.1, 0.2)
        self.quotes, self.trailing, self.comment, self.blank = map(int, chances)
        self.unknown = pick(*WORDS)

    def number(self, value):
        if np.isnan(value):
            return self.unknown
        text = repr(float(value)).removesuffix(".0" if value % 2 else "")
        return text.replace(".", self.decimal)

    def cell(self, text):
        return f'"{text}"' if self.quotes or self.separator in text else text

    def write(self, path, names, columns, ids):
        head = {
            "names": names,
            "accents": [f"é{name}" for name in names],
            "counted": map(str, range(len(names))),
            "years": (str(2001 + i) for i in range(len(names))),
            "none": None,
        }[self.header]
        lines = (
            list(zip(*columns, strict=True))
            if self.ids == "none"
            else list(zip(ids, *columns, strict=True))
        )
        if head is not None:
            lines.insert(0, (*(() if self.ids == "none" else (self.over_ids,)), *head))
        trail = self.separator if self.trailing else ""
        text = [self.separator.join(map(self.cell, line)) + trail for line in lines]
        text = ["# made by hand, in 2020"] * self.comment + text + [""] * (1 + 2 * self.blank)
        path.write_bytes(self.end.join(text).encode(self.encoding))


def known_table(folder, seed):
    """CSV files, and what is in them: {modality: [N, d]} and labels, in the order of labels.csv."""
    rng = np.random.default_rng(seed)
    style, rows = rng.choice(list(IDS)), int(rng.integers(12, 30))
    ids, mixed = IDS[style][1](rng, rows), style != "none"
    one = Form(rng, style)

    def order():
        return rng.permutation(rows) if mixed else np.arange(rows)

    def form():
        return one if rng.random() < 0.6 else Form(rng, style)

    labels, columns = known_labels(rng, rows, by := form())
    lines = order()
    by.write(
        folder / "labels.csv",
        ["label", "two", "three"][: len(columns)],
        [np.array(c)[lines] for c in columns],
        ids[lines],
    )
    expected = {}
    for name in "ab":
        by, kept = form(), order()
        if mixed and rng.random() < 0.5:
            kept = kept[int(rng.integers(4)) :]
        x = np.round(
            rng.standard_normal((rows, rng.integers(1, 5))) * rng.choice([1, 1000]), rng.integers(5)
        )
        x[rng.random(x.shape) < rng.choice([0, 0.1])] = np.nan
        columns = [np.array([by.number(value) for value in column])[kept] for column in x.T]
        if rng.random() < 0.2:
            sex = rng.permutation(np.arange(rows) % 2)
            columns.append(np.array(["f", "m"])[sex][kept])
            x = np.column_stack([x, sex])
        by.write(
            folder / f"{name}.csv", [f"{name}{i}" for i in range(len(columns))], columns, ids[kept]
        )
        expected[name] = np.full(x.shape, np.nan)
        expected[name][kept] = x[kept]
    there = np.any([~np.isnan(x).all(axis=1) for x in expected.values()], axis=0)[lines]
    return {name: x[lines][there] for name, x in expected.items()}, labels[lines][there]


def known_labels(rng, rows, form):
    """Labels as they are to be read, by name or as numbers, and the columns that hold them."""
    classes = rng.permutation(np.arange(rows) % 3)
    kind = rng.choice(["words", "sentences", "integers", "floats", "one-hot"])
    if kind == "floats":
        values = np.round(rng.standard_normal(rows) * 50, 3)
        return np.float32(values), [[form.number(value) for value in values]]
    if kind == "one-hot":
        return classes, list(np.eye(3, dtype=int)[classes].astype(str).T)
    words = {"words": ["cat", "big dog", "eel"], "sentences": ["a, b", "c; d", "e\tf"]}
    if kind == "integers":
        return np.array([f"class {i}" for i in classes]), [classes.astype(str)]
    named = np.array(words[kind])[classes]
    return named, [named]


def read_known(folder, seed):
    """ "right", "refused", or what is different."""
    for path in folder.glob("*.csv"):
        path.unlink()
    expected, labels = known_table(folder, seed)
    try:
        found = features.read([folder / f"{name}.csv" for name in ("a", "b", "labels")])
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    got = found.labels
    if found.kind == "multiclass" and labels.dtype.kind == "U":
        got = np.array(found.classes)[found.labels]
    same = np.array_equal(got, labels) and all(
        np.array_equal(x, found.modalities[name], equal_nan=True) for name, x in expected.items()
    )
    return "right" if same else f"seed {seed} is read differently"


def check_known_tables(folder, seeds, right):
    count = Counter(read_known(folder, seed) for seed in seeds)
    assert set(count) <= {"right", "refused"}, count
    assert count["right"] >= right * len(seeds), count


def test_csv_files_are_read_as_the_known_table_or_refused(tmp_path):
    check_known_tables(tmp_path, range(100), 0.8)


@pytest.mark.slow
def test_more_csv_files_of_known_tables(tmp_path):
    check_known_tables(tmp_path, range(100, 2100), 0.8)
