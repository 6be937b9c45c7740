"""Deep equilibrium multimodal fusion, and the differentiable fixed-point primitive under it.

`deq_fixed_point` solves $z^⋆ = f(z^⋆, …)$ for every sample of a batch and differentiates $z^⋆$
implicitly; `Picard`, `Anderson` and `Broyden` say how it is solved, `Implicit`, `Phantom` and
`Unrolled` how it is differentiated, `SolveStats` what happened. `DEQFusion` is a flax.linen module
that fuses features of named modalities by solving for the fixed point of a `FusionCell`, and
`TokenFusion` one that fuses all their positions; the fusions in `deq_fusion_jax.baselines` and
`deq_fusion_jax.token_baselines` are called the same way. `deq_fusion_jax.official` reads the
weights of the paper's own code.

Source: Ni, Bai, Zhang, Yao and Mei, "Deep Equilibrium Multimodal Fusion", arXiv 2306.16645.
"""

from deq_fusion_jax.cell import FusionCell, FusionState
from deq_fusion_jax.diagnostics import coupling, jacobian_penalty, spectral_radius
from deq_fusion_jax.fixed_point import deq_fixed_point
from deq_fusion_jax.fusion import DEQFusion
from deq_fusion_jax.gradients import Adjoint, Implicit, Phantom, Unrolled
from deq_fusion_jax.iterated import FusionOutput
from deq_fusion_jax.solvers import Anderson, Broyden, Picard
from deq_fusion_jax.stats import ConvergenceError, ConvergenceWarning, SolveStats, Status
from deq_fusion_jax.tokens import TokenFusion

__version__ = "0.1.0"

__all__ = [
    "Adjoint",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "DEQFusion",
    "FusionCell",
    "FusionOutput",
    "FusionState",
    "Implicit",
    "Phantom",
    "Picard",
    "SolveStats",
    "Status",
    "TokenFusion",
    "Unrolled",
    "coupling",
    "deq_fixed_point",
    "jacobian_penalty",
    "spectral_radius",
]
