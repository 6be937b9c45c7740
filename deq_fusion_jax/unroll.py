"""The weight-tied unroll of a cell: so many steps, differentiated by backpropagation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.cell import as_map
from deq_fusion_jax.gradients import Adjoint
from deq_fusion_jax.iterated import Iterated
from deq_fusion_jax.residual import FLOOR, measured
from deq_fusion_jax.state import Map, PyTree, ravel
from deq_fusion_jax.stats import SolveStats, judged


class Unroll(Iterated):
    """An `Iterated` that applies its cell so many times, and is differentiated through them.

    Attributes:
      steps: K, the depth.
      tol: relative residual at which `stats.converged` is True; it changes no step. None: the
        residual, which costs one more evaluation, is not measured, and there are no statistics.
      remat: recompute the inside of a step in the backward pass instead of storing it.
    """

    steps: int = 1
    tol: float | None = 1e-4
    remat: bool = False

    def iterate(
        self,
        cell: Any,
        z0: PyTree,
        variables: PyTree,
        injection: PyTree,
        adjoint0: Adjoint | None,
    ) -> tuple[PyTree, SolveStats | None]:
        if adjoint0 is not None:
            raise ValueError(
                f"{type(self).__name__} solves no adjoint equation; adjoint0 is for DEQFusion and "
                "TokenFusion."
            )
        at_least_one(self, "steps")
        f, args = as_map(cell), (variables, injection)
        step = jax.checkpoint(f, prevent_cse=False) if self.remat else f
        z = jax.lax.scan(lambda z, _: (step(z, *args), None), z0, length=self.steps)[0]
        return z, None if self.tol is None else _distance(f, z, args, self.steps, self.tol)


def _distance(f: Map, z: PyTree, args: tuple[PyTree, ...], steps: int, tol: float) -> SolveStats:
    """How far z, reached in so many steps, is from a fixed point; no gradient."""
    held = jax.lax.stop_gradient((z, *args))
    _, residual = measured(ravel(f(*held)), ravel(held[0]), FLOOR)
    return judged(jnp.full(residual.shape, steps, jnp.int32), residual, tol)


def at_least_one(module: nn.Module, name: str) -> None:
    """Raises ValueError unless an attribute is 1 or more."""
    if (value := getattr(module, name)) < 1:
        raise ValueError(f"{type(module).__name__}({name}={value}): expected at least 1.")
