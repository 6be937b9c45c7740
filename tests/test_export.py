"""A trained run as one file, and its predictions in a process that has no model's code."""

import csv
import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from sklearn.metrics import accuracy_score, mean_absolute_error

from experiments import export, features, predict

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(0)
N = 90
SPLIT = np.arange(N) % 3
Z = RNG.standard_normal((N, 4))
X = {"a": 1.6e9 + 10 * Z, "b": 100 + 5 * RNG.standard_normal((N, 3, 2))}  # float32: 128 apart
X["b"][::9] = np.nan  # a missing modality
X["a"][1::9, 0] = np.nan  # a single unknown value
SEX = np.where(RNG.random(N) < 0.5, "f", "m")


def write_csv(path, columns, rows, separator=","):
    """Columns {name: [N]} of these rows, by their ids."""
    lines = [["", *columns]] + [[f"p{i}", *(x[i] for x in columns.values())] for i in rows]
    text = "\n".join(separator.join(map(str, line)) for line in lines)
    path.write_text(text.replace("nan", ""), encoding="utf-8")
    return path


def tables(x):
    """The columns of two CSV files, with a column of words."""
    a = {f"a{i}": column for i, column in enumerate(x["a"].T)}
    b = {f"b{i}": column for i, column in enumerate(x["b"].reshape(N, -1).T)}
    return {"a": {"sex": SEX, **a}, "b": b}


def in_any_order():
    return np.random.default_rng(1).permutation(N)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run directories and data of a classification by DEQ fusion and a regression by a sum.

    The one is of an .npz file, the other of CSV files with the rows in different orders.
    """
    home = tmp_path_factory.mktemp("export")
    labels = {"deq": np.where(Z[:, 1] > 0, "yes", "no"), "sum": 7 * Z[:, 1] - 20}
    np.savez(home / "deq.npz", **X, labels=labels["deq"], split=SPLIT)
    (home / "csv").mkdir()
    about = {"labels": labels["sum"], "split": SPLIT}
    paths = [write_csv(home / "csv" / "labels.csv", about, range(N))]
    for name, columns in tables(X).items():
        paths.append(write_csv(home / "csv" / f"{name}.csv", columns, in_any_order()))
    found = {}
    for fusion, data in {"deq": [home / "deq.npz"], "sum": paths}.items():
        run_dir = home / fusion
        words = [*data, "--run-dir", run_dir, "--fusion", fusion, "--epochs", 3, "--features", 8]
        limits = ["--tol", "1e-4", "--max-steps", "8"]  # too few for some rows
        features.run(features.parse_args([*map(str, words), *limits]))
        export.export(run_dir, run_dir / "model.zip")
        found[fusion] = run_dir, data, labels[fusion]
    return found


@pytest.fixture
def main(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(run_command, predict.main)


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_fresh_process_predicts_what_was_tested(trained, tmp_path):
    run_dir, data, labels = trained["deq"]
    program = f"""
import sys
sys.argv = ["predict", {str(run_dir / "model.zip")!r}, "--data", {str(data[0])!r}]
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
    assert list(rows[0]) == [
        "row",
        "prediction",
        "no",
        "yes",
        "converged",
        "steps",
        "residual",
        "missing",
    ]
    test = [rows[i] for i in np.flatnonzero(SPLIT == 2)]
    accuracy = accuracy_score(labels[SPLIT == 2], [row["prediction"] for row in test])
    results = json.loads((run_dir / "results.json").read_text())
    assert accuracy == pytest.approx(results["test"]["accuracy"])
    assert np.mean([float(row["steps"]) for row in test]) == results["solver"]["mean_steps"]
    assert np.mean([row["converged"] == "True" for row in test]) == results["solver"]["converged"]
    assert all(float(row["yes"]) + float(row["no"]) == pytest.approx(1, abs=1e-5) for row in rows)


