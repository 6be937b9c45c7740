"""Deep equilibrium multimodal fusion as flax.linen modules (paper §3.1–3.2).

The state is one equilibrium z_i per modality and one fused equilibrium z_f, all with d channels:

    f_i:     z_i ← GN(ReLU(GN(W_2 ReLU(GN(W_1 z_i + b_1)) + b_2 + x_i) + z_i))
    f_fuse:  z_f ← GN(ReLU(W_f Σ_i z_f ⊙ α_i + b_f + x_f)),   α_i = W_g (z_i + z_f) + b_g

with GN group normalisation over the channels, x_i the injected features of modality i and
x_f = Σ_i w_i x_i + b. `ModalityBlock` is f_i, `FusionBlock` is f_fuse, `FusionCell` is both as one
map of the whole state, and `DEQFusion` solves for its fixed point.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.diagnostics import jacobian_penalty
from deq_fusion_jax.fixed_point import deq_fixed_point
from deq_fusion_jax.gradients import GradientRule, Implicit
from deq_fusion_jax.injection import Inject, Injection, Mask, Modalities
from deq_fusion_jax.layers import dense, group_norm
from deq_fusion_jax.solvers import Anderson, Map, Solver
from deq_fusion_jax.stats import SolveStats


class FusionState(NamedTuple):
    """The unknowns: one equilibrium per modality and the fused one, each [B, …, d]."""

    modalities: Modalities
    fused: jax.Array


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
