"""Damaged files: each reader either reads what it is given or says in one line what is wrong.

python -m pytest tests/test_fuzz.py --hypothesis-profile thorough      (12,000 files)
"""

import json
import pickle
import warnings

import numpy as np
import pytest
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


READERS = [table_of_features, csv_of_features, csv_of_labels, omics, utterances, sentences, audio]
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
