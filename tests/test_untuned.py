"""`experiments.benchmarks.untuned`: what it reads, its standard errors, and a run of it."""

import json
from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_wine

from experiments import features
from experiments.benchmarks import untuned
from experiments.benchmarks.views import COLUMNS, files_of
from experiments.common.errors import InputError
from experiments.datasets.features import read
from experiments.training.run_directory import begin_run


@pytest.mark.parametrize("name", COLUMNS)
def test_views_have_all_columns_and_rows_of_a_table(name, tmp_path):
    table = read(files_of(name, tmp_path))
    assert list(table.modalities) == sorted(COLUMNS[name])
    assert table.kind == ("regression" if name == "diabetes" else "multiclass")
    if name == "wine":
        found = np.hstack([table.modalities[view] for view in ("first", "second")])
        np.testing.assert_array_equal(found, load_wine().data)


def test_files_and_folders_are_taken_as_they_are(tmp_path):
    (tmp_path / "image.csv").write_text("1\n")
    (tmp_path / "labels.csv").write_text("1\n")
    folder = files_of(str(tmp_path), tmp_path)
    assert [path.name for path in folder] == ["image.csv", "labels.csv"]
    assert files_of(str(folder[0]), tmp_path) == folder[:1]
    with pytest.raises(InputError, match=r"nothing: give an \.npz file, a folder"):
        files_of("nothing", tmp_path)


def test_the_standard_error_of_a_share():
    """Of draws; of a perfect score it is not zero."""
    drawn = np.random.default_rng(0).binomial(106, 0.8, 20_000) / 106
    assert untuned.standard_error([0.7, 0.9], 106) == pytest.approx(drawn.std(), rel=0.03)
    assert 0.1 < untuned.standard_error([1.0], 6) < 0.2


def result(fusion, score, validation=0.5, rows=100):
    return {
        "fusion": fusion,
        "test": {"accuracy": score, "macro_f1": score},
        "validation": {"macro_f1": validation},
        "classes": {"a": {"support": rows // 2}, "b": {"support": rows - rows // 2}},
        "floors": {"logistic regression": {"accuracy": 0.7}},
        "solver": {"converged": 1.0} if fusion == "deq" else None,
        "seconds": 3.0,
    }


def test_tables():
    rows = [result("deq", 0.8), result("deq", 0.9), result("sum", 0.75)]
    tuned = {
        "deq": {"rate 0.003": result("deq", 0.99, 0.4), "dropout 0": result("deq", 0.88, 0.6)},
        "sum": {"rate 0.003": result("sum", 0.85, 0.6)},
    }
    sets = [{"set": "toy", "rows": rows, "tuned": tuned}]
    line = untuned.scores_table(sets, ["deq", "sum"]).splitlines()[-1].split("|")[1:-1]
    said = [cell.strip() for cell in line]
    assert said[:4] == ["toy", "accuracy", "100", "0.850 ± 0.071"]
    assert said[4:] == ["0.750", "0.700 ± 0.000", "100.0 %", "3"]
    deq, concat = untuned.tuned_table(sets, ["deq", "sum"]).splitlines()[-2:]
    assert "dropout 0" in deq and "0.880" in deq and deq.endswith(" yes |")
    assert "rate 0.003" in concat and concat.endswith(" no |")


def test_a_run_of_other_data_is_not_taken_for_this_one(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "found" / "iris" / "concat-seed0"
    run_dir.mkdir(parents=True)
    files = files_of("wine", tmp_path)
    config = features.parse_args([*map(str, files), "--fusion", "concat"])
    begin_run(run_dir, "features", config)
    (run_dir / "results.json").write_text("{}")
    words = ["iris", "--fusions", "concat", "--seeds", 1, "--run-dir", "found"]
    status, _, err = run_command(untuned.main, *words)
    assert status == 2 and "was run with data" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_run(run_command, tmp_path, monkeypatch):
    monkeypatch.setattr(untuned, "TUNED", {"rate 0.003": {"learning_rate": 3e-3}})
    monkeypatch.chdir(tmp_path)
    words = ["iris", "--fusions", "concat", "--seeds", 1, "--tuned", "--run-dir", "found"]
    main = partial(run_command, untuned.main, *words)
    status, out, err = main()
    assert status == 0, err
    (found,) = json.loads((tmp_path / "found" / "untuned.json").read_text())
    assert len(found["rows"]) == 1 and list(found["tuned"]["concat"]) == ["rate 0.003"]
    assert all(row["test"]["accuracy"] > 0.8 for row in found["rows"])
    text = (tmp_path / "found" / "untuned.md").read_text(encoding="utf-8")
    assert "| iris" in text and text in out
    assert (tmp_path / "found" / "tuned.md").read_text(encoding="utf-8") in out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert main()[0] == 0  # what is there is taken
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
