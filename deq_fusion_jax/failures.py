"""What a sample adds to a gradient that is unknown: nothing, and a warning.

`without_nan` keeps its NaN from sums over samples; `warn_of` says at run time how many there are.
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from deq_fusion_jax.stats import ConvergenceWarning


def without_nan(linear: Any, undefined: jax.Array) -> tuple[Any, jax.Array]:
    """A linear map without NaN and infinite coefficients, and `undefined` [B] or whose they were.

    A cotangent of zero times NaN is NaN, and sums over samples spread it. Coefficients belong to
    the samples if one axis has the length of the batch, or the first one a multiple of it.
    """
    batch = undefined.shape[0]
    leaves, treedef = jax.tree.flatten(linear)
    for k, x in enumerate(leaves):
        axes = [axis for axis, size in enumerate(x.shape) if size == batch]
        multiple = not axes and x.ndim and batch and x.shape[0] % batch == 0
        if not jnp.issubdtype(x.dtype, jnp.floating) or (len(axes) != 1 and not multiple):
            continue
        finite = jnp.isfinite(x)
        leaves[k] = jnp.where(finite, x, 0)
        rows = finite if multiple else jnp.moveaxis(finite, axes[0], 0)
        rows = rows.reshape(batch, math.prod(rows.shape) // batch if batch else 0)
        undefined |= ~jnp.all(rows, axis=1)
    return jax.tree.unflatten(treedef, leaves), undefined


def warn_of(failed: jax.Array, on_failure: str) -> None:
    """A `ConvergenceWarning` at run time if any sample [B] failed, and nothing else."""

    def warn(count: Any, total: Any) -> None:
        added = "add nothing to it" if on_failure == "zero" else "are used as they are"
        warnings.warn(
            f"The gradient of {int(count)} of {int(total)} samples is unknown: their fixed point "
            f"or their adjoint equation missed its tolerance, or f has no finite derivative. They "
            f"{added}. stats.status and an Adjoint tell which; see Implicit(on_failure=…).",
            ConvergenceWarning,
            stacklevel=2,
        )

    @jax.custom_batching.custom_vmap
    def report(count: jax.Array, total: jax.Array) -> jax.Array:
        def speak() -> None:
            jax.debug.callback(warn, count, total)

        jax.lax.cond(count > 0, speak, lambda: None)
        return count

    @report.def_vmap
    def _(axis_size: int, batched: list[bool], count: Any, total: Any) -> Any:
        return report(jnp.sum(count), total * axis_size), False

    report(jnp.sum(failed), jnp.asarray(failed.size))
