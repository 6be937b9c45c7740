"""What a sample adds to a gradient that is unknown: nothing, and a warning.

`without_nan` keeps its NaN from sums over samples; `warn_of` says at run time how many there are.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from deq_fusion_jax.stats import ConvergenceWarning


def without_nan(linear: Any, lost: jax.Array) -> tuple[Any, jax.Array]:
    """A linear map without NaN and infinite coefficients, and the samples [B] whose they were.

    A cotangent of zero times NaN is NaN, and sums over samples spread it. Coefficients belong to
    the samples along an axis that has the length of the batch, or along the first one if that is a
    multiple of it. Where there are several such axes NaN stays, and is seen, unless along one of
    them it is that of samples `lost` [B] alone.
    """
    leaves, treedef = jax.tree.flatten(linear)
    undefined = lost & False
    for k, x in enumerate(leaves):
        axes = _batch_axes(x.shape, lost.shape[0])
        if not jnp.issubdtype(x.dtype, jnp.floating) or not axes:
            continue
        finite = jnp.isfinite(x)
        bad = [~jnp.all(_rows(finite, axis, lost.shape[0]), axis=1) for axis in axes]
        if len(axes) == 1:
            undefined |= bad[0]
            leaves[k] = jnp.where(finite, x, 0)
            continue
        known = jnp.asarray(False)
        for each in bad:
            explained = ~jnp.any(each & ~lost)
            undefined |= each & explained
            known |= explained
        leaves[k] = jnp.where(finite | ~known, x, 0)
    return jax.tree.unflatten(treedef, leaves), undefined


def _batch_axes(shape: tuple[int, ...], batch: int) -> list[int]:
    """The axes along which an array may have one part for each sample."""
    if not shape or batch == 0:
        return []
    if batch == 1:
        return [0]
    # By == alone, which symbolic sizes of `jax.export` allow.
    several = shape[0] != batch and shape[0] % batch == 0
    return [0] * several + [axis for axis, size in enumerate(shape) if size == batch]


def _rows(x: jax.Array, axis: int, batch: int) -> jax.Array:
    """[B, …] with the parts of every sample."""
    return jnp.moveaxis(x, axis, 0).reshape(batch, x.size // batch)


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
