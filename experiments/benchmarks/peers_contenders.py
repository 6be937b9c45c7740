"""Who solves the problems of `experiments.benchmarks.peers`, each in its library's own way."""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax

from deq_fusion_jax import Anderson, deq_fixed_point
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.peers_problems import Problem


class Answer(NamedTuple):
    """What a solver found, and says of itself; evaluations of f where it tells."""

    z: PyTree
    converged: Any
    evaluations: Any


Solve = Callable[[PyTree, tuple[PyTree, ...]], Answer]


def ours(problem: Problem, relative: bool = False) -> Solve:
    """The tolerance is one of the others' kind, absolute as well; or as by default, relative."""
    atol = None if relative else problem.tol
    solver = Anderson(tol=problem.tol, atol=atol, max_steps=problem.max_steps)

    def solve(z0: PyTree, args: tuple[PyTree, ...]) -> Answer:
        def f(z: PyTree, *args: PyTree) -> PyTree:
            return batch(problem.f(sample(z), *args))

        z, stats = deq_fixed_point(f, batch(z0), *args, solver=solver)
        return Answer(sample(z), stats.converged[0], stats.steps[0])

    return solve


def batch(z: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[None], z)


def sample(z: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x[0], z)


def jaxopt_solver(problem: Problem, name: str) -> Solve:
    """The tolerance is absolute. Anderson's settings are those of jaxopt's test."""
    import jaxopt  # not above: it warns that it is unmaintained, unless the library is there first

    mixing = {"history_size": problem.history, "ridge": problem.ridge}
    options: dict[str, Any] = mixing if name == "AndersonAcceleration" else {}
    make = getattr(jaxopt, name)
    solver = make(problem.f, tol=problem.tol, maxiter=problem.max_steps, **options)

    def solve(z0: PyTree, args: tuple[PyTree, ...]) -> Answer:
        z, state = solver.run(z0, *args)
        return Answer(z, state.error <= solver.tol, state.num_fun_eval)

    return solve


def optimistix_solver(problem: Problem, name: str) -> Solve:
    """The tolerance is relative and absolute, for every number of the state."""
    import optimistix

    solver = getattr(optimistix, name)(rtol=problem.tol, atol=problem.tol)
    options: dict[str, Any] = {"max_steps": problem.max_steps, "throw": False}

    def solve(z0: PyTree, args: tuple[PyTree, ...]) -> Answer:
        found = optimistix.fixed_point(
            lambda z, args: problem.f(z, *args), solver, z0, args, **options
        )
        converged = found.result == optimistix.RESULTS.successful
        # A step of Newton's method is an evaluation and a Jacobian.
        plain = name == "FixedPointIteration"
        return Answer(found.value, converged, found.stats["num_steps"] if plain else None)

    return solve


def banax_solver(problem: Problem, name: str) -> Solve:
    """The tolerance is absolute, as in banax's tests."""
    from banax import Result, adjoint, solver, trace_count

    make = getattr(solver, name)
    chosen = make(atol=problem.tol, rtol=0.0, max_steps=problem.max_steps)
    implicit = adjoint.Implicit(solver=chosen, b_solver=chosen)

    def solve(z0: PyTree, args: tuple[PyTree, ...]) -> Answer:
        found = implicit((problem.f, args), z0, trace=trace_count())
        return Answer(found.value, found.result == Result.CONVERGED, found.trace)

    return solve


CONTENDERS: dict[str, Callable[[Problem], Solve]] = {
    "ours": ours,
    "ours, relative": partial(ours, relative=True),
    "jaxopt, Anderson": partial(jaxopt_solver, name="AndersonAcceleration"),
    "jaxopt, plain": partial(jaxopt_solver, name="FixedPointIteration"),
    "optimistix, plain": partial(optimistix_solver, name="FixedPointIteration"),
    "optimistix, Newton": partial(optimistix_solver, name="Newton"),
    "banax, Anderson": partial(banax_solver, name="Anderson"),
    "banax, Picard": partial(banax_solver, name="Picard"),
}
OPTIONAL = ("optimistix", "banax")


def missing() -> list[str]:
    return [package for package in OPTIONAL if find_spec(package) is None]


def installed() -> dict[str, Callable[[Problem], Solve]]:
    absent = missing()
    return {name: make for name, make in CONTENDERS.items() if name.split(",")[0] not in absent}
