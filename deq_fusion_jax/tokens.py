"""Deep equilibrium fusion of modalities that still have positions: `TokenFusion`."""

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.gradients import Adjoint
from deq_fusion_jax.injection import Mask, Modalities, dropout_masks, lift_scale, parse_mask
from deq_fusion_jax.iterated import Equilibrium, FusionOutput, Iterated
from deq_fusion_jax.layers import dense
from deq_fusion_jax.solvers import Anderson, Solver
from deq_fusion_jax.state import describe
from deq_fusion_jax.token_cell import TokenCell, TokenInjection

Lengths = Mapping[str, jax.Array] | None


class InjectTokens(nn.Module):
    """(inputs, lengths, mask, train) → `TokenInjection`: projected, lifted, and 0 where not there.

    Every position is lifted for itself (`lift_scale`), so that padding changes no other.
    """

    features: int
    lift: float = 2.0
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self, inputs: Modalities, lengths: Lengths, mask: Mask, train: bool
    ) -> TokenInjection:
        found, tokens = positions_there(inputs, lengths, mask), {}
        inputs = {name: _flat(x) for name, x in inputs.items()}
        for name in sorted(inputs):
            x = jnp.where(found[name], inputs[name], 0)  # a position that is not there may be NaN
            if x.shape[-1] != self.features:
                x = dense(self.features, 1, self.dtype, f"project_{name}")(x)
            x = jnp.where(found[name], lift_scale(x, self.lift, axes=(-1,)), 0)
            tokens[name] = x
        dtype = self.dtype or jnp.result_type(jnp.float32, *tokens.values())
        tokens = {name: x.astype(dtype) for name, x in tokens.items()}
        there = {name: found[name].astype(dtype) for name in tokens}
        return TokenInjection(tokens, there, self._dropout_masks(tokens, train))

    def _dropout_masks(self, tokens: Modalities, train: bool) -> Modalities | None:
        if self.dropout == 0 or not train:
            return None
        shapes = {name: x.shape for name, x in tokens.items()}
        masks = dropout_masks(self.dropout, shapes, partial(self.make_rng, "dropout"))
        return {name: mask.astype(tokens[name].dtype) for name, mask in masks.items()}


def positions_there(inputs: Modalities, lengths: Lengths, mask: Mask) -> dict[str, jax.Array]:
    """{name: [B, T_i, 1] bool}, which positions there are; see `TokenFusion`.

    Raises:
      ValueError: inputs is no dict of floating-point arrays [B, …, features] with one B, or the
        lengths or the mask do not fit.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; expected a dict {{modality: array}}."
        )
    batch = len(next(iter(inputs.values())))
    for name, x in inputs.items():
        if x.ndim < 2 or len(x) != batch or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"modality {name!r} is {describe(x)}; expected floating point "
                f"[{batch}, …, features]."
            )
    lengths = {name: jnp.asarray(length) for name, length in (lengths or {}).items()}
    if unknown := sorted(set(lengths) - set(inputs)):
        raise ValueError(f"lengths are given for {unknown}; the modalities are {sorted(inputs)}.")
    present = parse_mask(mask, batch, inputs)
    found = {}
    for name, x in inputs.items():
        there = _there(name, lengths.get(name), x)
        found[name] = (there & (present[name][:, None] > 0))[..., None]
    return found


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, d], whatever axes the positions have; one without any is one position."""
    return x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])


def _there(name: str, length: jax.Array | None, x: jax.Array) -> jax.Array:
    """[B, T] bool from lengths [B], from a bool [B, …], or from None: all of them."""
    batch, positions = len(x), math.prod(x.shape[1:-1])
    if length is None:
        return jnp.ones((batch, positions), bool)
    if length.shape == (batch,) and jnp.issubdtype(length.dtype, jnp.integer):
        return jnp.arange(positions) < length[:, None]
    if length.shape == x.shape[:-1] and length.dtype == bool:
        return length.reshape(batch, positions)
    raise ValueError(
        f"lengths of {name!r} are {describe(length)}; expected integers [{batch}], or bool "
        f"{list(x.shape[:-1])}, which positions there are."
    )


def check_heads(features: int, heads: int) -> None:
    """Raises ValueError unless the width divides into so many heads."""
    if heads < 1 or features % heads:
        raise ValueError(f"features={features} is no multiple of heads={heads}.")


class PoolTokens(nn.Module):
    r"""From the positions of all modalities to one vector [B, d], by learned weights:

    $$h = ∑_i W_i ∑_t a_{it} z_{it} + b_i, \qquad a_i = \mathrm{softmax}_t (w_i^⊤ z_{it})$$

    over the positions that are there and the modalities that have any.

    Source: Yu et al., "Deep Modular Co-Attention Networks", 2019, §3.3, with a linear score.
    """

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, z: Modalities, there: Modalities) -> jax.Array:
        fused = jnp.zeros(())
        for name in sorted(z):
            here = there[name] > 0
            score = nn.Dense(1, use_bias=False, dtype=self.dtype, name=f"score_{name}")(z[name])
            score = jnp.where(here, score, -1e9)
            largest = jax.lax.stop_gradient(jnp.max(score, axis=1, keepdims=True, initial=-1e9))
            weight = jnp.where(here, jnp.exp(score - largest), 0)
            total = jnp.sum(weight, axis=1)
            pooled = jnp.sum(weight * z[name], axis=1) / jnp.where(total > 0, total, 1)
            out = dense(self.features, 1, self.dtype, f"out_{name}")(pooled)
            fused = fused + jnp.any(here, axis=1) * out
        return fused


