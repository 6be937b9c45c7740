"""Who solves the problem of `experiments.benchmark` in JAX: ours, jaxopt, optimistix, and the
unrolled iteration; and the floor, which is its matrix products alone.

All stop at ‖f(z) − z‖ ≤ tol ‖f(z)‖: ours when every sample is there, the others when the batch as a
whole is. Their tolerance is absolute, so they are told ‖z*‖.
"""

import dataclasses
import os
import time
from functools import partial
from importlib.util import find_spec
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deq_fusion_jax import Adjoint, Anderson, DEQFusion, FusionState
from deq_fusion_jax.baselines import WeightTied
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.problem import Equilibrium, Outcome, Problem, norm, through
from experiments.benchmarks.timing import Contender

MAX_STEPS = 55  # of accelerated iterations
PLAIN_STEPS = 200  # of plain ones, which need more


def jax_contenders(problem: Problem, tol: float) -> list[Contender]:
    """Those that are installed; ours come first."""
    depth = picard_steps(problem, tol)
    return [
        ours(problem, tol, "joint", count=True),
        ours(problem, tol, "staged", count=True),
        jaxopt_anderson(problem, tol),
        jaxopt_anderson(problem, tol, bicgstab=True),
        *([optimistix_gmres(problem, tol)] if find_spec("optimistix") else []),
        unrolled(problem, depth),
        unrolled(problem, depth, checkpoint=True),
    ]


def compiled(name: str, function: Any, *arguments: PyTree, **fields: Any) -> Contender:
    """A jitted function of these arguments as a contender; `fields` are the other attributes."""
    arguments = jax.device_put(arguments)
    start = time.perf_counter()
    program = function.lower(*arguments).compile()
    took = time.perf_counter() - start
    return Contender(
        name,
        step=lambda: jax.block_until_ready(program(*arguments)),
        temporaries=program.memory_analysis().temp_size_in_bytes,
        compile_seconds=took,
        **fields,
    )


def _differentiated(
    name: str, problem: Problem, equilibrium: Equilibrium, **fields: Any
) -> Contender:
    """Value and gradient through (params, inputs) → z*, evaluations of f."""

    def read(result: Any) -> Outcome:
        (_, (z, _)), gradient = jax.device_get(result)
        return Outcome(z, gradient)

    function = problem.value_and_grad(equilibrium)
    contender = compiled(name, function, problem.params, problem.inputs, read=read, **fields)
    (_, (_, steps)), _ = contender.step()
    return dataclasses.replace(contender, forward=int(steps))


# --- ours ------------------------------------------------------------------------------------


def ours(
    problem: Problem, tol: float, schedule: str, max_steps: int = MAX_STEPS, count: bool = False
) -> Contender:
    """`DEQFusion`; `count` costs another compilation, for the evaluations of the adjoint."""
    solver = Anderson(tol=tol, max_steps=max_steps)
    layer = DEQFusion.official(problem.shape[1], solver=solver, schedule=schedule)
    backward = _adjoint_evaluations(problem, layer) if count else None
    return _layer(f"ours, {schedule}", problem, layer, backward=backward)


def _layer(name: str, problem: Problem, layer: nn.Module, **fields: Any) -> Contender:
    most = through(layer, lambda stats: jnp.max(stats.steps))
    return _differentiated(name, problem, most, **fields)


def _adjoint_evaluations(problem: Problem, layer: Any) -> int:
    """Of the slowest sample."""

    def loss(adjoint0: Adjoint) -> jax.Array:
        out = layer.apply({"params": problem.params}, problem.inputs, adjoint0=adjoint0)
        return jnp.sum(out.fused * problem.c)

    ended = jax.jit(jax.grad(loss))(Adjoint.zeros(problem.start))
    return int(jnp.max(ended.steps))


# --- other libraries -------------------------------------------------------------------------


