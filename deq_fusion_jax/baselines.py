"""The other fusions, called like `deq_fusion_jax.DEQFusion`: (inputs, mask, train) → FusionOutput.

`inputs` are {modality: [B, …, d_i]}, alike but for d_i, and `mask` tells which modalities a sample
has, as in `DEQFusion`; `fused` is h, [B, …, features]. A missing modality may hold anything, NaN
included, and leaves the fusion: masking it is the same as applying the same parameters to the
inputs without it. What a fusion does not have is None in the output. Modalities are taken in
alphabetical order, whatever the order of the dict.

In the formulas $x_i$ are the inputs of modality i. Where a fusion does not say otherwise,
`features` is the width of h, `dropout` is the rate on h with `train=True`, from the rng "dropout",
and `dtype` is that of the computation.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from deq_fusion_jax.fusion import CellFusion, DEQFusion
from deq_fusion_jax.injection import Mask, Modalities, presence
from deq_fusion_jax.iterated import FusionOutput
from deq_fusion_jax.layers import dense
from deq_fusion_jax.token_baselines import CrossAttention, TokensUnrolled
from deq_fusion_jax.tokens import TokenFusion, check_heads
from deq_fusion_jax.unroll import Unroll, at_least_one

__all__ = [
    "FUSIONS",
    "GMU",
    "Attention",
    "Concat",
    "LowRank",
    "Sum",
    "Unimodal",
    "WeightTied",
    "make_fusion",
]


class _Baseline(nn.Module):
    """What the fusions without a cell share; each of them is its `fuse`."""

    features: int
    _: KW_ONLY
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Modalities, mask: Mask = None, train: bool = False) -> FusionOutput:
        present = presence(inputs, mask)
        dtype = self.dtype or jnp.result_type(*inputs.values())
        x = {i: jnp.where(present[i] > 0, inputs[i], 0).astype(dtype) for i in sorted(inputs)}
        fused, gates = self.fuse(x, {i: present[i].astype(dtype) for i in x})
        fused = nn.Dropout(self.dropout)(fused, deterministic=not train)
        return FusionOutput(fused, gates=gates)

    def fuse(self, x: Modalities, present: Modalities) -> tuple[jax.Array, Modalities | None]:
        """The fused features and the gates from x_i, 0 where missing, and presence [B, 1, …]."""
        raise NotImplementedError

    def project(self, name: str, x: jax.Array) -> jax.Array:
        """x if it is `features` wide already, else through a linear layer."""
        d = self.features
        return x if x.shape[-1] == d else dense(d, 1, self.dtype, f"project_{name}")(x)


class Unimodal(_Baseline):
    """The modality of that name alone, 0 where it is missing:

    $$h = x_m,$$

    projected to `features` if its width differs.
    """

    modality: str

    def fuse(self, x, present):
        m = self.modality
        if m not in x:
            raise ValueError(f"no modality {m!r} in the inputs; choose from {list(x)}.")
        return present[m] * self.project(m, x[m]), None


class Sum(_Baseline):
    """The sum over the modalities present,

    $$h = ∑_i x_i,$$

    each projected to `features` if its width differs.
    """

    def fuse(self, x, present):
        return sum(present[i] * self.project(i, x[i]) for i in x), None


class ConcatDense(nn.Module):
    """W [x_1; …; x_M] + b = Σ_i W_i x_i + b, a linear layer on the concatenated modalities.

    W is stored as one block W_i [d_i, features] per modality, so that the same parameters serve
    any subset of them. All start from U(±1/√Σ_i d_i).
    """

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Modalities) -> jax.Array:
        x = jnp.concatenate(list(inputs.values()), axis=-1)
        d, bound = self.features, x.shape[-1] ** -0.5
        init = partial(jax.random.uniform, dtype=jnp.float32, minval=-bound, maxval=bound)
        blocks = [self.param(f"kernel_{i}", init, (inputs[i].shape[-1], d)) for i in inputs]
        bias = self.param("bias", init, (d,))
        x, kernel, bias = promote_dtype(x, jnp.concatenate(blocks), bias, dtype=self.dtype)
        return x @ kernel + bias


class Concat(_Baseline):
    r"""A linear layer on the concatenated modalities, with zeros in the place of a missing one:

    $$h = \mathrm{ReLU}(W [x_1; …; x_M] + b).$$

    Without the ReLU this would be the `Sum` of projected modalities once more.
    """

    def fuse(self, x, present):
        return nn.relu(ConcatDense(self.features, self.dtype, name="dense")(x)), None


class GMU(_Baseline):
    r"""Gated multimodal unit: every modality has a gate that sees all of them,

    $$h = ∑_i z_i ⊙ h_i, \qquad h_i = \tanh(W_i x_i + b_i), \qquad
    z_i = σ(W_{zi} [x_1; …; x_M] + b_{zi}),$$

    over the modalities present, with zeros in the place of a missing $x_i$. `gates` are the $z_i$,
    [B, …, features].

    Attributes:
      tied: z = softmax over the modalities present in place of the independent sigmoids. For two
        modalities that is the paper's bimodal unit, $h = z ⊙ h_1 + (1 − z) ⊙ h_2$.

    Source: Arevalo et al., "Gated Multimodal Units for Information Fusion", 2017; biases added.
    """

    tied: bool = False

    def fuse(self, x, present):
        h = {i: nn.tanh(dense(self.features, 1, self.dtype, f"encode_{i}")(x[i])) for i in x}
        z = jnp.stack([ConcatDense(self.features, self.dtype, name=f"gate_{i}")(x) for i in x])
        here = jnp.stack(list(present.values()))
        # A finite floor: a sample with no modality at all gets 0, not NaN.
        floored = jnp.where(here > 0, z, jnp.finfo(z.dtype).min)
        z = nn.softmax(floored, axis=0) if self.tied else nn.sigmoid(z)
        gates = dict(zip(x, here * z, strict=True))
        return sum(gates[i] * h[i] for i in x), gates


class LowRank(_Baseline):
    r"""Low-rank multimodal fusion (LMF): a sum of products over the modalities,

    $$h = ∑_r w_r ∏_i (W_i^r [x_i; 1]) + b.$$

    It is the contraction of $[x_1; 1] ⊗ … ⊗ [x_M; 1]$ with the weight tensor
    $∑_r w_r W_1^r ⊗ … ⊗ W_M^r$, which is never formed. A missing modality leaves the product. The
    start, $W_i^r ∼ \mathcal{N}(0, 1/(d_i + 1))$ and $w_r = 1/\sqrt{R}$ with the rank R, gives h
    unit variance for inputs of unit variance, whatever M is.

    Parameters: `factor_<modality>` [rank, d_i + 1, features], `weights` [rank], `bias` [features].

    Attributes:
      rank: R, how many products are summed.

    Source: Liu et al., "Efficient Low-rank Multimodal Fusion with Modality-Specific Factors", 2018.
    """

    rank: int = 4

    def fuse(self, x, present):
        at_least_one(self, "rank")
        start = nn.initializers.constant(self.rank**-0.5)
        weights = self.param("weights", start, (self.rank,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        product = weights[:, None]  # with every factor [B, …, rank, features]
        for i in x:
            shape = (self.rank, x[i].shape[-1] + 1, self.features)
            init = nn.initializers.normal(shape[1] ** -0.5)
            factor = self.param(f"factor_{i}", init, shape, jnp.float32)
            xi, factor, product = promote_dtype(x[i], factor, product, dtype=self.dtype)
            y = jnp.einsum("...d,rdf->...rf", xi, factor[:, :-1]) + factor[:, -1]
            product = product * jnp.where(present[i][..., None] > 0, y, 1)
        return jnp.sum(product, axis=-2) + bias.astype(product.dtype), None


class Attention(_Baseline):
    r"""One layer of self-attention over the modalities as tokens, and their mean:

    $$t_i = x_i + e_i, \qquad h = \mathrm{mean}_i (t_i + \mathrm{MHA}(\mathrm{LN}(t))_i)$$

    over the modalities present; $x_i$ is projected if its width differs and $e_i$ is learned. In
    [B, T, d] every position attends to the modalities at the same position. The attention has no
    biases: a key's would never get a gradient.

    Attributes:
      heads: of the attention, a divisor of `features`.

    Source: Vaswani et al., "Attention Is All You Need", 2017, §3.2; normalised before, not after.
    """

    heads: int = 4

    def fuse(self, x, present):
        check_heads(self.features, self.heads)
        init, d = nn.initializers.normal(0.02), self.features
        e = jnp.stack([self.param(f"embedding_{i}", init, (d,), jnp.float32) for i in x])
        t = jnp.stack([self.project(i, x[i]) for i in x], axis=-2)
        t = sum(promote_dtype(t, e, dtype=self.dtype))  # [B, …, M, features]
        here = jnp.stack(list(present.values()), axis=-2)  # [B, 1, …, M, 1]
        normalised = nn.LayerNorm(use_fast_variance=False, dtype=self.dtype, name="norm")(t)
        attend = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, use_bias=False, name="attention"
        )
        t = t + attend(normalised, mask=here[..., None, None, :, 0] > 0)  # [.., head, query, key]
        return jnp.sum(here * t, axis=-2) / jnp.maximum(jnp.sum(here, axis=-2), 1), None


class WeightTied(Unroll, CellFusion):
    r"""The weight-tied unroll: `steps` steps from zero, differentiated by backpropagation,

    $$z_{k+1} = f(z_k), \qquad z_0 = 0.$$

    f is the cell of `DEQFusion` with the same parameters, so each takes the other's variables. The
    output is alike; `stats` have the residual of the returned z, one more evaluation of f.

    Attributes:
      steps: K, the depth.
      tol: relative residual at which `stats.converged` is True; it changes no step. None: it is
        not measured, and `stats` are None.
      remat: recompute the inside of a step in the backward pass instead of storing it.
      features and the others: see `DEQFusion`, and there for the call and its errors.
    """

    steps: int = 10


FUSIONS: dict[str, Callable[..., nn.Module]] = {
    "deq": DEQFusion,
    "weight_tied": WeightTied,
    "concat": Concat,
    "sum": Sum,
    "gmu": GMU,
    "lmf": LowRank,
    "attention": Attention,
    "tokens": TokenFusion,
    "tokens_unrolled": TokensUnrolled,
    "cross_attention": CrossAttention,
}
"""The fusions by the names that the command line has for them."""


def make_fusion(name: str, features: int, modalities: Sequence[str], **options: Any) -> nn.Module:
    """The fusion that the command line calls `name`: a key of `FUSIONS`, or one modality alone.

    `options` are fields of that fusion. For two modalities "gmu" is the paper's bimodal unit.

    Raises:
      ValueError: nothing has that name; the message lists the choices.
      TypeError: the fusion has no such option.
    """
    if name == "gmu":
        options = {"tied": len(modalities) == 2, **options}
    if name in FUSIONS:
        return FUSIONS[name](features, **options)
    if name in modalities:
        return Unimodal(features, name, **options)
    raise ValueError(f"no fusion is called {name!r}; choose from {[*FUSIONS, *modalities]}.")
