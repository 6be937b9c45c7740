"""float32, bfloat16 and float64: the same answers to what each type allows, and their table.

"Exact" is plain iteration of the whole cell in float64, without any solver.
"""

import contextlib
import dataclasses
import io
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, FusionCell, FusionState
from deq_fusion_jax.injection import Inject
from experiments.benchmarks import types as benchmark_types
from experiments.benchmarks.types import BFLOAT16, FLOAT32, FLOAT64, PRECISIONS, WIDE_STATE

pytestmark = pytest.mark.slow  # the fixtures compile every type at every tolerance

SHAPE, TOL = (8, 64, 2), 8e-3  # TOL is the common one, and bfloat16's finest
FINEST = 1e-12  # of float64
EPS16 = float(jnp.finfo(jnp.bfloat16).eps)  # 7.8e-3
EPS32 = float(jnp.finfo(jnp.float32).eps)


@pytest.fixture(scope="module")
def problem():
    return benchmark_types.make_problem(SHAPE, 0)


@pytest.fixture(scope="module")
def command(tmp_path_factory, problem):
    """The command on a small layer: its folder, what it printed, and its contenders by case."""
    folder, out, made = tmp_path_factory.mktemp("types") / "new", io.StringIO(), {}
    compiled = benchmark_types.contender

    def kept(problem, precision, tol):
        case = precision._replace(tolerances=()), tol
        if case not in made:
            made[case] = compiled(problem, precision, tol)
        return made[case]

    # What takes time here is to compile: the finest tolerances are enough, the reference is one.
    fine = [p._replace(tolerances=p.tolerances[-1:]) for p in (FLOAT64, FLOAT32)]
    coarse = [p._replace(tolerances=()) for p in (WIDE_STATE, BFLOAT16)]
    options = f"--shape {' '.join(map(str, SHAPE))} --tol {TOL} --rounds 3 --out {folder}"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(benchmark_types, "EXACT", FINEST)
        patch.setattr(benchmark_types, "make_problem", lambda *_: problem)
        patch.setattr(benchmark_types, "contender", kept)
        patch.setattr(benchmark_types, "PRECISIONS", (*fine, *coarse))
        patch.setattr(sys, "argv", ["command", *options.split()])
        benchmark_types.main()
    return folder, out.getvalue(), made


@pytest.fixture
def found(command):
    """The solution of a precision at a tolerance."""
    made = {(precision.name, tol): one for (precision, tol), one in command[2].items()}
    return lambda precision, tol=TOL: benchmark_types.solution(made[precision.name, tol])


@pytest.fixture(scope="module")
def rows(command):
    written = json.loads((command[0] / "types.json").read_text(encoding="utf-8"))
    return {(row["type"], row["tolerance"]): row for row in written["rows"]}


@pytest.fixture(scope="module")
def iterated():
    """Jitted: (params, inputs) → z_f after 300 plain steps of the cell."""

    def walk(params, inputs):
        features = SHAPE[1]
        injection = Inject(features).apply({"params": params["inject"]}, inputs)
        cell = FusionCell(tuple(inputs), features)
        z0 = jax.tree.map(jnp.zeros_like, FusionState(injection.modalities, injection.fused))
        step = partial(cell.apply, {"params": params["cell"]}, injection=injection)
        return jax.lax.fori_loop(0, 300, lambda _, z: step(z), z0).fused

    return jax.jit(walk)


@pytest.fixture(scope="module")
def exact(problem, iterated):
    with jax.enable_x64(True):
        return np.asarray(iterated(problem.params, problem.inputs))


def distance(z, other):
    """‖z − z'‖ / ‖z'‖ [B] per sample."""
    difference = z.astype(np.float64) - other
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(other, axis=1)


def apart(gradient, other):
    """‖g − g'‖ / ‖g'‖ over parameters and over inputs."""
    flat = [
        [np.concatenate([np.ravel(x) for x in jax.tree.leaves(part)]) for part in g]
        for g in (gradient, other)
    ]
    return [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(*flat, strict=True)]


# --- the answers -----------------------------------------------------------------------------


def test_float64_reaches_the_fixed_point(found, exact):
    solution = found(FLOAT64, FINEST)
    assert solution.fused.dtype == solution.stats.residual.dtype == np.float64
    assert solution.stats.converged.all() and (solution.adjoint.failed == 0).all()
    assert distance(solution.fused, exact).max() < 1e-11


