"""Where the time of a solver's step goes: the part "profile" of `experiments.benchmark`.

An accelerated step contains what a plain one does, that an evaluation of f, and that the matrix
products: what one of these programs takes beyond the one before is what it adds. The last one is a
step backwards, a vector–Jacobian product of f.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import jax

from deq_fusion_jax import Anderson, FusionState, Picard
from deq_fusion_jax.solvers import Solver
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.contenders import compiled, products
from experiments.benchmarks.problem import EPSILON, Problem
from experiments.benchmarks.timing import Contender, interleaved

STEPS = 20


def profiled(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """A row for each program: the seconds of one step, in every round and their median."""
    rows = []
    for name, seconds in interleaved(programs(problem), rounds).items():
        each = [took / STEPS for took in seconds]
        row = {"shape": problem.shape, "program": name, "seconds": each, "median": median(each)}
        rows.append(row)
    return rows


def programs(problem: Problem) -> list[Contender]:
    """Each takes `STEPS` steps."""
    arguments = problem.arguments(problem.params, problem.inputs)

    def evaluations(*arguments: PyTree) -> FusionState:
        return jax.lax.fori_loop(0, STEPS, lambda _, z: problem.f(z, *arguments), problem.start)

    def backwards(z: FusionState, *arguments: PyTree) -> FusionState:
        _, vjp = jax.vjp(lambda z: problem.f(z, *arguments), z)
        u = problem.start._replace(fused=problem.c)
        return jax.lax.fori_loop(0, STEPS, lambda _, u: vjp(u)[0], u)

    def steps_of(solver: Solver) -> Callable[..., Any]:
        return lambda *arguments: solver.solve(problem.f, problem.start, *arguments)

    image = jax.jit(evaluations)(*arguments)
    out_of_reach: Any = {"tol": 1.01 * EPSILON, "max_steps": STEPS}
    return [
        products("products", problem, STEPS, 2 * problem.shape[2] + 2),
        compiled("f", jax.jit(evaluations), *arguments),
        compiled("plain step", jax.jit(steps_of(Picard(**out_of_reach))), *arguments),
        compiled("accelerated step", jax.jit(steps_of(Anderson(**out_of_reach))), *arguments),
        compiled("backward", jax.jit(backwards), image, *arguments),
    ]
