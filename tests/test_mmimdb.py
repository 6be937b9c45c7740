"""``python -m experiments.mmimdb``: both forms of the data, every fusion, bad input."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from experiments import mmimdb
from experiments.datasets import mmimdb_hdf5 as hdf5
from experiments.datasets.mmimdb_sample import GENRE_NAMES, sample_file
from experiments.models.encoders import MaxoutMLP, PlotEncoder, PosterCNN

ROOT = Path(__file__).resolve().parents[1]
FUSIONS = ("deq", "weight_tied", "concat", "gmu", "lmf", "attention", "text")  # sum: below
TINY = ("--features", "16", "--hidden", "16", "16", "--epochs", "1", "--cache-dir")


def write_raw(folder):
    """Plots and posters of 69 movies; the test plots share a word that train does not have."""
    rng = np.random.default_rng(0)
    (folder / "dataset").mkdir(parents=True)
    ids = [f"{i:07d}" for i in range(69)]
    for i, name in enumerate(ids):
        plot = f"A {GENRE_NAMES[i % 23].lower()} in winter" + " unseen" * (i >= 53)
        movie = {"plot": [plot, "short"], "genres": [GENRE_NAMES[i % 23], "Drama"]}
        (folder / "dataset" / f"{name}.json").write_text(json.dumps(movie))
        pixels = rng.integers(0, 256, (30, 20, 3), np.uint8)
        form = ("JPEG", "PNG")[i % 2]
        with (folder / "dataset" / f"{name}.jpeg").open("wb") as file:
            Image.fromarray(pixels).save(file, form)
    split = {"train": ids[:37], "dev": ids[37:53], "test": ids[53:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("mmimdb")


@pytest.fixture(scope="module")
def small(home):
    """A small file in the real layout."""
    return sample_file(home / "small", train=64, validation=16, test=16, seed=1)


@pytest.fixture(scope="module")
def raw(home):
    return write_raw(home / "raw" / "mmimdb")


@pytest.fixture
def main(run_command, home):
    return partial(run_command, mmimdb.main, *TINY, home / "cache")


def results(run_dir):
    return json.loads((run_dir / "results.json").read_text())


def history_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class TestFeatures:
    @pytest.mark.parametrize(
        "fusion",
        [
            name if name == "concat" else pytest.param(name, marks=pytest.mark.slow)
            for name in FUSIONS
        ],
    )
    def test_every_fusion_trains(self, main, small, tmp_path, fusion):
        run_dir = tmp_path / "run"
        # So narrow and after one epoch, a row or two take a hundred steps to the default tolerance.
        options = ("--tol", "1e-2") if fusion == "deq" else ("--jacobian-weight", 0)
        status, out, _ = main(
            "--data-dir", small, "--fusion", fusion, "--run-dir", run_dir, *options
        )  # fmt: skip
        assert status == 0 and f"mmimdb: {fusion}, seed 0, MM-IMDB data" in out
        found = results(run_dir)
        assert (found["data"], found["dataset"], found["fusion"]) == ("real", "MM-IMDB", fusion)
        assert set(found["test"]) == {"micro_f1", "macro_f1", "weighted_f1", "samples_f1"}
        assert all(0 <= value <= 1 for value in found["test"].values())
        assert (found["solver"] is not None) == (fusion in ("deq", "weight_tied"))
        history = history_of(run_dir)
        assert [row["epoch"] for row in history] == [0, 1]
        assert 0.4 < history[1]["loss"] < 1.5  # 0.69 where nothing is known
        if fusion == "deq":
            assert found["solver"]["converged"] == 1 and history[1]["train"]["jacobian_penalty"] > 0
        report = (run_dir / "report.md").read_text(encoding="utf-8")
        assert "always the frequent genres" in report and "synthetic" not in report
        command = next(line for line in report.splitlines() if line.startswith("python -m"))
        config = mmimdb.parse_args(sys.argv[1:])
        again = mmimdb.parse_args(shlex.split(command)[3:])
        assert again == dataclasses.replace(config, run_dir=None)

    @pytest.mark.slow
    def test_warm_starts_save_steps(self, main, small, tmp_path):
        status, out, _ = main(
            "--data-dir", small, "--fusion", "deq", "--run-dir", tmp_path / "run",
            "--warm-start", "--dropout", 0, "--epochs", 3, "--learning-rate", 1e-5,
        )  # fmt: skip
        assert status == 0 and "Warm starts are on: " in out
        first, *_, last = (row["train"] for row in history_of(tmp_path / "run")[1:])
        assert last["mean_steps"] < 0.9 * first["mean_steps"]
        assert last["backward_steps"] < 0.9 * first["backward_steps"]

    @pytest.mark.slow
    def test_precomputed_features_take_the_place_of_the_data_s_own(self, main, small, tmp_path):
        """With a text that spells the labels out, the text alone learns them."""
        with h5py.File(small) as file:
            ids, labels = file["imdb_ids"][:].astype(str), file["genres"][:]
        npz, run_dir = tmp_path / "bert.npz", tmp_path / "run"
        order = np.random.default_rng(0).permutation(len(ids))
        np.savez(npz, ids=ids[order], text=(2.0 * labels - 1)[order])
        status, _, _ = main(
            "--data-dir", small, "--features-npz", npz, "--fusion", "text", "--run-dir", run_dir,
            "--epochs", 40, "--batch-size", 32, "--learning-rate", 0.02, "--fusion-rate", 1,
            "--dropout", 0, "--patience", 99, "--features", 32, "--hidden", 32, 16,
        )  # fmt: skip
        assert status == 0 and results(run_dir)["test"]["micro_f1"] > 0.75

    def test_a_learning_rate_beyond_all_bounds_ends_cleanly(self, main, small, tmp_path):
        """Weights of 1e10, then NaN: bad steps change nothing, and the report counts them. It has
        no scores, rather than those of the untrained weights."""
        run_dir = tmp_path / "run"
        status, _, _ = main(
            "--data-dir", small, "--fusion", "sum", "--run-dir", run_dir,
            "--learning-rate", 1e10, "--epochs", 5,
        )  # fmt: skip
        assert status == 0
        assert all(value is None for value in results(run_dir)["test"].values())
        report = (run_dir / "report.md").read_text(encoding="utf-8")
        assert re.search(r"\d+ steps had no finite gradient, or inputs out of all range", report)
        assert "The training broke down: no epoch has a finite validation loss" in report


class TestRaw:
    @pytest.mark.slow
    def test_trains_on_plots_and_posters(self, main, raw, tmp_path):
        run_dir = tmp_path / "run"
        status, _, _ = main(
            "--data-dir", raw, "--fusion", "concat", "--run-dir", run_dir, "--plot-length", 8
        )  # fmt: skip
        assert status == 0
        found = results(run_dir)
        assert (found["data"], found["fusion"]) == ("real", "concat")
        # Word embeddings are counted: 128 numbers for each of 2 special ids and 27 words of train.
        words = {word for i in range(37) for word in GENRE_NAMES[i % 23].lower().split("-")}
        vocabulary = 2 + len(words | {"a", "in", "winter"})
        posters = 3 * 9 * 16 + 9 * (16 * 32 + 32 * 64 + 64 * 128) + 2 * 240 + 128 * 16 + 16
        plots = 128 * vocabulary + 3 * 128 * 16 + 16 + 16 * 16 + 16
        assert found["parameters"] == posters + plots + (32 * 16 + 16) + (16 * 23 + 23)

    @pytest.mark.slow
    def test_words_and_cells_are_fused(self, main, raw, tmp_path):
        status, _, err = main(
            "--data-dir", raw, "--fusion", "tokens", "--run-dir", tmp_path / "run",
            "--plot-length", 8, "--epochs", 1,
        )  # fmt: skip
        assert status == 0, err
        assert results(tmp_path / "run")["solver"]["converged"] == 1

    def test_the_vocabulary_is_of_the_training_plots(self, raw, home):
        config = mmimdb.parse_args(["--data-dir", str(raw), "--cache-dir", str(home / "cache")])
        dataset, encoders = mmimdb.read(config)
        train, test = dataset.train.inputs["text"], dataset.test.inputs["text"]
        assert train.dtype == np.int32 and train.shape == (37, 200)
        assert (train != 1).all() and (test == 1).any(axis=1).all()
        assert train.max() == encoders["text"].vocabulary - 1
        again, _ = mmimdb.read(config)
        np.testing.assert_array_equal(again.train.inputs["text"], train)

    def test_encoders_follow_the_data(self, raw, small, home, tmp_path):
        cache = ("--cache-dir", str(home / "cache"))
        config = mmimdb.parse_args(["--data-dir", str(raw), "--vocabulary", "9", *cache])
        encoders = mmimdb.read(config)[1]
        assert isinstance(encoders["text"], PlotEncoder) and encoders["text"].vocabulary == 9
        assert isinstance(encoders["image"], PosterCNN)
        npz = tmp_path / "bert.npz"
        np.savez(npz, ids=np.array([f"{i:07d}" for i in range(69)]), text=np.ones((69, 7)))
        config = mmimdb.parse_args(["--data-dir", str(raw), "--features-npz", str(npz), *cache])
        encoders = mmimdb.read(config)[1]
        assert isinstance(encoders["text"], MaxoutMLP) and isinstance(encoders["image"], PosterCNN)
        config = mmimdb.parse_args(["--data-dir", str(small), "--hidden", "24", "40", *cache])
        encoders = mmimdb.read(config)[1]
        assert {name: e.widths for name, e in encoders.items()} == {
            "text": (24, 512), "image": (40, 512),
        }  # fmt: skip


@pytest.mark.slow
def test_without_data_the_sample_is_used_and_called_synthetic(tmp_path):
    """As its user meets it: a process of its own, and the defaults but for the size."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments.mmimdb", *TINY, "cache", "--fusion", "sum"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "sample (synthetic)" in done.stdout and "Traceback" not in done.stderr
    (run_dir,) = (tmp_path / "runs" / "mmimdb").iterdir()
    found = results(run_dir)
    assert (found["data"], found["dataset"]) == ("sample", "MM-IMDB sample (synthetic)")
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# mmimdb: sum, seed 0, sample (synthetic)\n")
    assert "The data are synthetic" in report


