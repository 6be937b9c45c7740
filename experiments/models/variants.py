"""The variants of DEQ fusion that `experiments.ablation` trains."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from deq_fusion_jax import Broyden, DEQFusion, FusionCell, Phantom, Picard, Unrolled
from deq_fusion_jax.baselines import WeightTied
from deq_fusion_jax.cell import FusionState
from experiments.training.config import FusionChange, unchanged


class WithoutModalityMaps(FusionCell):
    """f_i is the identity: z_i = x_i."""

    def step_modalities(self, z, injection):
        return {name: injection.present[name] * x for name, x in injection.modalities.items()}


class WithoutFusionMap(FusionCell):
    """f_fuse is a sum: z_f = Σ_i z_i."""

    def __call__(self, z, injection):
        modalities = self.step_modalities(z.modalities, injection)
        return FusionState(modalities, self.held_gates(modalities, injection))

    def held_gates(self, modalities, injection):
        return sum(modalities.values())

    def step_fused(self, fused, held, injection):
        return held


class Variant(NamedTuple):
    """One change of the experiment's own DEQ fusion.

    Attributes:
      name: as in the table.
      fusion: (the experiment's fusion) → the one to train.
      config: options of the experiment that differ.
    """

    name: str
    fusion: FusionChange = unchanged
    config: Mapping[str, Any] = {}


def cell(cell_type: type[FusionCell]) -> FusionChange:
    return lambda fusion: fusion.clone(cell_type=cell_type)


def unrolled(steps: int) -> FusionChange:
    """The same cell, iterated `steps` times and trained by backpropagation."""

    def change(fusion: DEQFusion) -> WeightTied:
        own = {field.name for field in dataclasses.fields(WeightTied)} - {"parent", "name"}
        shared = {name: value for name, value in vars(fusion).items() if name in own}
        return WeightTied(**shared, steps=steps, tol=fusion.solver.tol)

    return change


def solver(kind: type[Picard] | type[Broyden]) -> FusionChange:
    def change(fusion: DEQFusion) -> DEQFusion:
        given: Any = fusion.solver
        return fusion.clone(solver=kind(tol=given.tol, max_steps=given.max_steps))

    return change


def official(fusion: DEQFusion) -> DEQFusion:
    """Started as in the paper's code."""
    start = DEQFusion.official(fusion.features)
    return fusion.clone(
        gate_scale=start.gate_scale, residual_scale=start.residual_scale, lift=start.lift
    )


VARIANTS: dict[str, tuple[Variant, ...]] = {
    "maps": (
        Variant("without f_i", cell(WithoutModalityMaps)),
        Variant("without f_fuse", cell(WithoutFusionMap)),
    ),
    "depth": tuple(
        Variant(f"weight-tied, {k} step{'s' * (k > 1)}", unrolled(k)) for k in (1, 2, 5, 10, 20, 50)
    ),
    "solver": (Variant("Picard", solver(Picard)), Variant("Broyden", solver(Broyden))),
    "gradient": (
        Variant("phantom gradient, 5 steps", lambda f: f.clone(gradient=Phantom(5))),
        Variant("unrolled gradient, 20 steps", lambda f: f.clone(gradient=Unrolled(20))),
    ),
    "penalty": tuple(
        Variant(f"Jacobian weight {w:g}", config={"jacobian_weight": w})
        for w in (0.0, 0.1, 1.0, 20.0)
    ),
    "start": (Variant("official initialisation", official),),
    "missing": (Variant("modality dropout 0.3", config={"modality_dropout": 0.3}),),
}
REFERENCE = Variant("DEQ")  # Anderson, implicit gradient, the experiment's own options