class IteratedTokens(Iterated):
    """Fusion by iterating a `TokenCell`. `TokenFusion` describes the call and the attributes."""

    _: KW_ONLY
    heads: int = 4
    hidden: int | None = None
    branch_scale: float = 0.25
    lift: float = 2.0

    @nn.compact
    def __call__(
        self,
        inputs: Modalities,
        mask: Mask = None,
        train: bool = False,
        lengths: Lengths = None,
        z0: Modalities | None = None,
        adjoint0: Adjoint | None = None,
    ) -> FusionOutput:
        d, dtype = self.features, self.dtype
        check_heads(d, self.heads)
        inject = InjectTokens(d, self.lift, self.dropout, dtype, name="inject")
        injection = inject(inputs, lengths, mask, train)
        names, hidden = tuple(sorted(inputs)), self.hidden or 2 * d
        cell = TokenCell(names, d, self.heads, hidden, self.branch_scale, dtype, name="cell")
        if z0 is None:
            z0 = injection.tokens
        z, stats, penalty, radius = self.run(cell, z0, injection, adjoint0)
        if penalty is not None:  # a mean over the states; of padding it is 0
            there = injection.there.values()
            penalty *= sum(x.size for x in there) / sum(jnp.sum(x) for x in there)
        fused = PoolTokens(d, dtype, name="pool")(z, injection.there)
        return FusionOutput(fused, z, cell.gates(z, injection), stats, penalty, radius)


class TokenFusion(Equilibrium, IteratedTokens):
    r"""Deep equilibrium fusion of modalities with positions: a `TokenCell` f at its fixed point,

    $$z^⋆ = f(z^⋆, x), \qquad z_i ← \mathrm{LN}(x_i + \mathrm{SA}_i(z_i) +
    \mathrm{CA}_i(z_i, z_{j ≠ i}) + \mathrm{MLP}_i(z_i)).$$

    All positions of all modalities of a sample are one coupled state: each attends to those of its
    own modality and to those of the others.

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import TokenFusion
        >>> inputs = {"image": jnp.ones((2, 9, 8)), "text": jnp.ones((2, 5, 6))}
        >>> lengths = {"text": jnp.array([5, 3])}
        >>> fusion = TokenFusion(features=16)
        >>> variables = fusion.init(jax.random.key(0), inputs, lengths=lengths)
        >>> out = fusion.apply(variables, inputs, lengths=lengths)
        >>> out.fused.shape, out.modalities["text"].shape, out.stats.converged.tolist()
        ((2, 16), (2, 5, 16), [True, True])

    The call is (inputs, mask, train, lengths, z0, adjoint0) → `FusionOutput`. `inputs` are
    {name: [B, T_i, d_i]}, each modality with a number of positions and a width of its own; those of
    [B, H, W, d_i] are taken row by row, and [B, d_i] is one position. `lengths` has, for any of
    them, the number of positions of every sample, integers [B], or which there are, bool [B, T_i]
    or [B, H, W]; what is beyond may be anything, NaN included, and changes nothing. `mask` tells
    which modalities a sample has, as in `DEQFusion`. Positions have no order but what their
    features tell: add a positional encoding where order counts. `z0` {name: [B, T_i, d]} and
    `adjoint0` are where the solves start, by default x and 0; rngs "dropout", "jacobian" and
    "radius" as in `DEQFusion`.

    Of the output, `fused` [B, d] is the pooled state (`PoolTokens`), `modalities` {name:
    [B, T_i, d]} the state, 0 where no position is, and `gates` {name: [B, T_i, 1]} the share of a
    position's sum that it reads from the other modalities: near 0, the map has closed itself off,
    however small its residual is.

    Attributes:
      heads: of the attention, a divisor of `features`.
      hidden: width of the MLP's hidden layer; by default 2 d.
      branch_scale: factor on the initial weights of what is added to $x_i$. With `lift` it lets
        the map contract at the start of training, for inputs of every scale.
      lift: the root mean square that small inputs are raised to, position by position; see
        `DEQFusion`.
      features, dropout, jacobian_probes, dtype: see `DEQFusion`.
      solver, gradient, batch_axis: see `DEQFusion`.

    Raises:
      ValueError: an input, the lengths or the mask have a wrong shape or dtype, and the message
        names the modality; or `features` is no multiple of `heads`.
    """

    solver: Solver = Anderson(tol=1e-3, max_steps=50)

    @staticmethod
    def state(out: FusionOutput) -> Modalities:
        """What `z0` is like, from an output."""
        assert out.modalities is not None
        return out.modalities
