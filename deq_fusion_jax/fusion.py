"""Deep equilibrium multimodal fusion as flax.linen modules (paper §3.1–3.2).

The state is one equilibrium z_i per modality and one fused equilibrium z_f, all with d channels:

    f_i:     z_i ← GN(ReLU(GN(W_2 ReLU(GN(W_1 z_i + b_1)) + b_2 + x_i) + z_i))
    f_fuse:  z_f ← GN(ReLU(W_f Σ_i z_f ⊙ α_i + b_f + x_f)),   α_i = W_g (z_i + z_f) + b_g

with GN group normalisation over the channels, x_i the injected features of modality i and
x_f = Σ_i w_i x_i + b. `ModalityBlock` is f_i, `FusionBlock` is f_fuse, `FusionCell` is both as one
map of the whole state, and `DEQFusion` solves for its fixed point.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.diagnostics import jacobian_penalty
from deq_fusion_jax.fixed_point import deq_fixed_point
from deq_fusion_jax.gradients import GradientRule, Implicit
from deq_fusion_jax.solvers import Anderson, Map, Solver
from deq_fusion_jax.state import describe
from deq_fusion_jax.stats import SolveStats

Modalities = dict[str, jax.Array]
Mask = jax.Array | Modalities | None


class FusionState(NamedTuple):
    """The unknowns: one equilibrium per modality and the fused one, each [B, …, d]."""

    modalities: Modalities
    fused: jax.Array


class Injection(NamedTuple):
    """What the cell is given at every step of a solve; constant during the solve.

    Attributes:
      modalities: x_i [B, …, d] per modality.
      fused: x_f [B, …, d].
      present: [B, 1, …] per modality, 1 where the sample has it and 0 where it is missing.
      dropout: [B, …, d] per modality and for "fused": 0 or 1/keep; None without dropout.
    """

    modalities: Modalities
    fused: jax.Array
    present: Modalities
    dropout: Modalities | None = None


class FusionOutput(NamedTuple):
    """What every fusion returns; what a fusion does not have is None.

    Attributes:
      fused: [B, …, d] the fused features.
      modalities: the equilibrium of each modality, [B, …, d].
      gates: α_i [B, …, d], how much of the fused state each modality lets through; 0 if missing.
      stats: `SolveStats` of the solve.
      jacobian_penalty: scalar, when an rng "jacobian" is given.
    """

    fused: jax.Array
    modalities: Modalities | None = None
    gates: Modalities | None = None
    stats: SolveStats | None = None
    jacobian_penalty: jax.Array | None = None


def dense(
    features: int, scale: float = 1.0, dtype: Any = None, name: str | None = None
) -> nn.Dense:
    """Linear layer that starts with weights from `scale` × U(±1/√fan_in), biases U(±1/√d)."""

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / features**0.5

    kernel_init = nn.initializers.variance_scaling(scale**2 / 3, "fan_in", "uniform")
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def group_norm(groups: int, dtype: Any = None, name: str | None = None) -> nn.GroupNorm:
    """Affine group normalisation over channels and positions, as PyTorch's."""
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class ModalityBlock(nn.Module):
    """f_i, one step of a modality's equilibrium: (z, x, dropout) → z, all [B, …, d]."""

    features: int
    groups: int = 4
    residual_scale: float = 0.25
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array, dropout: jax.Array | float = 1) -> jax.Array:
        norm = partial(group_norm, self.groups, self.dtype)
        h = nn.relu(norm(name="norm1")(dense(self.features, 1, self.dtype, "dense1")(z)))
        h = dense(self.features, self.residual_scale, self.dtype, "dense2")(h)
        h = norm(name="norm2")(h * dropout + x)
        return norm(name="norm3")(nn.relu(h + z))


