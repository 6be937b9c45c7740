"""A trained run as one file, and its predictions in a process that has no model's code."""

import csv
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, mean_absolute_error

from experiments import export, features, predict

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
N = 90
SPLIT = np.arange(N) % 3
X = {"a": RNG.standard_normal((N, 4)), "b": 100 + 5 * RNG.standard_normal((N, 3, 2))}
X["b"][::9] = np.nan  # a missing modality
X["a"][1::9, 0] = np.nan  # a single unknown value


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run directories and data of a classification by DEQ fusion and a regression by a sum."""
    home = tmp_path_factory.mktemp("export")
    labels = {"deq": np.where(X["a"][:, 1] > 0, "yes", "no"), "sum": 7 * X["a"][:, 1] - 20}
    found = {}
    for fusion, y in labels.items():
        data, run_dir = home / f"{fusion}.npz", home / fusion
        np.savez(data, **X, labels=y, split=SPLIT)
        words = [data, "--run-dir", run_dir, "--fusion", fusion, "--epochs", 3, "--features", 8]
        limits = ["--tol", "1e-4", "--max-steps", "8"]  # too few for some rows
        features.run(features.parse_args([*map(str, words), *limits]))
        export.export(run_dir, run_dir / "model.zip")
        found[fusion] = run_dir, data, y
    return found


@pytest.fixture
def main(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(run_command, predict.main)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_fresh_process_predicts_what_was_tested(trained, tmp_path):
    run_dir, data, labels = trained["deq"]
    program = f"""
import sys
sys.argv = ["predict", {str(run_dir / "model.zip")!r}, "--data", {str(data)!r}]
from experiments import predict
predict.main()
assert not set(sys.modules).intersection(["flax", "optax", "orbax", "deq_fusion_jax"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "90 rows by a model of deq: predictions.csv" in done.stdout
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["row", "prediction", "no", "yes", "converged", "steps", "residual"]
    test = [rows[i] for i in np.flatnonzero(SPLIT == 2)]
    accuracy = accuracy_score(labels[SPLIT == 2], [row["prediction"] for row in test])
    results = json.loads((run_dir / "results.json").read_text())
    assert accuracy == pytest.approx(results["test"]["accuracy"])
    assert np.mean([float(row["steps"]) for row in test]) == results["solver"]["mean_steps"]
    assert np.mean([row["converged"] == "True" for row in test]) == results["solver"]["converged"]
    assert all(float(row["yes"]) + float(row["no"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_a_regression_is_in_its_own_units(trained, main, tmp_path):
    run_dir, data, labels = trained["sum"]
    status, out, _ = main(run_dir / "model.zip", "--data", data)
    assert status == 0 and "converge" not in out
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["row", "prediction"]
    test = [float(rows[i]["prediction"]) for i in np.flatnonzero(SPLIT == 2)]
    results = json.loads((run_dir / "results.json").read_text())
    error = mean_absolute_error(labels[SPLIT == 2], test)
    assert error == pytest.approx(results["test"]["mae"], rel=1e-4)


def test_a_row_alone_is_predicted_as_in_the_batch(trained):
    run_dir, data, _ = trained["deq"]
    model = predict.read_model(run_dir / "model.zip")
    assert set(model.program.platforms) == {"cpu", "cuda", "tpu"}
    inputs = predict.read_inputs(data, model.about)
    together = predict.predict(model, inputs)
    for row in (0, 1, 50):
        alone = predict.predict(model, {name: x[row : row + 1] for name, x in inputs.items()})
        assert alone["steps"][0] == together["steps"][row]
        np.testing.assert_allclose(alone["prediction"][0], together["prediction"][row], rtol=1e-4)


def test_rows_that_do_not_converge_are_flagged(trained, tmp_path, main):
    run_dir, data, _ = trained["deq"]
    status, out, _ = main(run_dir / "model.zip", "--data", data)
    rows = rows_of(tmp_path / "predictions.csv")
    lost = [row for row in rows if row["converged"] == "False"]
    assert status == 0 and 0 < len(lost) < N and f"{len(lost)} of them did not converge" in out
    assert all(float(row["residual"]) > 1e-4 for row in lost)


def test_bad_input_is_one_line(trained, main, tmp_path):
    run_dir, data, _ = trained["deq"]
    model = run_dir / "model.zip"
    damaged = tmp_path / "damaged.zip"
    whole = bytearray(model.read_bytes())
    whole[len(whole) // 2] ^= 1
    damaged.write_bytes(whole)
    other = tmp_path / "other.npz"
    np.savez(other, a=X["a"])
    narrow = tmp_path / "narrow.npz"
    np.savez(narrow, a=X["a"][:, :2], b=X["b"])
    for words, message in (
        ([damaged, "--data", data], "cannot be read as an exported model"),
        ([data, "--data", data], "cannot be read as an exported model"),
        ([tmp_path / "none.zip", "--data", data], "No such file"),
        ([model, "--data", other], "holds a; the model reads a, b"),
        ([model, "--data", narrow], "a is float64 (90, 2); the model reads numbers [N, 4]"),
        ([model], "give a model and its data"),
    ):
        status, _, err = main(*words)
        assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "predictions.csv").exists()


def test_what_cannot_be_exported(trained, tmp_path, run_command):
    run_dir, data, _ = trained["sum"]
    main = partial(run_command, export.main)
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    for folder in copy.glob("checkpoints/*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    for words, message in (
        ([tmp_path], "holds no finished run"),
        ([], "no run given"),
        ([copy], "no checkpoint in"),
    ):
        status, _, err = main(*words)
        assert status == 2 and message in err and err.count("\n") == 1, err
    kept = data.read_bytes()
    np.savez(data, **X, labels=np.arange(N) / 7, split=SPLIT)
    status, _, err = main(run_dir)
    data.write_bytes(kept)
    assert status == 2 and "the data have changed since" in err
