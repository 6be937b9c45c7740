"""How far f(z) is from z, sample by sample, at every scale."""

from typing import Any

import jax
import jax.numpy as jnp

# By default a state counts as zero where its norm is below this: atol = FLOOR × tol.
FLOOR = 1e-9


def measured(fz: jax.Array, z: jax.Array, floor: Any) -> tuple[jax.Array, jax.Array]:
    """‖f(z) − z‖ and ‖f(z) − z‖ / (‖f(z)‖ + floor) per row of [B, N] matrices; 0 / 0 is 0."""
    limits = jnp.finfo(z.dtype)

    def scaled() -> tuple[jax.Array, jax.Array]:
        largest = jnp.max(jnp.maximum(jnp.abs(fz), jnp.abs(z)), axis=1, initial=0) + limits.tiny
        scale = largest[:, None]
        step = row_norm((fz - z) / scale)
        residual = step / (row_norm(fz / scale) + floor / largest + limits.tiny)
        # Past this size 1 / size is denormal, and the quotients would be flushed to 0.
        usable = largest < 0.01 * limits.max
        return jnp.where(usable, step * largest, jnp.inf), jnp.where(usable, residual, jnp.inf)

    # Squares of small or large states leave the range of float32; such rows are scaled first.
    step, size = row_norm(fz - z), row_norm(fz)
    low, high = limits.tiny**0.25, limits.max**0.25
    in_range = (size > low) & (size < high) & (step < high)
    simple = step, step / (size + floor)
    return jax.lax.cond(
        jnp.all(in_range),
        lambda: simple,
        lambda: tuple(jnp.where(in_range, *pair) for pair in zip(simple, scaled(), strict=True)),
    )


def row_norm(x: jax.Array) -> jax.Array:
    """‖x_b‖ [B] of the rows of x [B, N]."""
    return jnp.sqrt(jnp.sum(x * x, axis=1))