def jaxopt_anderson(problem: Problem, tol: float, bicgstab: bool = False) -> Contender:
    """Its implicit differentiation solves normal equations by conjugate gradients; or BiCGStab."""
    import jaxopt  # not above: it warns that it is unmaintained, unless the library is there first

    name, settings = "jaxopt", ""
    options: dict[str, Any] = {}
    if bicgstab:
        # The ridge is absolute, and with the default, 1e-5, narrow layers stop short of 1e-5.
        name, settings = "jaxopt, BiCGStab", "ridge 1e-7"
        solve = partial(jaxopt.linear_solve.solve_bicgstab, tol=tol)
        options = {"ridge": 1e-7, "implicit_diff_solve": solve}
    solver = jaxopt.AndersonAcceleration(
        problem.f, history_size=6, maxiter=MAX_STEPS, tol=tol * problem.size, **options
    )

    def equilibrium(params: PyTree, inputs: PyTree) -> tuple[FusionState, Any]:
        z, state = solver.run(problem.start, *problem.arguments(params, inputs))
        return z, state.iter_num

    return _differentiated(name, problem, equilibrium, settings=settings)


def optimistix_gmres(problem: Problem, tol: float) -> Contender:
    """Plain iteration; the adjoint by GMRES, as lineax's BiCGStab breaks down on it.

    lineax's GMRES looks at its residual at restarts only, and wants the update since the last one
    below the tolerance too: early restarts cost less, but earlier than 8 it may stagnate.
    """
    os.environ.setdefault("EQX_ON_ERROR", "nan")  # a failed solve is a result, not an exception
    import lineax
    import optimistix

    # Their relative tolerance is one for every number of the state, not for its norm.
    absolute: Any = {"rtol": 0.0, "norm": optimistix.two_norm}
    gmres = lineax.GMRES(atol=tol * norm(problem.c), restart=8, **absolute)
    solver: Any = optimistix.FixedPointIteration(atol=tol * problem.size, **absolute)
    adjoint = optimistix.ImplicitAdjoint(gmres)
    options: Any = {"adjoint": adjoint, "max_steps": PLAIN_STEPS, "throw": False}

    def f(z: Any, arguments: Any) -> Any:
        return problem.f(z, *arguments)

    def equilibrium(params: PyTree, inputs: PyTree) -> tuple[FusionState, Any]:
        arguments = problem.arguments(params, inputs)
        solution: Any = optimistix.fixed_point(f, solver, problem.start, arguments, **options)
        return solution.value, solution.stats["num_steps"]

    return _differentiated("optimistix, GMRES", problem, equilibrium, settings="restart 8")


# --- without a solver ------------------------------------------------------------------------


def unrolled(problem: Problem, steps: int, checkpoint: bool = False) -> Contender:
    """Backpropagation through plain steps; `checkpoint` evaluates each of them twice."""
    layer = WeightTied.official(problem.shape[1], steps=steps, remat=checkpoint)
    name = "unrolled, checkpoint" if checkpoint else "unrolled"
    contender = _layer(name, problem, layer, backward=steps)
    return dataclasses.replace(contender, forward=2 * steps if checkpoint else steps)


def picard_steps(problem: Problem, tol: float) -> int:
    """How many plain steps bring the batch to the tolerance, at most `PLAIN_STEPS`."""

    @jax.jit
    def walk(params: PyTree, inputs: PyTree) -> jax.Array:
        arguments = problem.arguments(params, inputs)

        def size(z: FusionState) -> jax.Array:
            return jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(z)))

        def step(z: FusionState, _: None) -> tuple[FusionState, jax.Array]:
            image = problem.f(z, *arguments)
            return image, size(jax.tree.map(jnp.subtract, image, z)) / size(image)

        return jax.lax.scan(step, problem.start, length=PLAIN_STEPS)[1]

    there = np.flatnonzero(walk(problem.params, problem.inputs) <= tol)
    return int(there[0]) if len(there) else PLAIN_STEPS


def floor(problem: Problem, evaluations: int) -> Contender:
    """The products of the maps as the paper writes them, with a gate per modality: 3M + 1.

    Ours are fewer, 2M + 2: one product serves all gates.
    """
    return products("floor", problem, evaluations, 3 * problem.shape[2] + 1)


def products(name: str, problem: Problem, evaluations: int, each: int) -> Contender:
    """`each` products [B, d] × [d, d] for each of so many evaluations, one after the other."""
    features = problem.shape[1]
    keys = jax.random.split(jax.random.key(0), each)
    weights = [jax.random.normal(key, (features, features)) / features**0.5 for key in keys]

    def evaluation(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            x = x @ weight
        return x

    @jax.jit
    def loop(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        return jax.lax.fori_loop(0, evaluations, lambda _, x: evaluation(x, weights), x)

    return compiled(name, loop, problem.c, weights)
