"""The weight-tied unroll of a map: so many steps, differentiated by backpropagation."""

import jax
import jax.numpy as jnp

from deq_fusion_jax.residual import FLOOR, measured
from deq_fusion_jax.state import Map, PyTree, ravel
from deq_fusion_jax.stats import SolveStats, judged


def unroll(
    f: Map, z0: PyTree, args: tuple[PyTree, ...], steps: int, tol: float, remat: bool = False
) -> tuple[PyTree, SolveStats]:
    """(f^K(z0), how far that is from a fixed point), at the cost of one more evaluation of f.

    `stats.converged` is whether the relative residual is within `tol`, which changes no step. With
    `remat` the inside of a step is computed again in the backward pass instead of stored.
    """
    step = jax.checkpoint(f, prevent_cse=False) if remat else f
    z = jax.lax.scan(lambda z, _: (step(z, *args), None), z0, length=steps)[0]
    held = jax.lax.stop_gradient((z, *args))
    _, residual = measured(ravel(f(*held)), ravel(held[0]), FLOOR)
    return z, judged(jnp.full(residual.shape, steps, jnp.int32), residual, tol)
