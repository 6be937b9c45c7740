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


def combination(weights: jax.Array, vectors: jax.Array) -> jax.Array:
    """Σ_j w_j v_j [B, N] per sample, from w [B, m] and v [B, m, N]."""
    return jnp.einsum("bm,bmn->bn", weights, vectors, precision=jax.lax.Precision.HIGHEST)


def mixing_weights(gram: jax.Array, valid: jax.Array, ridge: float) -> jax.Array:
    """α [m, B] of Anderson acceleration from gram [m, m, B]; 0 where not valid [m, B]."""
    m = gram.shape[0]
    diagonal = jnp.diagonal(gram).T
    norm = jnp.sqrt(jnp.where(valid, diagonal, 1))
    smallest = jnp.min(jnp.where(valid, norm, jnp.inf), axis=0, keepdims=True)
    inverse = jnp.where(valid, smallest / norm, 0)
    both = valid[:, None] & valid[None]
    correlation = jnp.where(both, gram / (norm[:, None] * norm[None]), 0)
    eye = jnp.eye(m, dtype=gram.dtype)[:, :, None]
    y = solve_positive(correlation + eye * jnp.where(valid, ridge, 1.0)[None], inverse)
    alpha = inverse * y
    return alpha / jnp.sum(alpha, axis=0, keepdims=True)


def solve_positive(a: jax.Array, b: jax.Array) -> jax.Array:
    """x [m, B] with a x = b for positive definite a [m, m, B], by an unrolled LDLᵀ.

    m is small and fixed: unrolled, every operation runs over the batch at once, with no call
    into a LAPACK or cuSOLVER routine.
    """
    m = a.shape[0]
    lower: dict[tuple[int, int], jax.Array] = {}
    pivot: list[jax.Array] = []
    for j in range(m):
        pivot.append(a[j, j] - sum(lower[j, k] ** 2 * pivot[k] for k in range(j)))
        for i in range(j + 1, m):
            inner = sum(lower[i, k] * lower[j, k] * pivot[k] for k in range(j))
            lower[i, j] = (a[i, j] - inner) / pivot[j]
    x = [b[i] for i in range(m)]
    for i in range(m):
        x[i] = x[i] - sum(lower[i, k] * x[k] for k in range(i))
    x = [x[i] / pivot[i] for i in range(m)]
    for i in reversed(range(m)):
        x[i] = x[i] - sum(lower[k, i] * x[k] for k in range(i + 1, m))
    return jnp.stack(x)