@pytest.mark.parametrize("part", [0, 1], ids=["parameters", "inputs"])
def test_the_gradient_of_float64_by_finite_differences(part, found, problem, iterated):
    draw, h = np.random.default_rng(1), 1e-6
    arguments = [problem.params, problem.inputs]
    v = jax.tree.map(lambda x: draw.normal(size=np.shape(x)), arguments[part])

    def loss(t):
        moved = list(arguments)
        moved[part] = jax.tree.map(lambda x, v: x + t * v, arguments[part], v)
        with jax.enable_x64(True):
            return np.sum(problem.c * np.asarray(iterated(*moved)))

    slope = (loss(h) - loss(-h)) / (2 * h)
    products = jax.tree.map(np.vdot, found(FLOAT64, FINEST).gradient[part], v)
    assert sum(jax.tree.leaves(products)) == pytest.approx(slope, rel=1e-6)


def test_float32_is_as_near_as_its_tolerance(found, exact):
    coarse, fine = found(FLOAT32), found(FLOAT32, 1e-6)
    assert coarse.stats.converged.all() and fine.stats.converged.all()
    assert distance(coarse.fused, exact).max() < 5 * TOL
    assert distance(fine.fused, exact).max() < 5e-6
    wide = found(FLOAT64, FINEST)
    assert max(apart(coarse.gradient, wide.gradient)) < 10 * TOL
    assert max(apart(fine.gradient, wide.gradient)) < 1e-5


def test_float32_walks_as_float64(found):
    """Above its resolution, where an error is the tolerance's, the two do the same."""
    single, double = found(FLOAT32), found(FLOAT64)
    np.testing.assert_array_equal(single.stats.steps, double.stats.steps)
    np.testing.assert_array_equal(single.adjoint.steps, double.adjoint.steps)
    assert distance(single.fused, double.fused).max() < 100 * EPS32
    assert max(apart(single.gradient, double.gradient)) < 100 * EPS32


@pytest.mark.parametrize("precision", [WIDE_STATE, BFLOAT16], ids=lambda p: p.name)
def test_bfloat16_is_as_near_as_its_resolution(precision, found, exact):
    solution = found(precision)
    assert solution.stats.converged.all() and (solution.adjoint.failed == 0).all()
    error = distance(solution.fused, exact)
    assert error.min() > 0.1 * EPS16 and error.max() < 2 * EPS16
    assert max(apart(solution.gradient, found(FLOAT64, FINEST).gradient)) < 10 * EPS16


def test_types_under_bfloat16_maps(found):
    """The state is what sets the two apart; norms, statistics and gradients are float32 in both."""
    assert found(BFLOAT16).fused.dtype == jnp.bfloat16
    assert found(WIDE_STATE).fused.dtype == np.float32
    for precision in (BFLOAT16, WIDE_STATE):
        solution = found(precision)
        assert solution.stats.residual.dtype == solution.adjoint.residual.dtype == np.float32
        assert solution.stats.residual.shape == solution.stats.steps.shape == SHAPE[:1]
        assert all(g.dtype == np.float32 for g in jax.tree.leaves(solution.gradient))
        # Finer than bfloat16 could count, so that they were taken in float32.
        residual = solution.stats.residual
        assert (residual != residual.astype(jnp.bfloat16)).all()


def test_a_wide_state_is_not_mistaken_for_a_narrow_one(problem):
    """The layer's own cell returns bfloat16, which a state in float32 may not silently become."""
    params, inputs = jax.tree.map(np.float32, (problem.params, problem.inputs))
    layer = DEQFusion(SHAPE[1], dtype=jnp.bfloat16, solver=Anderson(tol=1e-2))
    z0 = FusionState(inputs, np.float32(problem.c))
    with pytest.raises(ValueError, match=r"z0 is .*float32\[8, 64\].* f\(z0\) is .*bfloat16"):
        jax.eval_shape(lambda params: layer.apply({"params": params}, inputs, z0=z0), params)


def test_float32_stays_float32_under_x64(problem):
    params, inputs, c = jax.tree.map(np.float32, problem)

    def loss(params):
        out = DEQFusion(SHAPE[1]).apply({"params": params}, inputs)
        return jnp.sum(out.fused * c), out

    with jax.enable_x64(True):
        (value, out), gradient = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params)
    steps, *others = (out.stats.steps, out.stats.residual, value, out.fused, out.modalities)
    assert steps.dtype == np.int32
    assert {x.dtype for x in jax.tree.leaves((others, out.gates, gradient))} == {np.dtype("f4")}


def test_float32_rounds_the_parameters_too(problem):
    rounded = jax.tree.map(np.float32, problem.params)
    moved = jax.tree.map(lambda x, y: x != y, rounded["cell"], problem.params["cell"])
    assert moved["fusion"]["gate"]["kernel"].mean() > 0.99


