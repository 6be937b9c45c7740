"""The maps of the paper as flax.linen modules (§3.1–3.2).

`ModalityBlock` is f_i, the map of a modality's equilibrium, `FusionBlock` is f_fuse, that of the
fused one, and `FusionCell`, which has the formulas, is both as one map of the whole state.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.injection import Injection, Modalities
from deq_fusion_jax.layers import GroupNorm, dense
from deq_fusion_jax.state import Map


class FusionState(NamedTuple):
    """The unknowns: one equilibrium $z_i$ per modality and the fused one $z_f$, each [B, …, d]."""

    modalities: Modalities
    fused: jax.Array


class ModalityBlock(nn.Module):
    """f_i, one step of a modality's equilibrium: (z, x, dropout) → z, all [B, …, d]."""

    features: int
    groups: int = 4
    residual_scale: float = 0.25
    dtype: Any = None

    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array, dropout: jax.Array | float = 1) -> jax.Array:
        norm = partial(GroupNorm, self.groups, self.dtype)
        h = nn.relu(norm(name="norm1")(dense(self.features, 1, self.dtype, "dense1")(z)))
        h = dense(self.features, self.residual_scale, self.dtype, "dense2")(h)
        h = norm(name="norm2")(h * dropout + x)
        return norm(name="norm3")(nn.relu(h + z))


class FusionBlock(nn.Module):
    """f_fuse, one step of the fused equilibrium: (z_f, Σ_i α_i, x_f, dropout) → z_f, all [B, …, d].

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
        self.norm = GroupNorm(self.groups, self.dtype)

    def __call__(
        self, fused: jax.Array, gates: jax.Array, x: jax.Array, dropout: jax.Array | float = 1
    ) -> jax.Array:
        h = self.fuse(fused * gates * dropout) + x
        return nn.relu(self.norm(h)) if self.activation_last else self.norm(nn.relu(h))


class FusionCell(nn.Module):
    r"""The maps of the paper (§3.1–3.2) as one map of the whole state.

    The state is one equilibrium $z_i$ per modality and one fused equilibrium $z_f$, all with d
    channels. The map of a modality, $f_i$, and the fused one, $f_\mathrm{fuse}$, are

    $$z_i ← \mathrm{GN}(\mathrm{ReLU}(\mathrm{GN}(W_2 h_i + b_2 + x_i) + z_i)), \quad
    h_i = \mathrm{ReLU}(\mathrm{GN}(W_1 z_i + b_1)),$$
    $$z_f ← \mathrm{GN}(\mathrm{ReLU}(W_f ∑_i z_f ⊙ α_i + b_f + x_f)), \quad
    α_i = W_g (z_i + z_f) + b_g,$$

    with GN group normalisation over the channels, $x_i$ the injected features of modality i and
    $x_f = ∑_i w_i x_i + b$. The fused part reads the new $z_i$ and the old $z_f$. A missing
    modality keeps $z_i = 0$ and leaves the sums, so masking it is the same as leaving it out. The
    gate is affine and shared, so the sum over the M modalities present is one product:

    $$∑_i α_i = M (W_g (\mathrm{mean}_i\, z_i + z_f) + b_g).$$

    Attributes:
      modalities: names, each with an $f_i$ of its own.
      features: d, a multiple of `groups`.
      groups: of the group normalisation.
      gate_scale: factor on the gate's initial weights $W_g$; 1 in the paper's code.
      residual_scale: factor on the initial weights $W_2$; 1 in the paper's code.
      activation_last: ReLU(GN(·)) in place of GN(ReLU(·)) in the fused map, the paper's MM-IMDB
        variant.
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
        modalities = self.step_modalities(z.modalities, injection)
        count, mean = _count_and_mean(modalities, injection)
        gates = count * self.fusion.gate(mean + z.fused)
        return FusionState(modalities, self._fuse(z.fused, gates, injection))

    def step_modalities(self, z: Modalities, injection: Injection) -> Modalities:
        """$f_i$ of every modality, which reads nothing of the others."""
        present, dropout = injection.present, injection.dropout or {}
        return {
            name: present[name] * self.blocks[name](z[name], x, dropout.get(name, 1))
            for name, x in injection.modalities.items()
        }

    def held_gates(self, modalities: Modalities, injection: Injection) -> jax.Array:
        r"""What $∑_i α_i$ does not owe to $z_f$, for `step_fused`:

        $$M (W_g\, \mathrm{mean}_i\, z_i + b_g).$$
        """
        count, mean = _count_and_mean(modalities, injection)
        return count * self.fusion.gate(mean)

    def step_fused(self, fused: jax.Array, held: jax.Array, injection: Injection) -> jax.Array:
        r"""$f_\mathrm{fuse}$ with the modalities at rest."""
        kernel = self.fusion.gate.variables["params"]["kernel"].astype(fused.dtype)
        gates = held + _count(injection) * (fused @ kernel)
        return self._fuse(fused, gates, injection)

    def _fuse(self, fused: jax.Array, gates: jax.Array, injection: Injection) -> jax.Array:
        return self.fusion(fused, gates, injection.fused, (injection.dropout or {}).get("fused", 1))

    def gates(self, z: FusionState, injection: Injection) -> Modalities:
        """$α_i = W_g (z_i + z_f) + b_g$ per modality, 0 where it is missing."""
        return {
            name: injection.present[name] * self.fusion.gate(z_i + z.fused)
            for name, z_i in z.modalities.items()
        }


def _count(injection: Injection) -> jax.Array:
    """M [B, 1, …], how many modalities a sample has."""
    return jnp.asarray(sum(injection.present.values()))


def _count_and_mean(modalities: Modalities, injection: Injection) -> tuple[jax.Array, jax.Array]:
    """M and mean_i z_i [B, …, d] over the modalities present."""
    count = _count(injection)
    return count, sum(modalities.values()) / jnp.maximum(count, 1)


def as_map(cell: nn.Module, method: str | None = None) -> Map:
    """An unbound cell, or the method of that name, as the pure map f(z, variables, *its inputs)."""
    return lambda z, variables, *inputs: cell.apply(variables, z, *inputs, method=method)
