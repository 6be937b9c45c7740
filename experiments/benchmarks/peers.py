"""The fixed points of other libraries' tests, solved and differentiated by them and by us.

    python -m experiments.benchmarks.peers            (about three minutes on two cores)

Every contender gets every problem, at the tolerance and with the most steps of the test that has
it, in float32, and in float64 as well where the test computes in it. jaxopt's solvers differentiate
implicitly by their default, conjugate gradients on the normal equations, optimistix's by its
`ImplicitAdjoint`, banax's by `Implicit` with the same solver for both equations.

Writes `results.json` and `table.md` into the run directory and prints the table. optimistix and
banax (which needs Python 3.12) are optional: `pip install optimistix banax`.
"""

import contextlib
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

from deq_fusion_jax import ConvergenceWarning
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.peers_contenders import OPTIONAL, Answer, Solve, installed, missing
from experiments.benchmarks.peers_problems import PROBLEMS, Problem, arrays, loss, reference
from experiments.benchmarks.peers_table import Row, table
from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import (
    config_to_dict,
    make_folder,
    processor,
    versions,
    write_json,
    write_text,
)

ZERO = 1e-9  # a reference below this is zero


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fixed points and gradients of the problems in other libraries' tests, theirs beside ours.

    Attributes:
      problems: which, by name.
      run_dir: where to write.
    """

    problems: tuple[str, ...] = tuple(problem.name for problem in PROBLEMS)
    run_dir: Path = Path("runs/peers")


# --- measuring -------------------------------------------------------------------------------


def measure(problems: Sequence[Problem]) -> list[Row]:
    """A row for each problem, type and contender."""
    cases = [(problem, dtype) for problem in problems for dtype in problem.types]
    contenders = installed()
    return [
        row(problem, dtype, name, make(problem))
        for problem, dtype in track(cases, "solving")
        for name, make in contenders.items()
    ]


def row(problem: Problem, dtype: str, contender: str, solve: Solve) -> Row:
    """How near a contender came to the reference, and what it says of that.

    value and gradient are errors, or say in words why there is none.
    """
    want = reference(problem)
    with jax.enable_x64(dtype == "float64"):
        z0, args = arrays((problem.z0, problem.args), dtype)

        def objective(args: PyTree) -> tuple[Any, Answer]:
            answer = solve(z0, args)
            return loss(answer.z), answer

        found = attempted(jax.grad(objective, has_aux=True), args)
        # Where the gradient raises there may still be a value.
        stopped = isinstance(found, str)
        found, answer = (found, attempted(partial(solve, z0), args)) if stopped else found
    told = isinstance(answer, Answer)
    converged = told and bool(answer.converged)
    value = error(answer.z, want.z) if told else answer
    gradient = found if stopped else error(found, want.gradient)
    return {
        "problem": problem.name,
        "type": dtype,
        "contender": contender,
        "converged": converged,
        "evaluations": answer.evaluations if told else None,
        "value": value,
        "gradient": gradient,
        "value_near": converged and near(value, want.allowed / scale(want.z)),
        "gradient_near": converged and near(gradient, want.allowed_gradient / scale(want.gradient)),
    }


def attempted(function: Callable[..., Any], args: PyTree) -> Any:
    """The result of a jitted function, or what stops it."""
    with quietly():
        try:
            return jax.device_get(jax.jit(function)(args))
        except jax.errors.JaxRuntimeError as stopped:  # optimistix's adjoint, where z is infinite
            return f"raises {type(stopped).__name__}"


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what the table tells: our warning of a failed solve, JAX's log of one that raises."""
    log = logging.getLogger("jax._src.callback")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            yield
    finally:
        log.disabled = before


def error(got: PyTree, want: PyTree) -> float | str | None:
    """The largest error by the largest number of the reference; None where there are none."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    if not pairs:
        return None
    largest = float(np.max([np.max(np.abs(found.astype(float) - want)) for found, want in pairs]))
    return largest / scale(want) if math.isfinite(largest) else "not finite"


def scale(tree: PyTree) -> float:
    """The largest number; 1 where all are zero, and errors absolute."""
    largest = max((float(np.max(np.abs(x))) for x in jax.tree.leaves(tree)), default=0.0)
    return largest if largest > ZERO else 1.0


def near(found: float | str | None, bound: float) -> bool:
    return isinstance(found, float) and found <= 1.1 * bound + ZERO  # of first order only


def described(problem: Problem) -> Row:
    want = reference(problem)
    return {
        "problem": problem.name,
        "source": problem.source,
        "numbers": sum(np.size(x) for x in jax.tree.leaves(problem.z0)),
        "tol": problem.tol,
        "max_steps": problem.max_steps,
        "condition": float(want.condition),
        "allowed": float(want.allowed / scale(want.z)),
        "allowed_gradient": float(want.allowed_gradient / scale(want.gradient)),
    }


# --- the command -----------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> Config:
    """The options.

    Raises:
      InputError: one of them cannot be used.
    """
    config = parse(Config(), args, "python -m experiments.benchmarks.peers")
    names = [problem.name for problem in PROBLEMS]
    if not config.problems:
        raise InputError(f"--problems: expected some of {', '.join(names)}")
    for name in config.problems:
        if name not in names:
            raise InputError(f"--problems {name}: expected some of {', '.join(names)}")
    return config


def run(config: Config) -> Row:
    """Measures, and writes into the run directory; what `results.json` holds."""
    make_folder(config.run_dir, "--run-dir")
    start = time.monotonic()
    problems = [problem for problem in PROBLEMS if problem.name in config.problems]
    # On a GPU float32 products would otherwise be rounded to 10 bits.
    with jax.default_matmul_precision("highest"):
        rows = measure(problems)
    results = {
        "config": config_to_dict(config),
        "machine": {"processor": processor(), **versions(), **peers()},
        "seconds": time.monotonic() - start,
        "problems": [described(problem) for problem in problems],
        "rows": rows,
    }
    write_json(config.run_dir / "results.json", results)
    write_text(config.run_dir / "table.md", table(results))
    return results


def peers() -> dict[str, str]:
    """Versions of the optional ones."""
    absent = missing()
    return {n: "not installed" if n in absent else metadata.version(n) for n in OPTIONAL}


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    results = run(config)
    print(table(results))
    print(f"Done in {results['seconds']:.0f} s; written to {config.run_dir}.")


if __name__ == "__main__":
    main()