class FusionBlock(nn.Module):
    """f_fuse, one step of the fused equilibrium.

    The gate is affine and shared, so Σ_i α_i = M (W_g (mean_i z_i + z_f) + b_g) over the M
    modalities present: one product serves them all.

    Attributes:
      activation_last: ReLU(GN(·)) in place of GN(ReLU(·)), the paper's MM-IMDB variant.
    """

    features: int
    groups: int = 4
    gate_scale: float = 0.25
    activation_last: bool = False
    dtype: Any = None

    def setup(self):
        self.gate = dense(self.features, self.gate_scale, self.dtype)
        self.fuse = dense(self.features, 1, self.dtype)
        self.norm = group_norm(self.groups, self.dtype)

    def __call__(
        self,
        fused: jax.Array,
        mean: jax.Array,
        count: jax.Array | float,
        x: jax.Array,
        dropout: jax.Array | float = 1,
    ) -> jax.Array:
        """z_f from z_f [B, …, d], mean_i z_i [B, …, d], M [B, 1, …] and x_f [B, …, d]."""
        gates = count * self.gate(mean + fused)
        h = self.fuse(fused * gates * dropout) + x
        return nn.relu(self.norm(h)) if self.activation_last else self.norm(nn.relu(h))


class FusionCell(nn.Module):
    """The whole map f: (FusionState, Injection) → FusionState.

    The fused part reads the new z_i and the old z_f. A missing modality keeps z_i = 0 and leaves
    the sums, so masking it is the same as leaving it out.

    Attributes:
      modalities: names, one `ModalityBlock` each.
      features: d, a multiple of `groups`.
      groups: of the group normalisation.
      gate_scale: factor on the gate's initial weights W_g; 1 in the paper's code.
      residual_scale: factor on the initial weights W_2; 1 in the paper's code.
      activation_last: see `FusionBlock`.
      dtype: computation dtype of the layers.
    """

    modalities: tuple[str, ...]
    features: int
    groups: int = 4
    gate_scale: float = 0.25
    residual_scale: float = 0.25
    activation_last: bool = False
    dtype: Any = None

    def setup(self):
        self.blocks = {
            name: ModalityBlock(self.features, self.groups, self.residual_scale, self.dtype)
            for name in self.modalities
        }
        self.fusion = FusionBlock(
            self.features, self.groups, self.gate_scale, self.activation_last, self.dtype
        )

    def __call__(self, z: FusionState, injection: Injection) -> FusionState:
        present, dropout = injection.present, injection.dropout or {}
        modalities = {
            name: present[name] * self.blocks[name](z.modalities[name], x, dropout.get(name, 1))
            for name, x in injection.modalities.items()
        }
        count = sum(present.values())
        mean = sum(modalities.values()) / jnp.maximum(count, 1)
        fused = self.fusion(z.fused, mean, count, injection.fused, dropout.get("fused", 1))
        return FusionState(modalities, fused)

    def gates(self, z: FusionState, injection: Injection) -> Modalities:
        """α_i = W_g (z_i + z_f) + b_g per modality, 0 where it is missing."""
        return {
            name: injection.present[name] * self.fusion.gate(z_i + z.fused)
            for name, z_i in z.modalities.items()
        }