def reshape(key, shape):
    def harm(path):
        with h5py.File(path, "r+") as file:
            attributes = dict(file[key].attrs)
            del file[key]
            file[key] = np.zeros(shape, np.float32)
            file[key].attrs.update(attributes)

    return harm


def not_a_number(path):
    with h5py.File(path, "r+") as file:
        file["features"][80, 7] = np.nan


def one_name_less(path):
    with h5py.File(path, "r+") as file:
        file["genres"].attrs["target_names"] = json.dumps(GENRE_NAMES[1:])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:100_000])


DAMAGES = {
    "cut short": (cut_short, "cannot be read as an HDF5 file"),
    "text 299 wide": (reshape("features", (96, 299)), "features has shape (96, 299), expected (96"),
    "rows disagree": (reshape("vgg_features", (95, 4096)), "(95, 4096), expected (96, 4096)"),
    "22 genres": (reshape("genres", (96, 22)), "genres has shape (96, 22), expected (96, 23)"),
    "22 names": (one_name_less, "the names of 23 genres"),
    "NaN": (not_a_number, "row 80 has a NaN or infinite text feature"),
}  # fmt: skip


@pytest.fixture
def damaged(small, tmp_path):
    return Path(shutil.copy(small, tmp_path / hdf5.FILE_NAME))


