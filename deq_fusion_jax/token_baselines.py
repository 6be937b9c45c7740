"""What `TokenFusion` is compared to: its own map applied K times, and a transformer."""

from dataclasses import KW_ONLY
from typing import Any

import flax.linen as nn
import jax

from deq_fusion_jax.injection import Mask, Modalities
from deq_fusion_jax.iterated import FusionOutput
from deq_fusion_jax.layers import dense, layer_norm
from deq_fusion_jax.token_cell import Attend, read_others
from deq_fusion_jax.tokens import (
    InjectTokens,
    IteratedTokens,
    Lengths,
    PoolTokens,
    TokenFusion,
    check_heads,
)
from deq_fusion_jax.unroll import Unroll

__all__ = ["TOKEN_FUSIONS", "CrossAttention", "TokensUnrolled"]


class TokensUnrolled(Unroll, IteratedTokens):
    r"""The map of `TokenFusion`, applied so many times and differentiated through:

    $$z_{k+1} = f(z_k), \qquad z_0 = x.$$

    The parameters are those of `TokenFusion`, so each takes the other's variables, and the call and
    the output are alike; `stats` have the residual of the returned z.

    Attributes:
      steps: K; with 1 no solver and no recurrence is left.
      tol: relative residual at which `stats.converged` is True; it changes no step. None: it is
        not measured, and `stats` are None.
      remat: recompute the inside of a step in the backward pass instead of storing it.
    """

    tol: float | None = 1e-3


class CrossAttention(nn.Module):
    r"""A transformer over the positions of all modalities, every layer with weights of its own:

    $$z_i ← \mathrm{Add}(z_i, \mathrm{SA}_i(z_i)), \qquad
    z_i ← \mathrm{Add}'(z_i, \mathrm{CA}_i(z_i, z_{j ≠ i})), \qquad z_i = x_i$$

    at the start, where Add(z, y) is h = LN(z + y), then LN(h + MLP(h)). With MLPs d wide and one
    such pair it has as many parameters as `TokenFusion`, up to biases and norms. It is called like
    `TokenFusion`; its output has no gates and no statistics.

    Attributes:
      features: d, the width.
      heads: of the attention, a divisor of `features`.
      pairs: how many layers of self- and of cross-attention.
      dropout: rate on what is added.

    Source: Vaswani et al., "Attention Is All You Need", 2017; the order of Yu et al., "Deep Modular
    Co-Attention Networks", 2019.
    """

    features: int
    _: KW_ONLY
    heads: int = 4
    pairs: int = 1
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: Modalities,
        mask: Mask = None,
        train: bool = False,
        lengths: Lengths = None,
    ) -> FusionOutput:
        d, dtype = self.features, self.dtype
        check_heads(d, self.heads)
        injection = InjectTokens(d, 0.0, 0.0, dtype, name="inject")(inputs, lengths, mask, train)
        z, there = injection.tokens, injection.there
        for pair in range(self.pairs):
            attend = {i: Attend(d, self.heads, dtype=dtype, name=f"own{pair}_{i}") for i in z}
            z = self._added(f"own{pair}", z, {i: attend[i](z[i], z[i], there[i]) for i in z}, train)
            attend = {i: Attend(d, self.heads, dtype=dtype, name=f"others{pair}_{i}") for i in z}
            read = {i: read_others(attend[i], i, z, there) for i in z}
            z = self._added(f"others{pair}", z, read, train)
            z = {i: there[i] * z[i] for i in z}
        return FusionOutput(PoolTokens(d, dtype, name="pool")(z, there), z)

    def _added(self, name: str, z: Modalities, read: Modalities, train: bool) -> Modalities:
        add = {i: Add(self.features, self.dropout, self.dtype, name=f"{name}_add_{i}") for i in z}
        return {i: add[i](z[i], read[i], train) for i in z}


class Add(nn.Module):
    """(z, y) → LN(h + MLP(h)) with h = LN(z + y), all [B, T, d]; y and the MLP with dropout."""

    features: int
    dropout: float
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        d, dtype = self.features, self.dtype
        drop = nn.Dropout(self.dropout, deterministic=not train)
        h = layer_norm(dtype, "norm1")(z + drop(y))
        mlp = dense(d, 1, dtype, "narrow")(nn.relu(dense(d, 1, dtype, "widen")(h)))
        return layer_norm(dtype, "norm2")(h + drop(mlp))


TOKEN_FUSIONS = (TokenFusion, TokensUnrolled, CrossAttention)
"""The fusions that take positions, and are told by `lengths` which there are."""