class Inject(nn.Module):
    """From the features of each modality to what the cell is given: (inputs, mask) → Injection.

    A modality of another width than d is projected by a linear layer; small inputs are lifted
    (`lift_scale`); x_f = Σ_i w_i x_i + b with learned scalars, w_i = 1 and b = 0 at the start.
    """

    features: int
    lift: float = 2.0
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Modalities, mask: Mask = None, train: bool = False) -> Injection:
        present = presence(inputs, mask)
        fused = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        modalities = {}
        for name in sorted(inputs):
            self._check_width(name, inputs[name].shape[-1])
            x = jnp.where(present[name] > 0, inputs[name], 0)  # a missing one may well be NaN
            if x.shape[-1] != self.features:
                x = dense(self.features, 1, self.dtype, f"project_{name}")(x)
            x = lift_scale(x, self.lift).astype(self.dtype or x.dtype)
            weight = self.param(f"weight_{name}", nn.initializers.ones, (), jnp.float32)
            fused = fused + weight * present[name] * x
            modalities[name] = x
        # Without a dtype of its own a layer computes in float32 or wider, as its parameters are.
        dtype = self.dtype or jnp.result_type(jnp.float32, *modalities.values())
        cast = partial(jax.tree.map, lambda x: x.astype(dtype))
        return cast(Injection(modalities, fused, present, self._dropout_masks(modalities, train)))

    def _check_width(self, name: str, width: int) -> None:
        """Raises ValueError where the parameters were made for other inputs than these."""
        if self.is_initializing():
            return
        params = self.variables["params"]
        if f"weight_{name}" not in params:
            known = [key.removeprefix("weight_") for key in params if key.startswith("weight_")]
            raise ValueError(f"modality {name!r} is unknown; the parameters are for {known}.")
        projection = params.get(f"project_{name}")
        expected = projection["kernel"].shape[0] if projection else self.features
        if width != expected:
            raise ValueError(
                f"modality {name!r} has {width} features; its parameters are for {expected}."
            )

    def _dropout_masks(self, modalities: Modalities, train: bool) -> Modalities | None:
        if self.dropout == 0 or not train:
            return None
        keep, shape = 1 - self.dropout, next(iter(modalities.values())).shape
        return {
            name: jax.random.bernoulli(self.make_rng("dropout"), keep, shape) / keep
            for name in (*modalities, "fused")
        }


def lift_scale(x: jax.Array, floor: float) -> jax.Array:
    """x · √(1 + c²/r²): the root mean square r of each sample becomes √(r² + c²), c = `floor`.

    r is taken over all axes but the first. Large inputs pass unchanged and small ones are raised
    to c, so that the injected x_i outweighs the recurrent part of f_i at every input scale; a
    larger r still comes out larger. 0 gives x itself, as in the paper.
    """
    if floor == 0:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(wide * wide, axis=range(1, x.ndim), keepdims=True)
    return (wide * jnp.sqrt(1 + floor**2 / (mean_square + 1e-12))).astype(x.dtype)


