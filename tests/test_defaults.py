"""``python -m experiments.benchmarks.defaults``: what it counts, which setting it calls best."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson
from experiments.benchmarks import defaults
from experiments.benchmarks.equations import Transposed, equations


@pytest.fixture
def main(run_command):
    return partial(run_command, defaults.main)


def test_evaluations_are_those_of_a_solve_at_the_tolerance():
    (equation,) = [one for one in equations("slow") if one.name == "eigenvalues 0 … 0.9"]
    config = defaults.Config(histories=(5,), ridges=(1e-2,), dampings=(0.7,), max_steps=60)
    found = {
        defaults.label(setting): counts for setting, counts in defaults.counts(equation, config)
    }
    counts = found["history 5, ridge 0.01, damping 0.7"]
    for tol, steps in zip(config.tolerances, counts, strict=True):
        solver = Anderson(tol=tol, max_steps=60, history=5, damping=0.7)
        stats = solver.solve(equation.make(*equation.args), equation.z0)[1]
        np.testing.assert_array_equal(np.where(stats.converged, stats.steps, 0), steps)


def test_the_adjoint_is_the_transpose(x64):
    """⟨u, Jx⟩ = ⟨Jᵀu, x⟩ with J by central differences."""
    make = lambda W: lambda z: jnp.tanh(z @ W)  # noqa: E731
    W, z, u, x = (jax.random.normal(key, (3, 3)) for key in jax.random.split(jax.random.key(0), 4))
    along = (make(W)(z + 1e-6 * x) - make(W)(z - 1e-6 * x)) / 2e-6
    got = Transposed(make)(z, jnp.zeros_like(z), W)(u)
    assert float(jnp.sum(got * x)) == pytest.approx(float(jnp.sum(u * along)), rel=1e-7)


def test_the_best_setting_has_the_smallest_largest_ratio():
    def row(equation, history, mean):
        setting = {"solver": "Anderson", "history": history, "ridge": 0.5, "damping": 1.0}
        return {"family": "one", "equation": equation, "tol": 1e-3, "mean": mean, **setting}

    rows = [row("a", 2, 10), row("a", 3, 12), row("b", 2, 40), row("b", 3, 20)]
    rows += [{**row("a", 9, 1), "solver": "Picard"}, {**row("b", 9, 1), "solver": "Picard"}]
    picard, best, other = defaults.scores(rows)  # Picard's is not what the others are compared with
    assert picard["setting"] == "Picard" and picard["worst"] == 0.1
    assert best["setting"] == "history 3, ridge 0.5, damping 1"
    assert best["worst"] == 1.2 and best["where"] == "a at 0.001"
    assert other["worst"] == 2.0 and other["within"] == 0.5
    assert other["mean"] == pytest.approx(np.sqrt(2))
    kinds = defaults.by_family(rows)["one"]
    ratio = np.sqrt(10 * 40) / np.sqrt(12 * 20)
    assert kinds["history 2, ridge 0.5, damping 1"] == pytest.approx(ratio)


@pytest.mark.slow
def test_what_it_writes(main, tmp_path):
    grid = ["--histories", "2", "--ridges", "0.01", "--dampings", "1", "--tolerances", "1e-3"]
    options = ["--families", "rotation", "--max-steps", "40", "--run-dir", tmp_path]
    status, out, err = main(*grid, *options)
    assert status == 0, err
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert text in out and "history 6, ridge 0.01, damping 1, default" in text
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert defaults.table(written) == text
    found = {one["setting"] for one in written["scores"]}
    # The default as well, which is not in the grid.
    assert len(found) == 4 and {"Picard", "Broyden"} < found
    assert set(written["families"]) == {"rotation"}


def test_what_cannot_be_used(refuses, tmp_path):
    refuses("--families fusions: expected some of fusion, trained", "--families", "fusions")
    refuses("above the resolution of float32", "--tolerances", "1e-9")
    refuses("--histories of at least 2", "--histories", "1")
    refuses("--dampings: expected values in (0, 1]", "--dampings", "0")
    refuses("--max-steps 0: at least 1", "--max-steps", "0")
    refuses("--help lists the options", "--history", "5")
    (tmp_path / "file").touch()
    refuses("file: File exists; give a folder", "--run-dir", tmp_path / "file")
