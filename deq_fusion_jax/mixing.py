"""Small linear algebra over remembered vectors, one problem per sample of a batch."""

import jax
import jax.numpy as jnp

from deq_fusion_jax.state import zeros_placed


def ring_like(z: jax.Array, m: int) -> jax.Array:
    """Zeros [B, m, N] for the last m of vectors like z [B, N]; sharded as z is."""
    batch, n = z.shape
    return jnp.broadcast_to(zeros_placed(z)[:, None], (batch, m, n))


def put(ring: jax.Array, x: jax.Array, slot: jax.Array, axis: int) -> jax.Array:
    """The ring with x at `slot` of an axis."""
    return jax.lax.dynamic_update_index_in_dim(ring, x, slot, axis)


def products(vectors: jax.Array, x: jax.Array) -> jax.Array:
    """⟨v_j, x⟩ [B, m] per sample, from v [B, m, N] and x [B, N]."""
    return jnp.einsum("bmn,bn->bm", vectors, x, precision=jax.lax.Precision.HIGHEST)


def along(x: jax.Array, y: jax.Array) -> jax.Array:
    """⟨x, y⟩ [B] per sample, from [B, N] each."""
    return jnp.einsum("bn,bn->b", x, y, precision=jax.lax.Precision.HIGHEST)


def combination(weights: jax.Array, vectors: jax.Array) -> jax.Array:
    """Σ_j w_j v_j [B, N] per sample, from w [m, B] and v [B, m, N]; as one loop over the sum."""
    first, *rest = (w[:, None] * vectors[:, j] for j, w in enumerate(weights))
    return sum(rest, first)


def mixing_weights(
    gram: jax.Array, projection: jax.Array, valid: jax.Array, ridge: float
) -> jax.Array:
    """γ [m, B] = argmin ‖r − Σ_j γ_j Δ_j‖² + λ Σ_j γ_j² ‖Δ_j‖²; 0 where not valid [m, B].

    From gram [m, m, B] = ⟨Δ_i, Δ_j⟩ and projection [m, B] = ⟨Δ_j, r⟩.
    """
    norm = jnp.sqrt(jnp.where(valid, jnp.diagonal(gram).T, 0))
    usable = norm > 0
    inverse = jnp.where(usable, 1 / jnp.where(usable, norm, 1), 0)
    both = usable[:, None] & usable[None]
    correlation = jnp.where(both, gram * inverse[:, None] * inverse[None], 0)
    eye = jnp.eye(gram.shape[0], dtype=gram.dtype)[:, :, None]
    matrix = correlation + eye * jnp.where(usable, ridge, 1.0)[None]
    return inverse * solve_positive(matrix, jnp.where(usable, projection * inverse, 0))


def solve_positive(a: jax.Array, b: jax.Array) -> jax.Array:
    """x [m, B] with a x = b for positive definite a [m, m, B], by Gauss–Jordan elimination.

    m is small: a loop, in which every operation runs over the batch at once, is faster than LAPACK
    or cuSOLVER, and its program stays short for a long history.
    """
    m = a.shape[0]
    rows = jnp.arange(m)[:, None]

    def eliminate(j: jax.Array, system: jax.Array) -> jax.Array:
        row, column = _at(system, j, 0), _at(system, j, 1)
        factor = jnp.where(rows == j, 0, column / _at(row, j, 0)[None])
        return system - factor[:, None] * row[None]

    system = jax.lax.fori_loop(0, m, eliminate, jnp.concatenate([a, b[:, None]], axis=1))
    return system[:, m] / jnp.diagonal(system[:, :m]).T


def _at(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