def test_a_regression_of_csv_files_is_in_its_own_units(trained, main, tmp_path):
    run_dir, data, labels = trained["sum"]
    status, out, err = main(run_dir / "model.zip", "--data", *data)
    assert status == 0 and "converge" not in out, err
    rows = rows_of(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["id", "prediction", "missing"]
    found = {int(row["id"][1:]): float(row["prediction"]) for row in rows}
    test = [found[i] for i in np.flatnonzero(SPLIT == 2)]
    results = json.loads((run_dir / "results.json").read_text())
    error = mean_absolute_error(labels[SPLIT == 2], test)
    assert error == pytest.approx(results["test"]["mae"], rel=1e-4)
    assert {int(row["id"][1:]) for row in rows if row["missing"] == "b"} == set(range(0, N, 9))


def test_columns_and_rows_are_known_by_name(trained, main, tmp_path):
    """Columns in another order, fewer rows, all of one sex: each id has the same prediction."""
    run_dir, data, _ = trained["sum"]
    main(run_dir / "model.zip", "--data", *data)
    expected = {row["id"]: row for row in rows_of(tmp_path / "predictions.csv")}
    parts, men = tables(X), np.flatnonzero(SEX == "m")
    paths = [
        write_csv(tmp_path / "a.csv", dict(reversed(parts["a"].items())), men, ";"),
        write_csv(tmp_path / "b.csv", parts["b"] | {"more": Z[:, 0]}, men[::-1][:-3]),
    ]
    status, out, err = main(run_dir / "model.zip", "--data", *paths)
    assert status == 0 and "Note: b.csv: columns that the model does not read: more." in out, err
    rows = rows_of(tmp_path / "predictions.csv")
    assert [row["id"] for row in rows] == [f"p{i}" for i in men]
    for row in rows:
        if row["id"] in [f"p{i}" for i in men[:3]]:
            assert row["missing"] == "b"
        else:
            value = float(expected[row["id"]]["prediction"])
            assert float(row["prediction"]) == pytest.approx(value, rel=1e-5)
            assert row["missing"] == expected[row["id"]]["missing"]
    write_csv(tmp_path / "a.csv", {**parts["a"], "sex": np.full(N, "x")}, range(N))
    status, _, err = main(run_dir / "model.zip", "--data", *paths)
    assert status == 2 and "sex is 'x'; expected one of f, m" in err
    del parts["a"]["sex"]
    write_csv(tmp_path / "a.csv", parts["a"], range(N))
    status, _, err = main(run_dir / "model.zip", "--data", *paths)
    assert status == 2 and "a.csv has no column 'sex', which the model reads" in err


def test_a_mask_is_honoured_and_nothing_is_invented(trained, main, tmp_path):
    run_dir, _, _ = trained["deq"]
    model = run_dir / "model.zip"
    mask = np.ones((N, 2), int)
    mask[0], mask[1, 0], mask[2, 1] = 0, 0, 0
    np.savez(tmp_path / "masked.npz", **X, mask=mask, ids=np.arange(N) + 100)
    status, out, err = main(model, "--data", tmp_path / "masked.npz")
    assert status == 0 and "1 of them are not predicted" in out, err
    rows = rows_of(tmp_path / "predictions.csv")
    hidden = {name: x.copy() for name, x in X.items()}
    hidden["a"][1], hidden["b"][2] = np.nan, np.nan
    np.savez(tmp_path / "nan.npz", **hidden)
    main(model, "--data", tmp_path / "nan.npz")
    others = rows_of(tmp_path / "predictions.csv")
    assert [row["missing"] for row in rows[:4]] == ["a;b", "a", "b", ""]
    assert rows[0] | {"missing": ""} == {
        **dict.fromkeys(rows[0], ""),
        "id": "100",
        "converged": "False",
    }
    for name in ("prediction", "yes", "steps", "missing"):
        assert [row[name] for row in rows[1:]] == [row[name] for row in others[1:]]


def test_about_json_says_how_inputs_are_made(trained):
    """By its numbers alone, as README says, in float64."""
    run_dir, _, _ = trained["deq"]
    model = predict.read_model(run_dir / "model.zip")
    inputs = {}
    for name, how in model.about["prepare"].items():
        x = (X[name] - np.array(how["mean"])) / np.array(how["deviation"])
        lost = np.isnan(x) & ~np.isnan(x).all(axis=-1, keepdims=True)
        inputs[name] = np.where(lost, 0, x).astype(np.float32)
    alone = predict.predict(model, inputs)
    rows = predict.read_rows(trained["deq"][1], model.about)
    np.testing.assert_array_equal(
        alone["prediction"], predict.predict(model, rows.inputs)["prediction"]
    )
    assert np.ptp(inputs["a"][3:9, 1]) > 0.5


def test_a_row_alone_is_predicted_as_in_the_batch(trained):
    run_dir, data, _ = trained["deq"]
    model = predict.read_model(run_dir / "model.zip")
    assert set(model.program.platforms) == {"cpu", "cuda", "tpu"}
    inputs = predict.read_rows(data, model.about).inputs
    together = predict.predict(model, inputs)
    for row in (0, 1, 50):
        alone = predict.predict(model, {name: x[row : row + 1] for name, x in inputs.items()})
        assert alone["steps"][0] == together["steps"][row]
        np.testing.assert_allclose(alone["prediction"][0], together["prediction"][row], rtol=1e-4)


def test_rows_that_do_not_converge_are_flagged(trained, tmp_path, main):
    run_dir, data, _ = trained["deq"]
    status, out, _ = main(run_dir / "model.zip", "--data", *data)
    rows = rows_of(tmp_path / "predictions.csv")
    lost = [row for row in rows if row["converged"] == "False"]
    assert status == 0 and 0 < len(lost) < N and f"{len(lost)} of them did not converge" in out
    assert all(float(row["residual"]) > 1e-4 for row in lost)


def test_bad_input_is_one_line(trained, main, tmp_path):
    run_dir, (data,), _ = trained["deq"]
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
        ([model, "--data", data, "--out", tmp_path], "is a folder; give a file"),
        ([model, "--data", data, "--out", data / "x.csv"], "--out"),
        ([model, "--data", data, "--out", "/proc/x.csv"], "--out /proc/x.csv cannot be written"),
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
    kept = data[1].read_bytes()
    data[1].write_bytes(kept + b"\n")
    status, _, err = main(run_dir)
    data[1].write_bytes(kept)
    assert status == 2 and "the data have changed since" in err


@pytest.fixture
def other_model(tmp_path):
    """A model.zip of another program: words and colours, of which neither is ever missing."""
    shapes = {"text": ((3,), "int32"), "image": ((2,), "float32")}
    (rows,) = jax_export.symbolic_shape("rows")
    given = {name: jax.ShapeDtypeStruct((rows, *s), dtype) for name, (s, dtype) in shapes.items()}

    def program(inputs):
        return {"prediction": inputs["text"].sum(axis=1) + inputs["image"].sum(axis=1)}

    about = {
        "data": "words",
        "classes": [],
        "several": False,
        "inputs": {name: [list(shape), dtype] for name, (shape, dtype) in shapes.items()},
    }
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("about.json", json.dumps(about))
        file.writestr("program.jax", jax_export.export(jax.jit(program))(given).serialize())
    return tmp_path / "other.zip"


def test_a_model_that_knows_nothing_of_missing_modalities(other_model, main, tmp_path):
    text, image = np.arange(12).reshape(4, 3), np.ones((4, 2)) / 2
    data = tmp_path / "data.npz"
    np.savez(data, text=text, image=image, labels=np.zeros(4))
    status, _, err = main(other_model, "--data", data)
    assert status == 0, err
    found = [float(row["prediction"]) for row in rows_of(tmp_path / "predictions.csv")]
    np.testing.assert_allclose(found, text.sum(axis=1) + 1)
    mask = np.ones((4, 2))
    mask[2, 0] = 0
    lost = np.where(np.arange(4)[:, None] == 2, np.nan, image)
    for arrays, message in (
        ({"text": text, "image": image, "mask": mask}, "mask: text of this model cannot be missi"),
        ({"text": text, "image": lost}, "image is missing in 1 rows, and this model cannot do"),
        ({"text": text + 0.5, "image": image}, "text has numbers that the model, of int32, cannot"),
    ):
        np.savez(data, **arrays)
        status, _, err = main(other_model, "--data", data)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_terminal_without_the_letters(other_model, tmp_path):
    np.savez(tmp_path / "血液.npz", text=np.ones((4, 3), int), 血液=np.ones((4, 2)))
    words = ["-m", "experiments.predict", other_model, "--data", tmp_path / "血液.npz"]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert r"holds text, \u8840\u6db2; the model reads text, image" in done.stderr