# --- the table -------------------------------------------------------------------------------


def test_a_row_for_each_type_and_tolerance(rows):
    names = [precision.name for precision in PRECISIONS]
    cases = [(name, TOL) for name in names] + [("float64", FINEST), ("float32", 1e-6)]
    assert list(rows) == cases
    assert [rows[name, TOL]["state"] for name in names] == [
        "float64",
        "float32",
        "float32",
        "bfloat16",
    ]


def test_errors_are_those_of_the_solutions(rows, found, exact):
    for precision, tol in ((FLOAT32, TOL), (BFLOAT16, TOL), (WIDE_STATE, TOL), (FLOAT32, 1e-6)):
        row, solution = rows[precision.name, tol], found(precision, tol)
        error = distance(solution.fused, exact)
        assert row["median_error"] == pytest.approx(np.median(error), rel=1e-3)
        assert row["largest_error"] == pytest.approx(error.max(), rel=1e-3)
        gradients = [row["parameter_gradient_error"], row["input_gradient_error"]]
        want = apart(solution.gradient, found(FLOAT64, FINEST).gradient)
        np.testing.assert_allclose(gradients, want, rtol=1e-6)
        assert row["steps"] == solution.stats.steps.mean() and row["converged"] == 1
        assert row["backward_steps"] == solution.adjoint.steps.mean()


def test_times_are_medians_of_all_rounds(rows):
    base = rows["float32", TOL]["seconds"]
    for row in rows.values():
        assert len(row["seconds"]) == 3 and row["median"] == np.median(row["seconds"])
        assert row["ratio"] == pytest.approx(np.median(np.divide(row["seconds"], base)))


def test_the_table_holds_what_the_json_holds(command, rows):
    folder, printed, _ = command
    text = (folder / "types.md").read_text(encoding="utf-8")
    written = json.loads((folder / "types.json").read_text(encoding="utf-8"))
    assert text == benchmark_types.table(written) and text in printed
    assert f"Written to {folder}." in printed
    about, *lines = text.split("\n| ")
    assert "8×64, M = 2" in about and "3 rounds" in about and "tolerance 0.008" in about
    assert written["machine"]["processor"] in about and written["machine"]["device"] in about
    for line, row in zip(lines[2:], rows.values(), strict=True):
        name, *cells = [cell.strip() for cell in line.rstrip("| \n").split("|")]
        counts = cells.pop(6).split("/")
        got = [float(cell.rstrip(" %")) for cell in (*cells, *counts)]
        want = [row["tolerance"], *(row[error] for error in benchmark_types.ERRORS)]
        want += [100 * row["converged"], 1e3 * row["median"], row["ratio"]]
        want += [row["steps"], row["backward_steps"]]
        assert name == row["type"]
        np.testing.assert_allclose(got, want, rtol=0.06)


@pytest.fixture
def failing(found):
    """A solution of which the first sample has failed forward, the second backward."""
    solution = found(FLOAT32)
    stats = dataclasses.replace(solution.stats, converged=np.arange(8) != 0)
    adjoint = dataclasses.replace(solution.adjoint, failed=np.float32(np.arange(8) == 1))
    return solution._replace(stats=stats, adjoint=adjoint)


def test_a_sample_that_failed_either_way_has_not_converged(failing, found):
    row = benchmark_types.described(failing, found(FLOAT32))
    assert row["converged"] == 6 / 8 and row["largest_error"] == row["input_gradient_error"] == 0


# --- what cannot be used ---------------------------------------------------------------------


@pytest.fixture
def main(run_command):
    return partial(run_command, benchmark_types.main)


def test_what_cannot_be_used(refuses, tmp_path):
    refuses("--rounds 0: at least 1", "--rounds", 0)
    refuses("--shape 8 63 2: expected", "--shape", 8, 63, 2)
    refuses("--shape 0 64 2: expected", "--shape", 0, 64, 2)
    refuses("--tol 0.001: expected from 7.8e-03", "--tol", 1e-3)
    refuses("--tol 1: expected", "--tol", 1)
    refuses("--tol nan: expected", "--tol", "nan")
    refuses("--help lists the options", "--type", "float16")
    (tmp_path / "file").touch()
    refuses("file: File exists; give a folder", "--out", tmp_path / "file")


def test_a_problem_without_an_equilibrium_is_refused(refuses, failing, monkeypatch):
    for name in ("make_problem", "contender"):
        monkeypatch.setattr(benchmark_types, name, lambda *_: None)
    monkeypatch.setattr(benchmark_types, "solution", lambda _: failing)
    refuses("2 samples find no equilibrium in float64", "--shape", 4, 16, 1)
