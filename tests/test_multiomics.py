"""``python -m experiments.multiomics`` on ROSMAP and on a made-up set of files of its form."""

import json
import re
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedKFold

from deq_fusion_jax.baselines import Sum
from experiments import multiomics
from experiments.datasets import Dataset, Split
from experiments.datasets import multiomics as files
from experiments.datasets.preprocess import redraw

ROOT = Path(__file__).resolve().parents[1]
ROSMAP = ROOT.parent / "shared" / "data" / "rosmap"


def write_rosmap(folder, train=40, test=20):
    """Files in ROSMAP's form; the first columns of every table tell the class."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for suffix, rows in (("tr", train), ("te", test)):
        labels = np.arange(rows) % 2
        for i in (1, 2, 3):
            table = rng.random((rows, 200))
            table[:, :40] = labels[:, None] + 0.5 * table[:, :40]
            np.savetxt(folder / f"{i}_{suffix}.csv", table, delimiter=",")
        np.savetxt(folder / f"labels_{suffix}.csv", labels)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("multiomics")


@pytest.fixture(scope="module")
def made_up(home):
    return write_rosmap(home / "made up")


@pytest.fixture
def main(run_command, home):
    return partial(run_command, multiomics.main, "--features", 16, "--cache-dir", home / "cache")


def read(run_dir):
    results = json.loads((run_dir / "results.json").read_text())
    history = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return results, history, (run_dir / "report.md").read_text(encoding="utf-8")


def reported(report, name):
    """The numbers of a row of the table of scores."""
    (row,) = re.findall(rf"^\| {name} +\|(.+)\|$", report, re.MULTILINE)
    return [float(cell) for cell in row.split("|")]


def expected_floor(folder):
    """Standardised logistic regression; C by the mean log-loss of five folds. From the files."""

    def table(suffix):
        tables = [np.loadtxt(folder / f"{i}_{suffix}.csv", delimiter=",") for i in (1, 2, 3)]
        return np.hstack(tables).astype(np.float32), np.loadtxt(folder / f"labels_{suffix}.csv")

    def fitted(x, labels, c):
        mean, deviation = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
        model = LogisticRegression(C=c, max_iter=2000)
        model.fit((x - mean) / np.where(deviation > 0, deviation, 1), labels)
        return lambda other: model.predict_proba(
            (other - mean) / np.where(deviation > 0, deviation, 1)
        )[:, 1]

    (x, labels), (x_test, test_labels) = table("tr"), table("te")
    folds = list(StratifiedKFold(5).split(x, labels))
    losses = {
        c: np.mean([log_loss(labels[b], fitted(x[a], labels[a], c)(x[b])) for a, b in folds])
        for c in (1e-3, 1e-2, 1e-1, 1.0)
    }
    p = fitted(x, labels, min(losses, key=losses.get))(x_test)
    scores = accuracy_score(test_labels, p > 0.5), f1_score(test_labels, p > 0.5)
    return [*scores, roc_auc_score(test_labels, p)]


@pytest.mark.slow
def test_rosmap(main, tmp_path):
    if not ROSMAP.is_dir():
        pytest.skip(f"the real data of ROSMAP are not in {ROSMAP}")
    run_dir = tmp_path / "run"
    status, out, _ = main(
        "--data-dir", ROSMAP, "--epochs", 4, "--evaluate-every", 2, "--run-dir", run_dir,
        "--features", 64, "--jacobian-weight", 0, "--no-refit",
    )  # fmt: skip
    assert status == 0 and "multiomics: deq, seed 0, ROSMAP data" in out
    results, history, report = read(run_dir)
    assert (results["data"], results["dataset"], results["fusion"]) == ("real", "ROSMAP", "deq")
    assert [row["epoch"] for row in history] == [0, 2, 4]
    assert history[2]["loss"] < history[1]["loss"]
    assert all(row["solver"]["converged"] == 1 for row in history)
    assert results["solver"]["converged"] == 1 and results["solver"]["residual"] <= 1e-3
    assert set(results["test"]) == {"accuracy", "f1", "auc"}
    assert len(history[0]["gates"]) == 3
    np.testing.assert_allclose(
        reported(report, "logistic regression"), expected_floor(ROSMAP), atol=5.1e-4
    )
    assert "Alzheimer's disease" in report


@pytest.mark.slow
def test_files_of_the_same_form(main, made_up, tmp_path):
    """The first columns of every table tell the class: a few epochs learn it."""
    run_dir = tmp_path / "run"
    status, _, err = main(
        "--data-dir", made_up, "--fusion", "concat", "--epochs", 60, "--learning-rate", 1e-2,
        "--evaluate-every", 20, "--run-dir", run_dir, "--weight-decay", 0,
    )  # fmt: skip
    assert status == 0 and "Traceback" not in err
    results, _, report = read(run_dir)
    assert results["test"]["auc"] > 0.9 and results["solver"] is None
    np.testing.assert_allclose(
        reported(report, "logistic regression"), expected_floor(made_up), atol=5.1e-4
    )


def test_random_splits_are_of_all_rows_and_keep_the_classes(home, made_up):
    source = files.load("rosmap", made_up, home / "cache")
    one, other = (redraw(source, seed) for seed in (0, 1))

    def rows(*parts):
        return sorted(map(tuple, np.concatenate([part.inputs["mRNA"] for part in parts]).tolist()))

    for drawn in (one, other):
        assert (len(drawn.train.labels), len(drawn.test.labels)) == (42, 18)  # 70/30 of 60
        assert drawn.train.labels.sum() == 21 and drawn.test.labels.sum() == 9
        assert rows(drawn.train, drawn.test) == rows(source.train, source.test)
        assert drawn.name == "ROSMAP, random splits"
    assert rows(one.test) != rows(other.test)


@pytest.mark.slow
def test_random_splits_and_both_other_selections_are_reported(main, made_up, tmp_path):
    run_dir = tmp_path / "run"
    status, _, err = main(
        "--data-dir", made_up, "--fusion", "sum", "--epochs", 6, "--evaluate-every", 2,
        "--run-dir", run_dir, "--split", "random", "--official-selection", "--no-detach",
    )  # fmt: skip
    assert status == 0, err
    results, history, report = read(run_dir)
    assert results["dataset"] == "ROSMAP, random splits"
    assert results["selection"] == "refit"
    tested = [json.loads(line) for line in (run_dir / "refit.jsonl").read_text().splitlines()]
    assert not any("test" in row for row in history)
    assert results["last_epoch"] == pytest.approx(tested[-1]["test"])
    assert results["best_on_test"]["auc"] == max(row["test"]["auc"] for row in tested)
    assert "best epoch ON TEST" in report and "test, last epoch" in report
    assert "--no-detach" in report and "--official-selection" in report


def test_a_row_of_nan_is_a_missing_modality():
    rng = np.random.default_rng(0)
    inputs = {name: rng.random((6, 5), np.float32) for name in ("a", "b")}
    model = multiomics.OmicsModel(Sum(4), 4, 3)
    params = model.init(jax.random.key(0), inputs)["params"]
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    out, zero = (
        model.apply({"params": params}, inputs | {"b": np.full((6, 5), value, np.float32)})
        for value in (np.nan, 0)
    )
    _, confidence, _ = out.extras["a"]
    whole = model.apply({"params": params}, inputs)
    np.testing.assert_allclose(confidence, whole.extras["a"][1], rtol=1e-5)
    assert np.isfinite(out.logits).all()
    assert float(jnp.abs(out.logits - zero.logits).min()) > 0  # 0 is a value, NaN is none


def test_validation_rows_come_from_train_and_scale_nothing():
    rng = np.random.default_rng(0)

    def rows(n):
        x = {name: rng.normal(5, 3, (n, 4)).astype(np.float32) for name in ("a", "b")}
        return Split(x, np.arange(n, dtype=np.int32) % 2)

    source = Dataset("Toy", "real", ("x", "y"), rows(50), None, rows(10))
    for seed in (0, 1):
        dataset = multiomics.prepare(source, multiomics.Config(validation=0.2, seed=seed))
        assert (len(dataset.train.labels), len(dataset.validation.labels)) == (40, 10)
        assert dataset.validation.labels.sum() == 5
        for name, x in dataset.train.inputs.items():
            np.testing.assert_allclose(x.min(axis=0), 0, atol=1e-6)
            np.testing.assert_allclose(x.max(axis=0), 1, atol=1e-6)
            # An affine map of each column that train, validation and test share.
            original, mapped = source.test.inputs[name], dataset.test.inputs[name]
            slope = (mapped[0] - mapped[1]) / (original[0] - original[1])
            shift = mapped[0] - slope * original[0]
            restored = (np.vstack([x, dataset.validation.inputs[name]]) - shift) / slope
            np.testing.assert_allclose(
                np.sort(restored, axis=0), np.sort(source.train.inputs[name], axis=0), rtol=1e-3
            )


def test_model_and_loss_are_those_of_mm_dynamics():
    """Written out in NumPy from the parameters."""
    rng = np.random.default_rng(0)
    inputs = {name: rng.random((6, d), np.float32) for name, d in (("a", 5), ("b", 3))}
    labels = np.array([0, 1, 2, 1, 0, 2])
    model = multiomics.OmicsModel(Sum(4), 4, 3)
    params = model.init(jax.random.key(0), inputs)["params"]
    for name in inputs:  # a confidence starts at chance
        np.testing.assert_allclose(params[f"confidence_{name}"]["bias"], 1 / 3)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    prediction = model.apply({"params": params}, inputs)

    def linear(name, x):
        return x @ np.asarray(params[name]["kernel"], np.float64) + params[name]["bias"]

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    fused, total, row = 0.0, 0.0, np.arange(6)
    for name, x in inputs.items():
        gate = 1 / (1 + np.exp(-linear(f"gate_{name}", x)))
        h = np.maximum(linear(f"encode_{name}", x * gate), 0)
        confidence, logits = linear(f"confidence_{name}", h), linear(f"classify_{name}", h)
        fused = fused + h * confidence
        log_p = log_softmax(logits)[row, labels]
        total += np.mean((confidence[:, 0] - np.exp(log_p)) ** 2) - log_p.mean() + gate.mean()
    logits = linear("head", fused)
    total -= log_softmax(logits)[row, labels].mean()
    np.testing.assert_allclose(prediction.logits, logits, rtol=1e-4, atol=1e-5)
    assert float(multiomics.loss(prediction, jnp.asarray(labels))) == pytest.approx(float(total))


class TestBadInput:
    @pytest.mark.slow
    def test_without_data_says_how_to_get_it_on_one_line(self, refused_alone, tmp_path):
        line = refused_alone("experiments.multiomics", "--cache-dir", tmp_path)
        assert "ask for the download" in line

    def test_missing_files(self, refuses, made_up, tmp_path):
        folder = shutil.copytree(made_up, tmp_path / "data")
        (folder / "2_te.csv").unlink()
        refuses("has no 2_te.csv of ROSMAP", "--data-dir", folder)
        refuses("has no 1_tr.csv", "--data-dir", tmp_path / "nowhere")

    def test_no_number(self, refuses, made_up, tmp_path):
        folder = shutil.copytree(made_up, tmp_path / "data")
        text = (folder / "1_tr.csv").read_text()
        (folder / "1_tr.csv").write_text(text.replace(text[:10], "nan", 1))
        refuses("1_tr.csv", "--data-dir", folder)

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [6, 8])
    def test_a_handful_of_patients_is_no_error(self, main, tmp_path, monkeypatch, rows):
        """Fewer than the five folds of the logistic regression."""
        monkeypatch.chdir(tmp_path)
        folder = write_rosmap(tmp_path / "data", rows, 4)
        status, _, err = main("--data-dir", folder, "--fusion", "sum", "--epochs", 1, "--no-refit")
        assert status == 0 and "error" not in err

    def test_patients_of_one_class(self, refuses, made_up, tmp_path):
        folder = shutil.copytree(made_up, tmp_path / "data")
        np.savetxt(folder / "labels_tr.csv", np.zeros(40))
        refuses("class", "--data-dir", folder, "--fusion", "sum", "--epochs", 1)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--dataset", "tcga"], "tcga"),
            (["--nope"], "--nope"),
            (["--fusion", "nonsense"], "'mRNA'"),
            (["--validation", 1.5], "--validation 1.5: expected a share"),
            (["--validation", 0], "--validation 0.0: expected a share"),
            (["--evaluate-every", 0], "evaluate"),
            (["--modality-dropout", 1], "--modality-dropout 1.0: expected 0 or more"),
            (["--sample"], "--sample"),
            (["--resume"], "--resume needs --run-dir"),
        ],
    )
    def test_bad_options(self, refuses, made_up, args, message):
        fusion = [] if "--fusion" in args else ["--fusion", "sum"]
        refuses(message, "--data-dir", made_up, "--epochs", 1, *fusion, *args)
