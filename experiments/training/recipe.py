"""How a fusion with a solver is trained so that its equilibria stay easy to find.

    shallow start     for the first epochs the cell is applied once, or a few times, in place of the
                      solve: its weights then form a useful map before an equilibrium of it is asked
    warm-up           over the first steps with a solve the fusion's learning rate and the Jacobian
                      weight rise to their values, and the tolerance tightens to its own
    rate, clipping    the fusion learns at a rate of its own; gradients are clipped, see `adamw`
    failures          what a row whose solve failed adds to the gradient, see `build_fusion`

Sources: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, appendix D (shallow start); Bai,
Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization", 2021, §4 (weights
that rise).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from deq_fusion_jax import DEQFusion, TokenFusion
from deq_fusion_jax.baselines import WeightTied
from deq_fusion_jax.iterated import Equilibrium
from deq_fusion_jax.token_baselines import TokensUnrolled

UNROLLED = {DEQFusion: WeightTied, TokenFusion: TokensUnrolled}  # they take each other's variables

PyTree = Any


class Recipe(NamedTuple):
    """What a training does beside its loss and its optimiser; the defaults do nothing.

    Attributes:
      fusion_rate: the fusion's learning rate over that of the rest.
      shallow_steps: K, how often the cell is applied in an epoch without a solve; how many epochs
        there are: `Schedule.shallow`.
      warmup: steps, from the first one with a solve.
      jacobian_start: the Jacobian weight at their beginning, over its value.
      tol_start: the tolerance at their beginning; None: as at their end.
      begin: the first step with a solve.
    """

    fusion_rate: float = 1.0
    shallow_steps: int = 1
    warmup: int = 0
    jacobian_start: float = 1.0
    tol_start: float | None = None
    begin: int = 0

    def risen(self, step: jax.Array) -> jax.Array | float:
        """From 0 to 1 over the warm-up, [] float32: (step − begin + 1) / warmup, at most 1."""
        if not self.warmup:
            return 1.0
        return jnp.clip((step - self.begin + 1) / self.warmup, 0, 1)

    def rate(self, step: jax.Array) -> jax.Array | float:
        """Factor on what the optimiser changes in the fusion."""
        return self.fusion_rate * self.risen(step)

    def jacobian_weight(self, weight: float, step: jax.Array) -> jax.Array | float:
        start = self.jacobian_start
        return weight * (start + (1 - start) * self.risen(step))

    def loosened(self, model: nn.Module, step: jax.Array) -> nn.Module:
        """The model with the tolerance of that step; it falls by equal factors."""
        fusion: Any = getattr(model, "fusion", None)
        if self.tol_start is None or not isinstance(fusion, Equilibrium):
            return model
        solver: Any = fusion.solver
        tol = solver.tol * (self.tol_start / solver.tol) ** (1 - self.risen(step))
        solver = dataclasses.replace(solver, tol=tol)
        return model.clone(fusion=fusion.clone(solver=solver))  # type: ignore[call-arg]

    def shallow(self, model: nn.Module) -> nn.Module:
        """The model with the fusion's cell applied `shallow_steps` times, in place of the solve."""
        fusion: Any = getattr(model, "fusion", None)
        if type(fusion) not in UNROLLED:
            return model
        unrolled = UNROLLED[type(fusion)]
        names = {field.name for field in dataclasses.fields(unrolled)} - {"parent", "name"}
        shared = {name: getattr(fusion, name) for name in names if hasattr(fusion, name)}
        options = shared | {"steps": self.shallow_steps, "tol": None}  # no solve, no statistics
        return model.clone(fusion=unrolled(**options))  # type: ignore[call-arg]


@functools.cache
def adamw(
    learning_rate: float,
    weight_decay: float,
    clip: float = 0.0,
    decayed: Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformation:
    """AdamW of gradients clipped to the global norm `clip` (0: as they are).

    `decayed` says of parameters which ones decay. One object for equal arguments, so that seeds
    share a compiled step.
    """
    update = optax.adamw(learning_rate, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update
