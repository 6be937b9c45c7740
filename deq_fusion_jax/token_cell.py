"""The map of `TokenFusion`: self- and cross-attention between the positions of modalities."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.injection import Modalities
from deq_fusion_jax.layers import dense, layer_norm


class TokenInjection(NamedTuple):
    """What the cell is given at every step of a solve; constant during the solve.

    Attributes:
      tokens: x_i [B, T_i, d] per modality, 0 where there is no position.
      there: [B, T_i, 1] per modality, 1 where there is a position and 0 where there is none.
      dropout: [B, T_i, d] per modality: 0 or 1/keep; None without dropout.
    """

    tokens: Modalities
    there: Modalities
    dropout: Modalities | None = None


class Attend(nn.Module):
    r"""Multi-head attention of positions z to others, over those that are there:

    $$W_o\, \mathrm{softmax}\Big(\frac{(W_q z) (W_k o)^⊤}{\sqrt{d_h}}\Big) W_v o + b,$$

    (z [B, T, d], others [B, S, d], there [B, S, 1]) → [B, T, d]; only b where nothing is there.
    The softmax is in float32 or wider.

    Attributes:
      features: d, a multiple of `heads`.
      scale: factor on the initial weights $W_o$.
    """

    features: int
    heads: int = 4
    scale: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array, others: jax.Array, there: jax.Array) -> jax.Array:
        d, wide = self.features, jnp.promote_types(z.dtype, jnp.float32)

        def heads(x: jax.Array, name: str) -> jax.Array:
            y = nn.Dense(d, use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], self.heads, d // self.heads)

        query, key, value = heads(z, "query"), heads(others, "key"), heads(others, "value")
        logits = jnp.einsum("bthd,bshd->bhts", query, key).astype(wide) / (d / self.heads) ** 0.5
        here = there[:, None, None, :, 0] > 0
        # A finite floor, and 0 where nothing is there: no NaN, neither here nor in the gradient.
        largest = jnp.max(logits, axis=-1, keepdims=True, where=here, initial=-1e9)
        weights = jnp.exp(jnp.where(here, logits - jax.lax.stop_gradient(largest), -1e9))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = (weights / jnp.where(total > 0, total, 1)).astype(value.dtype)
        read = jnp.einsum("bhts,bshd->bthd", weights, value).reshape(z.shape)
        return dense(d, self.scale, self.dtype, "out")(read)


class TokenCell(nn.Module):
    r"""One step of all modalities' positions, which read their own modality and the others:

    $$z_i ← \mathrm{LN}(x_i + \mathrm{SA}_i(z_i) + \mathrm{CA}_i(z_i, z_{j ≠ i}) +
    W_2 \mathrm{ReLU}(W_1 z_i + b_1) + b_2),$$

    with attention SA_i to the positions of modality i and CA_i to those of all others together.
    Positions that are not there stay 0 and are read by nobody, so a sample is the same with any
    padding, and one without a modality the same as without it in the dict.

    Attributes:
      modalities: names, each with weights of its own.
      features: d, a multiple of `heads`.
      hidden: width of the hidden layer, W_1.
      branch_scale: factor on the initial weights of what is added to x_i. Small, so that the map
        contracts at the start of training.
      dtype: computation dtype of the layers.
    """

    modalities: tuple[str, ...]
    features: int
    heads: int = 4
    hidden: int = 128
    branch_scale: float = 0.25
    dtype: Any = None

    def setup(self):
        d, scale, dtype = self.features, self.branch_scale, self.dtype
        names = self.modalities
        self.own = {name: Attend(d, self.heads, scale, dtype) for name in names}
        self.others = {name: Attend(d, self.heads, scale, dtype) for name in names}
        self.widen = {name: dense(self.hidden, 1, dtype) for name in names}
        self.narrow = {name: dense(d, scale, dtype) for name in names}
        self.norm = {name: layer_norm(dtype) for name in names}

    def __call__(self, z: Modalities, injection: TokenInjection) -> Modalities:
        dropout = injection.dropout or {}
        return {
            name: there * self.norm[name](x + dropout.get(name, 1) * self._read(name, z, injection))
            for (name, x), there in zip(
                injection.tokens.items(), injection.there.values(), strict=True
            )
        }

    def _read(self, name: str, z: Modalities, injection: TokenInjection) -> jax.Array:
        own = self.own[name](z[name], z[name], injection.there[name])
        hidden = self.narrow[name](nn.relu(self.widen[name](z[name])))
        return own + self.cross(name, z, injection) + hidden

    def cross(self, name: str, z: Modalities, injection: TokenInjection) -> jax.Array:
        """CA_i [B, T_i, d]: what the positions of one modality read from all others; else 0."""
        return read_others(self.others[name], name, z, injection.there)

    def gates(self, z: Modalities, injection: TokenInjection) -> Modalities:
        """‖CA_i‖ / ‖x_i + …‖ [B, T_i, 1], how much of a position's sum it reads from the others."""
        found = {}
        for name, x in injection.tokens.items():
            cross, whole = self.cross(name, z, injection), x + self._read(name, z, injection)
            part, total = (jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (cross, whole))
            found[name] = injection.there[name] * part / jnp.maximum(total, 1e-12)
        return found


def read_others(attend: Attend, name: str, z: Modalities, there: Modalities) -> jax.Array:
    """What the positions of one modality read from those of all others together; 0 from none."""
    others = [other for other in z if other != name]
    if not others:
        return jnp.zeros_like(z[name])
    tokens = jnp.concatenate([z[other] for other in others], axis=1)
    here = jnp.concatenate([there[other] for other in others], axis=1)
    return jnp.any(here > 0, axis=1, keepdims=True) * attend(z[name], tokens, here)
