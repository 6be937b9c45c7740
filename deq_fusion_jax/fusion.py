"""Deep equilibrium multimodal fusion: the fixed point of a `FusionCell` as a flax.linen module."""

from dataclasses import KW_ONLY
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.cell import FusionCell, FusionState, as_map
from deq_fusion_jax.gradients import Adjoint
from deq_fusion_jax.injection import Inject, Injection, Mask, Modalities
from deq_fusion_jax.iterated import Equilibrium, FusionOutput, Iterated
from deq_fusion_jax.stats import SolveStats, in_parts


class CellFusion(Iterated):
    """Fusion by iterating a `FusionCell`.

    `DEQFusion` describes the call, its errors and the attributes.
    """

    _: KW_ONLY
    groups: int = 4
    gate_scale: float = 0.25
    residual_scale: float = 0.25
    lift: float = 2.0
    activation_last: bool = False
    cell_type: type[FusionCell] = FusionCell

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
        adjoint0: Adjoint | None = None,
    ) -> FusionOutput:
        inject = Inject(self.features, self.lift, self.dropout, self.dtype, name="inject")
        injection = inject(inputs, mask, train)
        cell = self.cell_type(
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
        z, stats, penalty, radius = self.run(cell, z0, injection, adjoint0)
        return FusionOutput(z.fused, z.modalities, cell.gates(z, injection), stats, penalty, radius)


class DEQFusion(Equilibrium, CellFusion):
    r"""Deep equilibrium fusion of named modalities: a `FusionCell` f at its fixed point,

    $$z^⋆ = f(z^⋆, x), \qquad z^⋆ = (z_1, …, z_M, z_f).$$

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import DEQFusion
        >>> inputs = {"image": jnp.ones((2, 8)), "text": jnp.linspace(0, 1, 12).reshape(2, 6)}
        >>> fusion = DEQFusion(features=16)
        >>> variables = fusion.init(jax.random.key(0), inputs)
        >>> out = fusion.apply(variables, inputs)
        >>> out.fused.shape, out.modalities["text"].shape, out.stats.converged.tolist()
        ((2, 16), (2, 16), [True, True])

    The call is (inputs, mask, train, z0, adjoint0) → `FusionOutput`. `inputs` are [B, d_i],
    [B, T, d_i] or [B, H, W, d_i] by modality, alike but for d_i; one of another width than
    `features` is projected by a linear layer. `mask` tells which modalities a sample has: bool or
    0/1, {name: [B]} or [B, M] with columns in alphabetical order of the names. With `train=True`,
    dropout draws one mask per solve from the rng "dropout". `z0` is a `FusionState` to start from,
    zeros by default; `adjoint0`, an `Adjoint` of a `FusionState`, is where the backward solve
    starts. An rng "jacobian" asks for the Jacobian penalty at the result, an rng "radius" for the
    spectral radius there.

    The defaults are the paper's maps started so that the iteration converges for inputs of every
    scale: gate_scale, residual_scale and lift; `DEQFusion.official` is started as the paper's.

    Attributes:
      features: d, the width of every equilibrium.
      groups, gate_scale, residual_scale, activation_last, dtype: see `FusionCell`.
      lift: c, the root mean square that small inputs are raised to: $x_i \sqrt{1 + c^2 / r^2}$ is
        injected, with r the root mean square of the sample's $x_i$; 0 leaves them as they are.
      dropout: rate on $W_2 h_i + b_2$ of every modality and on the gates.
      jacobian_probes: of `jacobian_penalty`.
      cell_type: the map that is iterated, `FusionCell` or a subclass.
      solver: of the fixed point; see `deq_fixed_point`.
      gradient: `Implicit`, `Phantom` or `Unrolled`.
      schedule: "joint" iterates the whole cell, as the paper does. "staged" solves the same
        equations at less cost: no $z_i$ reads $z_f$, so the modalities come first, then $z_f$ with
        them at rest; implicit differentiation goes the same way backwards. Each of the two has to
        reach the tolerance by itself, and `stats` and an `Adjoint` have the larger of their
        numbers. Where there are several fixed points, the two schedules may find different ones,
        as two solvers may.
      batch_axis: the axis of the mesh (`jax.set_mesh`) over which a batch is sharded. Every device
        then solves its own samples and stops when they are done: no device waits inside a solve.
        The rest is left to jit. The batch has to be a multiple of the devices.

    Raises:
      ValueError: an input or the mask has a wrong shape or dtype, and the message names the
        modality; or schedule is neither.
    """

    schedule: str = "staged"

    @classmethod
    def official(cls, features: int, **fields: Any) -> Self:
        """The maps, the initialisation and the schedule of the paper's code."""
        return super().official(features, **{"schedule": "joint", **fields})

    def iterate(
        self,
        cell: FusionCell,
        z0: FusionState,
        variables: Any,
        injection: Injection,
        adjoint0: Adjoint | None,
    ) -> tuple[FusionState, SolveStats]:
        if self.schedule == "joint":
            return super().iterate(cell, z0, variables, injection, adjoint0)
        if self.schedule != "staged":
            raise ValueError(f'schedule is {self.schedule!r}; expected "staged" or "joint".')

        solve = self.solve()
        step_modalities, step_fused = as_map(cell, "step_modalities"), as_map(cell, "step_fused")
        first0, second0 = (None, None) if adjoint0 is None else _parts(adjoint0)
        modalities, first = solve(
            step_modalities, z0.modalities, variables, injection, adjoint0=first0
        )
        held = cell.apply(variables, modalities, injection, method="held_gates")
        fused, second = solve(step_fused, z0.fused, variables, held, injection, adjoint0=second0)
        return FusionState(modalities, fused), in_parts(first, second)

    @staticmethod
    def state(out: FusionOutput) -> FusionState:
        """What `z0` is like, from an output."""
        assert out.modalities is not None
        return FusionState(out.modalities, out.fused)


@jax.custom_vjp
def _parts(adjoint0: Adjoint) -> tuple[Adjoint, Adjoint]:
    """Where the backward solves of the modalities and of the fused state start."""
    u, seen = adjoint0.u, (adjoint0.steps, adjoint0.residual, adjoint0.failed)
    return Adjoint(u.modalities, *seen), Adjoint(u.fused, *seen)


def _ended(_: None, parts: tuple[Adjoint, Adjoint]) -> tuple[Adjoint]:
    """How they ended, with the larger of their numbers, where a gradient would have the sum."""
    first, second = parts
    return (
        Adjoint(
            FusionState(first.u, second.u),
            jnp.maximum(first.steps, second.steps),
            jnp.maximum(first.residual, second.residual),
            jnp.maximum(first.failed, second.failed),
        ),
    )


_parts.defvjp(lambda adjoint0: (_parts(adjoint0), None), _ended)