class TestBadData:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_bad_file(self, refuses, damaged, damage, tmp_path):
        harm, message = DAMAGES[damage]
        harm(damaged)
        refuses(message, "--data-dir", damaged, "--run-dir", tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_the_error_is_the_only_line_on_stderr(self, main, damaged):
        cut_short(damaged)
        _, _, err = main("--data-dir", damaged)
        assert err.startswith("error: ") and err.count("\n") == 1, err

    def test_missing_folder(self, refuses, tmp_path):
        refuses("nowhere does not exist", "--data-dir", tmp_path / "nowhere")
        refuses("holds no MM-IMDB", "--data-dir", tmp_path)

    def test_missing_poster(self, refuses, raw, tmp_path):
        folder = shutil.copytree(raw, tmp_path / "mmimdb")
        (folder / "dataset" / "0000040.jpeg").unlink()
        refuses("0000040.jpeg cannot be read", "--data-dir", folder)

    def test_features_of_other_ids(self, refuses, small, tmp_path):
        np.savez(tmp_path / "f.npz", ids=np.array(["a"]), text=np.ones((1, 2)))
        npz = tmp_path / "f.npz"
        refuses("no features for 64 of 64 ids", "--data-dir", small, "--features-npz", npz)


BAD_OPTIONS = [
    (["--nope", 1], "--nope"),
    (["--learning-rate", "fast"], "'fast'"),
    (["--hidden", 16], "--hidden"),
    (["--variant", "pixels"], "pixels"),
    (["--fusion", "nonsense"], "'nonsense'; choose from ['deq', "),
    (["--fusion", "audio"], "'audio'; choose from ['deq', "),
    (["--resume"], "--resume needs --run-dir"),
    (["--resume"], "--resume needs --run-dir"),
    (["--run-dir", "file"], "file is a file"),
    (["--run-dir", "file/run"], "file/run"),
    (["--run-dir", "other"], "'multiomics', not 'mmimdb'"),
    (["--features-npz", "nowhere.npz"], "nowhere.npz cannot be read"),
    (["--cache-dir", "file"], "cannot use file as the cache directory"),
    (["--variant", "raw"], "no MM-IMDB of the variant raw"),
    (["--batch-size", 0], "batch"),
    (["--epochs", -1], "epochs"),
    (["--features", 0], "features"),
    (["--fusion", "deq", "--features", 18], "features"),
    (["--fusion", "attention", "--features", 18], "features"),
    (["--fusion", "deq", "--tol", 0], "tol"),
    (["--fusion", "deq", "--tol", 1e-12], "tol"),
    (["--fusion", "deq", "--max-steps", 0], "max"),
    (["--warm-start"], "--fusion sum solves nothing; use deq or tokens"),
    (["--dropout", 1.5], "dropout"),
    (["--learning-rate", "nan"], "learning"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("args", "message"), BAD_OPTIONS, ids=[" ".join(map(str, args)) for args, _ in BAD_OPTIONS]
)
def test_bad_options(refuses, small, tmp_path, args, message):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    saved = {"experiment": "multiomics", "config": {}, "versions": {}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(saved))
    fusion = [] if "--fusion" in args else ["--fusion", "sum"]
    refuses(message, "--data-dir", small, *fusion, *args)


def test_resuming_with_other_options(main, refuses, small, tmp_path):
    run_dir = tmp_path / "run"
    args = ("--data-dir", small, "--fusion", "sum", "--run-dir", run_dir)
    assert main(*args)[0] == 0
    refuses("holds a run already; add --resume", *args)
    refuses("was run with dropout = 0.3, not 0.1", *args, "--resume", "--dropout", 0.1)
    refuses("was run with hidden = [16, 16], not [16, 17]", *args, "--resume", "--hidden", 16, 17)
