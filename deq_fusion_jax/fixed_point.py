"""`deq_fixed_point`: z* = f(z*, *args) as a differentiable function of args."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from deq_fusion_jax.gradients import Adjoint, GradientRule, Implicit, Solved
from deq_fusion_jax.program import Bound, trace
from deq_fusion_jax.solvers import Anderson, Solver, as_solver
from deq_fusion_jax.state import Map, PyTree, check_state, describe, kind
from deq_fusion_jax.static import lift, restore, split_arrays


def deq_fixed_point(
    f: Map,
    z0: PyTree,
    *args: PyTree,
    solver: Solver = Anderson(tol=1e-4, max_steps=50),
    gradient: GradientRule = Implicit(),
    adjoint0: Adjoint | None = None,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    r"""The fixed point of f for every sample of a batch, differentiated implicitly:

    $$z^⋆ = f(z^⋆, θ),$$

    with θ for `args` and for what f closes over. A sample has converged when over its whole state

    $$‖f(z, θ) − z‖ ≤ \mathtt{atol} + \mathtt{tol} ‖f(z, θ)‖.$$

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import deq_fixed_point
        >>> def f(z, a):
        ...     return jnp.cos(a * z)
        >>> @jax.jit
        ... def solve(a):
        ...     return deq_fixed_point(f, jnp.zeros_like(a), a)
        >>> z_star, stats = solve(jnp.array([[1.0], [0.5]]))
        >>> [f"{value:.2f}" for value in z_star[:, 0]], stats.converged.tolist()
        (['0.74', '0.90'], [True, True])

    **The batch.** The first axis of every array of the state is the batch. A row is a sample: it
    has its own residual, mixing, stopping and statistics, and at its tolerance it rests. So it gets
    the same answer alone and in any batch, if f treats the rows independently. If f lets them read
    one another, as the nodes of a graph do, the answer is no less true: a row at rest is measured
    in every evaluation, and goes on if the others moved it off its tolerance; `converged` is what
    one evaluation at the returned state says. But rows are mixed each for itself, which may fail
    where mixing all as one sample succeeds: give such a state a batch axis of 1, `z0[None]`.

    **Put it in `jax.jit`**, with the arrays as arguments. It works without; then f is traced in
    every call, and compiled once for equal maps and shapes.

    **When it fails.** A sample that does not converge returns its best finite iterate, the one with
    the smallest ‖f(z) − z‖. `stats.status` says why it ended, and `stats.raise_if_failed()` raises
    and says what to try. It adds nothing to gradients, and a gradient that asks for it issues a
    `ConvergenceWarning`; see `Implicit`. A map without a fixed point, such as z + 1, may pass where
    z is so large that the step is within the tolerance.

    On a mesh the batch may be sharded over Auto and Explicit axes. In `jax.shard_map` and
    `jax.pmap` the devices stop each by itself, and together where f communicates.

    Args:
      f: the map `(z, *args)` → z, traced once. It may close over traced values, and they get their
        gradients; it must not change them.
      z0: where the iteration starts: a pytree of real floating-point arrays [B, …]. Its gradient is
        zero, since $z^⋆$ does not depend on it. Give the last solution for a warm start.
      *args: pytrees, passed on to f. Arrays and floats are differentiated, in forward and reverse
        mode, any number of times. Other leaves, such as functions, strings, bools and ints, f gets
        as they are.
      solver: `Picard`, `Anderson` or `Broyden`, or one of jaxopt's fixed-point solver objects. Its
        tol, atol and max_steps may be arrays, known at run time only.
      gradient: `Implicit`, `Phantom` or `Unrolled`.
      adjoint0: where the backward solve of `Implicit` starts; its gradient is, by definition, how
        that solve ended. See `Adjoint`.
      has_aux: whether f returns (z, aux).

    Returns:
      z_star: like z0.
      stats: `SolveStats`, per sample and without gradient.
      aux: with `has_aux`, that of one more evaluation of f, at z_star, with gradients.

    Raises:
      ValueError: z0 is not a batch of floating-point arrays, f(z0) differs from z0 in structure,
        shape or dtype, so does adjoint0.u, or solver.tol is below the dtype's resolution.
      TypeError: solver is no solver, or gradient no gradient rule.
    """
    if isinstance(gradient, type) or not hasattr(gradient, "tangent"):
        raise TypeError(f"gradient is {gradient!r}; expected Implicit(), Phantom() or Unrolled().")
    z0 = jax.tree.map(jnp.asarray, z0)
    check_state(z0)
    if adjoint0 is not None and kind(adjoint0.u) != kind(z0):
        raise ValueError(f"adjoint0.u is {describe(adjoint0.u)}, but z0 is {describe(z0)}.")
    arrays, whole = split_arrays(args)

    def on_arrays(z: PyTree, arrays: list[jax.Array]) -> PyTree:
        out = f(z, *whole(arrays))
        return out[0] if has_aux else out

    z0, program, consts = trace(on_arrays, z0, arrays)
    leaves = [*consts, *arrays]
    theta = [x if _differentiable(x) else None for x in leaves]
    fixed = [None if _differentiable(x) else x for x in leaves]
    (solver, gradient), options = lift((as_solver(solver), gradient))
    z_star, stats = _compiled(program, solver, gradient, z0, adjoint0, options, fixed, theta)
    return (z_star, stats, f(z_star, *args)[1]) if has_aux else (z_star, stats)


def _differentiable(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fixed_point(program, solver, gradient, z0, adjoint0, options, fixed, theta):
    solver, _ = restore((solver, gradient), options)
    return solver.solve(Bound(program, fixed), z0, theta)


@partial(_fixed_point.defjvp, symbolic_zeros=True)
def _tangent(program, solver, gradient, primals, tangents):
    # Through the rule and not its body, so that the value can be differentiated again.
    z_star, stats = _fixed_point(program, solver, gradient, *primals)
    z0, adjoint0, options, fixed, theta = primals
    solver, gradient = restore((solver, gradient), options)
    f = Bound(program, fixed)
    solved = Solved(f, z0, z_star, theta, stats, solver, deq_fixed_point, adjoint0)
    _, dadjoint, _, _, dtheta = tangents
    watched = not all(isinstance(x, SymbolicZero) for x in jax.tree.leaves(dadjoint))
    dadjoint = jax.tree.map(_instantiated, dadjoint, adjoint0) if watched else None
    dz = gradient.tangent(solved, jax.tree.map(_instantiated, dtheta, theta), dadjoint)
    return (z_star, stats), (dz, jax.tree.map(_without_tangent, stats))


def _instantiated(tangent: Any, primal: jax.Array) -> jax.Array:
    return jnp.zeros_like(primal) if isinstance(tangent, SymbolicZero) else tangent


def _without_tangent(x: jax.Array) -> SymbolicZero:
    return SymbolicZero(jax.typeof(x).to_tangent_aval())


# One program for equal maps, so that eager calls compile once; no boundary inside another jit.
_compiled = jax.jit(_fixed_point, static_argnums=(0, 1, 2), inline=True)