def presence(inputs: Modalities, mask: Mask) -> Modalities:
    """[B, 1, …] float per modality, 1 where present, from a mask [B, M] or {name: [B]} or None.

    Raises:
      ValueError: inputs is no dict of floating-point arrays [B, …, features] alike but for the
        last axis, or the mask does not fit.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; expected a dict {{modality: array}}."
        )
    first, *others = inputs
    for name, x in inputs.items():
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"modality {name!r} is {describe(x)}; expected floating point [B, …, features]."
            )
    for name in others:
        if inputs[name].shape[:-1] != inputs[first].shape[:-1]:
            raise ValueError(
                f"modality {name!r} has shape {inputs[name].shape}, but {first!r} has "
                f"{inputs[first].shape}; all axes except the last must agree."
            )
    batch, ones = inputs[first].shape[0], (1,) * (inputs[first].ndim - 1)
    if mask is None:
        return {name: jnp.ones((batch, *ones)) for name in inputs}
    if not isinstance(mask, Mapping):
        mask = jnp.asarray(mask)
        if mask.shape != (batch, len(inputs)):
            raise ValueError(f"mask has shape {mask.shape}; expected {(batch, len(inputs))}.")
        mask = dict(zip(sorted(inputs), mask.T, strict=True))
    mask = {name: jnp.asarray(present) for name, present in mask.items()}
    if set(mask) != set(inputs) or any(m.shape != (batch,) for m in mask.values()):
        raise ValueError(
            f"mask has {describe(mask)}; expected an array [{batch}] for each of {sorted(inputs)}."
        )
    return {name: jnp.where(mask[name] > 0, 1.0, 0.0).reshape(batch, *ones) for name in inputs}


class CellFusion(nn.Module):
    """Fusion by iterating a `FusionCell`; a subclass says how, in `iterate`.

    (inputs, mask, train, z0) → `FusionOutput`. `inputs` are [B, d_i], [B, T, d_i] or
    [B, H, W, d_i] by modality, alike but for d_i. `mask` tells which modalities a sample has: bool
    or 0/1, {name: [B]} or [B, M] with columns in alphabetical order of the names. With
    `train=True`, dropout draws one mask per solve from the rng "dropout". `z0` is a `FusionState`
    to start from, zeros by default. An rng "jacobian" asks for the Jacobian penalty at the result.

    Attributes:
      features: d, the width of every equilibrium.
      groups, gate_scale, residual_scale, activation_last, dtype: see `FusionCell`.
      lift: the root mean square c that small inputs are raised to; see `lift_scale`.
      dropout: rate on W_2 h of every modality and on the gates.
      jacobian_probes: of `jacobian_penalty`.

    Raises:
      ValueError: an input or the mask has a wrong shape or dtype; the message names the modality.
    """

    features: int
    _: KW_ONLY
    groups: int = 4
    gate_scale: float = 0.25
    residual_scale: float = 0.25
    lift: float = 2.0
    activation_last: bool = False
    dropout: float = 0.0
    jacobian_probes: int = 2
    dtype: Any = None

    @classmethod
    def official(cls, features: int, **fields: Any) -> Self:
        """The maps and the initialisation of the paper's code."""
        return cls(features, gate_scale=1.0, residual_scale=1.0, lift=0.0, **fields)

    @nn.compact
    def __call__(
        self,
        inputs: Modalities,
        mask: Mask = None,
        train: bool = False,
        z0: FusionState | None = None,
    ) -> FusionOutput:
        inject = Inject(self.features, self.lift, self.dropout, self.dtype, name="inject")
        injection = inject(inputs, mask, train)
        cell = FusionCell(
            tuple(sorted(inputs)),
            self.features,
            self.groups,
            self.gate_scale,
            self.residual_scale,
            self.activation_last,
            self.dtype,
            name="cell",
        )
        if z0 is None:
            z0 = jax.tree.map(jnp.zeros_like, FusionState(injection.modalities, injection.fused))
        if self.is_initializing():
            cell(z0, injection)  # creates the parameters
        f, variables = as_function(cell)
        z, stats = self.iterate(f, z0, variables, injection)
        penalty = None
        if self.has_rng("jacobian"):
            key, probes = self.make_rng("jacobian"), self.jacobian_probes
            penalty = jacobian_penalty(f, z, variables, injection, key=key, probes=probes)
        return FusionOutput(z.fused, z.modalities, cell.gates(z, injection), stats, penalty)

    def iterate(self, f: Map, z0: FusionState, *args: Any) -> tuple[FusionState, SolveStats]:
        """The state that f(z, *args) is iterated to from z0, and how it went."""
        raise NotImplementedError


class DEQFusion(CellFusion):
    """Deep equilibrium fusion of named modalities: the cell at its fixed point.

        fusion = DEQFusion(features=512)
        variables = fusion.init(key, {"image": x_image, "text": x_text})
        out = fusion.apply(variables, {"image": x_image, "text": x_text})

    The defaults are the paper's maps started so that the iteration converges for inputs of every
    scale: gate_scale, residual_scale and lift; `DEQFusion.official` has the paper's own start.

    Attributes:
      solver: of the fixed point; see `deq_fixed_point`.
      gradient: `Implicit`, `Phantom` or `Unrolled`.
      features and the others: see `CellFusion`, and there for the call and its errors.
    """

    solver: Solver = Anderson(tol=1e-4, max_steps=50)
    gradient: GradientRule = Implicit()

    def iterate(self, f: Map, z0: FusionState, *args: Any) -> tuple[FusionState, SolveStats]:
        return deq_fixed_point(f, z0, *args, solver=self.solver, gradient=self.gradient)


def as_function(cell: FusionCell) -> tuple[Callable[..., FusionState], Any]:
    """A bound cell as the pure map f(z, variables, injection) and its variables."""
    unbound, variables = cell.unbind()

    def f(z: FusionState, variables: Any, injection: Injection) -> Any:
        return unbound.apply(variables, z, injection)

    return f, variables
