"""`deq_fixed_point`: z* = f(z*, *args) as a differentiable function of args."""

from functools import partial

import jax
import jax.numpy as jnp

from deq_fusion_jax.gradients import Adjoint, GradientRule, Implicit
from deq_fusion_jax.solvers import Anderson, Solver, as_solver
from deq_fusion_jax.state import Map, PyTree, check_state, describe, kind, varying
from deq_fusion_jax.stats import SolveStats


def deq_fixed_point(
    f: Map,
    z0: PyTree,
    *args: PyTree,
    solver: Solver = Anderson(tol=1e-4, max_steps=50),
    gradient: GradientRule = Implicit(),
    adjoint0: Adjoint | None = None,
) -> tuple[PyTree, SolveStats]:
    r"""The fixed point of f for every sample of a batch, differentiated implicitly:

    $$z^⋆ = f(z^⋆, θ),$$

    with θ for `args`. A sample is done when over its whole state

    $$‖f(z, θ) − z‖ / ‖f(z, θ)‖ ≤ \mathtt{tol}.$$

    It then stays as it is, so a sample gets the same answer alone and in any batch, as long as f
    itself treats the samples independently. A sample that does not get there returns its best
    finite iterate and has `stats.converged` False. The residual is relative, so $z^⋆ = 0$ is only
    reached exactly, and a map such as z + 1, which has no fixed point, may pass once z is large.

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import deq_fixed_point
        >>> def f(z, a):
        ...     return jnp.cos(a * z)
        >>> a = jnp.array([[1.0], [0.5]])
        >>> z_star, stats = deq_fixed_point(f, jnp.zeros((2, 1)), a)
        >>> [f"{value:.2f}" for value in z_star[:, 0]], stats.converged.tolist()
        (['0.74', '0.90'], [True, True])

    Args:
      f: the map `(z, *args)` → z, each sample for itself. It may close over traced values, and
        they get their gradients; it must not change them. Traced once.
      z0: where the iteration starts: a pytree of real floating-point arrays [B, …]; a state
        without a batch axis needs one, `z0[None]`. Its gradient is zero, since $z^⋆$ does not
        depend on it. Give the last solution for a warm start.
      *args: pytrees of arrays, passed on to f. Differentiated in reverse mode, any number of
        times. Forward mode raises JAX's own TypeError for a custom_vjp function.
      solver: `Picard`, `Anderson` or `Broyden`, or one of jaxopt's fixed-point solver objects.
      gradient: `Implicit`, `Phantom` or `Unrolled`.
      adjoint0: where the backward solve of `Implicit` starts; its gradient is, by definition, how
        that solve ended. See `Adjoint`.

    Returns:
      z_star: like z0.
      stats: `SolveStats`, per sample and without gradient.

    Raises:
      ValueError: z0 is not a batch of floating-point arrays, f(z0) differs from z0 in structure,
        shape or dtype, so does adjoint0.u, or solver.tol is below the dtype's resolution.
      TypeError: solver is no solver, or gradient no gradient rule.
    """
    if isinstance(gradient, type) or not hasattr(gradient, "pullback"):
        raise TypeError(f"gradient is {gradient!r}; expected Implicit(), Phantom() or Unrolled().")
    z0 = jax.tree.map(jnp.asarray, z0)
    check_state(z0)
    if adjoint0 is not None and kind(adjoint0.u) != kind(z0):
        raise ValueError(f"adjoint0.u is {describe(adjoint0.u)}, but z0 is {describe(z0)}.")
    # One trace of f serves every later evaluation, and lifts what f closes over to arguments,
    # where custom_vjp can see it.
    closed, out = jax.make_jaxpr(f, return_shape=True)(z0, *args)
    if kind(out) != kind(z0):
        raise ValueError(
            f"f must map z to its like, but z0 is {describe(z0)} and f(z0) is {describe(out)}. "
            "The first axis of every array is the batch."
        )
    z0 = varying(z0, closed.out_avals)
    jaxpr, treedef = closed.jaxpr, jax.tree.structure(z0)
    jaxpr = jaxpr.replace(constvars=(), invars=(*jaxpr.constvars, *jaxpr.invars))

    def lifted(z: PyTree, args: tuple[PyTree, ...], consts: list[jax.Array]) -> PyTree:
        leaves = jax.tree.leaves((z, *args))
        return jax.tree.unflatten(treedef, jax.core.eval_jaxpr(jaxpr, (), *consts, *leaves))

    return _fixed_point(lifted, as_solver(solver), gradient, z0, adjoint0, args, closed.consts)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _fixed_point(f, solver, gradient, z0, adjoint0, *args):
    return solver.solve(f, z0, *args)


def _forward(f, solver, gradient, z0, adjoint0, *args):
    # Through the rule above and not its body, so that this pass can be differentiated again.
    z_star, stats = _fixed_point(f, solver, gradient, z0, adjoint0, *args)
    return (z_star, stats), (z0, adjoint0, z_star, args)


def _backward(f, solver, gradient, saved, cotangents):
    z0, adjoint0, z_star, args = saved
    g, _ = cotangents
    bars = gradient.pullback(f, z0, z_star, args, g, deq_fixed_point, solver, adjoint0)
    return jax.tree.map(jnp.zeros_like, z0), *bars


_fixed_point.defvjp(_forward, _backward)
