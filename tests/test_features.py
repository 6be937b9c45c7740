"""`python -m experiments.features` on three data sets made here, with no option but the file."""

import json
from functools import partial

import numpy as np
import pytest

from experiments import features

N = 240


@pytest.fixture
def main(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(run_command, features.main)


@pytest.fixture
def results(main, tmp_path):
    """results.json of a run on these arrays, and what it printed."""

    def run(*options, **arrays):
        np.savez(tmp_path / "made_up.npz", **arrays)
        status, out, err = main("made_up.npz", *options)
        assert status == 0, err
        (run_dir,) = (tmp_path / "runs" / "features").iterdir()
        return json.loads((run_dir / "results.json").read_text(encoding="utf-8")), out, run_dir

    return run


RNG = np.random.default_rng(0)
SIGN = {name: RNG.choice([-1.0, 1.0], N) for name in "abc"}


def around(sign, *shape):
    """Rows of noise whose mean tells the sign."""
    return sign.reshape(-1, *(1 for _ in shape)) + 0.7 * RNG.standard_normal((N, *shape))


def test_classes_that_show_in_both_modalities_together(results):
    """An exclusive or: one modality alone is worth a coin."""
    labels = (SIGN["a"] * SIGN["b"] > 0).astype(int)
    got, out, run_dir = results(a=around(SIGN["a"], 8), b=around(SIGN["b"], 6, 4), labels=labels)
    assert got["test"]["accuracy"] > 0.9 and got["data"] == "real"
    assert got["dataset"] == "made_up" and got["solver"]["converged"] == 1
    assert "made_up: 240 rows, multiclass, 2 classes" in out and "b [6, 4]" in out
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "python -m experiments.features made_up.npz --fusion deq" in report
    assert "the most frequent class" in report


def test_several_classes_a_row(results):
    x = {name: around(sign, 5) for name, sign in SIGN.items()}
    labels = np.stack([SIGN["a"] > 0, SIGN["b"] > 0, SIGN["c"] * SIGN["a"] > 0], axis=1)
    got, out, _ = results(**x, labels=labels)
    assert got["test"]["micro_f1"] > 0.9
    assert "multilabel, 3 classes" in out


def test_a_regression_with_missing_rows(results):
    x = {name: around(SIGN[name], 5) for name in "ab"}
    x["a"][::4] = np.nan
    y = 100 + 10 * SIGN["a"] + 30 * SIGN["b"] + RNG.standard_normal(N)
    got, out, _ = results(**x, labels=y)
    assert got["test"]["r2"] > 0.85 and got["test"]["mae"] < 12
    assert "regression" in out and "a [5], missing in 60 rows" in out


def test_what_cannot_be_used(main, tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 3)), labels=np.arange(2))
    for words, complaint in [
        (["two.npz"], "labels has 2 rows"),
        ([], "nothing to read"),
        (["none.npz"], "none.npz cannot be read"),
        (["two.npz", "--data-dir", "x"], "--help lists the options"),
    ]:
        status, _, err = main(*words)
        assert status == 2 and complaint in err and err.count("\n") == 1
