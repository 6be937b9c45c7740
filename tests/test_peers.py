"""``python -m experiments.benchmarks.peers``: the problems, what is found, what is written."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.special import lambertw

from deq_fusion_jax import Anderson, deq_fixed_point
from deq_fusion_jax.state import PyTree
from experiments.benchmarks import peers
from experiments.benchmarks.peers_contenders import CONTENDERS, Answer, installed, ours
from experiments.benchmarks.peers_problems import (
    PROBLEMS,
    Problem,
    arrays,
    flat_map,
    loss,
    reference,
    root,
    scaled,
)

BY_NAME = {problem.name: problem for problem in PROBLEMS}
FIXED_COSINE = 0.7390851332151607  # Dottie's number


def trapezoid(factor):
    start = np.linspace(-1, 1, 100) ** 2
    half, constant = 1 - factor / 2, factor * (start + (start - start**2) / 2)
    return (np.sqrt(half**2 + 2 * factor * constant) - half) / factor


def affine(A, b):
    return np.linalg.solve(np.eye(b.size) - A, b)


EXACT = {
    "halfway to 1": lambda slope, height: height / (1 - slope),
    "shifted cosine": lambda shift: np.array([FIXED_COSINE, np.pi / 2]),
    "affine 10": affine,
    "affine 200": affine,
    "rotations": lambda angles, centre: centre,
    "cosine": lambda rate: np.full(28, FIXED_COSINE),
    "exponential": lambda rate: np.full(28, lambertw(rate).real / rate),
    "trapezoid": trapezoid,
    "line": lambda slope, height: height / (1 - slope),
    "steep line": lambda slope, height: height / (1 - slope),
    "affine 2": affine,
    "two lines": lambda slopes, heights: np.array([2.0, 4.0]),
}
# Those whose maps are much like another's.
ALIKE = {"halfway to 1", "powers", "flat landscape", "affine 200", "cosine", "exponential"}
ALIKE |= {"midpoint value", "midpoint increment", "Robertson value", "Robertson slope"}
ALIKE |= {"line", "steep line", "affine 2", "tanh 1", "tanh 0.7"}
EVERY_PROBLEM = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in BY_NAME],
)
NO_CLOSED_FORM = {"perceptron", "tanh 1", "tanh 0.7"}  # all others are zero


@pytest.fixture
def main(run_command):
    return partial(run_command, peers.main)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@EVERY_PROBLEM
def test_the_reference(name, x64):
    problem = BY_NAME[name]
    want, args = reference(problem), arrays(problem.args)
    z, (f, whole) = flat(want.z), flat_map(problem)
    np.testing.assert_allclose(f(z, args), z, rtol=1e-14, atol=1e-14)
    if name not in NO_CLOSED_FORM:
        exact = EXACT.get(name, lambda *_: np.zeros(z.size))(*problem.args)
        np.testing.assert_allclose(z, np.ravel(exact), rtol=1e-13, atol=1e-15)

    # Along a random direction, by central differences of Newton's own fixed points.
    at, unravel = ravel_pytree(args)
    direction = np.random.default_rng(0).normal(size=at.size) * np.asarray(abs(at) + (at == 0))
    shifted = jax.jit(lambda h: loss(whole(root(problem, unravel(at + h * direction)))))
    slope = (shifted(1e-6) - shifted(-1e-6)) / 2e-6
    assert flat(want.gradient) @ direction == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


@EVERY_PROBLEM
def test_ours_is_as_near_as_the_tolerance_allows(name):
    """A row of the table; in float64 where there is one."""
    problem = BY_NAME[name]
    found = peers.row(problem, problem.types[-1], "ours", ours(problem))
    assert found["converged"] and 1 < found["evaluations"] <= problem.max_steps
    assert found["value_near"] and found["value"] < 0.011
    assert found["gradient_near"] if problem.args else found["gradient"] is None


def test_slow_modes_take_few_evaluations():
    """What BENCHMARK.md says of the geometric decay; plain iteration takes some 3,000."""
    problem = BY_NAME["geometric decay"]

    @partial(jax.jit, static_argnums=0)
    def steps(solver):
        f = lambda z: scaled(z, *problem.args)  # noqa: E731
        return deq_fixed_point(f, arrays(problem.z0[None], "float32"), solver=solver)[1].steps[0]

    assert steps(Anderson(problem.tol, problem.max_steps, atol=problem.tol)) <= 12
    assert steps(Anderson(problem.tol, problem.max_steps)) <= 20


@pytest.mark.parametrize("contender", installed())
def test_evaluations_are_those_that_take_place(contender):
    problem, count = BY_NAME["two lines"], []

    def counted(z, *args):
        jax.debug.callback(lambda: count.append(1))
        return problem.f(z, *args)

    make = CONTENDERS[contender]
    solve = make(Problem(**{**vars(problem), "f": counted}))
    args = arrays(problem.args, "float32")
    answer = jax.block_until_ready(jax.jit(solve)(arrays(problem.z0, "float32"), args))
    jax.effects_barrier()
    assert answer.evaluations is None or answer.evaluations == len(count)


def failing(problem: Problem, error: type[Exception] = jax.errors.JaxRuntimeError):
    """Diverges, says so, and has no gradient."""

    @jax.custom_vjp
    def solve(z0: PyTree, args: PyTree) -> Answer:
        return Answer(jax.tree.map(lambda z: z + np.inf, z0), False, 3)

    def refuse(*_):
        raise error("infinite")

    solve.defvjp(lambda *inputs: (solve(*inputs), None), refuse)
    return solve


class TestCommand:
    def test_what_it_writes(self, main, tmp_path, monkeypatch):
        monkeypatch.setattr(peers, "installed", lambda: {"ours": ours, "theirs": failing})
        monkeypatch.setattr(peers, "missing", lambda: ["banax", "optimistix"])
        status, out, err = main("--problems", "line", "powers", "--run-dir", tmp_path / "run")
        assert status == 0, err
        text = (tmp_path / "run" / "table.md").read_text(encoding="utf-8")
        assert text in out
        assert "not installed: optimistix, banax; `pip install optimistix banax`" in text
        problems, values, gradients = (
            {line.split("|")[1].strip(): line.split("|")[2:-1] for line in part.splitlines()[2:]}
            for part in text.split("\n\n")
            if part.startswith("| problem")
        )
        assert set(problems) == set(values) == set(gradients) == {"line", "powers"}
        assert [cell.strip() for cell in problems["line"]][:4] == ["banax", "1", "1e-06", "200"]
        assert values["line"][1].strip() == "not finite (3) *"
        assert gradients["line"][1].strip() == "raises JaxRuntimeError *"
        assert gradients["powers"][0].strip() == "–"

        written = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
        row = written["rows"][0]
        assert (row["problem"], row["contender"], row["converged"]) == ("powers", "ours", True)
        assert peers.table(written) == text
        assert written["machine"]["banax"] == "not installed"

    def test_an_error_that_is_not_known_is_not_hidden(self, tmp_path):
        problem = BY_NAME["line"]
        with pytest.raises(TypeError, match="infinite"):
            peers.row(problem, "float32", "theirs", failing(problem, TypeError))

    def test_what_cannot_be_used(self, refuses, tmp_path):
        refuses("--problems lines: expected some of geometric decay,", "--problems", "lines")
        refuses("--problems: expected some of geometric decay,", "--problems")
        refuses("--help lists the options", "--speed")
        (tmp_path / "file").touch()
        refuses("file: File exists; give a folder", "--run-dir", tmp_path / "file")
