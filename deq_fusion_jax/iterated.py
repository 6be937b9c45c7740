"""What fusions that iterate a cell share: `Iterated`, and `Equilibrium` for those that solve."""

from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import export
from jax.sharding import AxisType, PartitionSpec

from deq_fusion_jax.cell import as_map
from deq_fusion_jax.diagnostics import jacobian_penalty, spectral_radius
from deq_fusion_jax.fixed_point import deq_fixed_point
from deq_fusion_jax.gradients import Adjoint, GradientRule, Implicit
from deq_fusion_jax.injection import Modalities
from deq_fusion_jax.solvers import Anderson, Solver
from deq_fusion_jax.state import Map, PyTree
from deq_fusion_jax.stats import SolveStats

Solve = Callable[..., tuple[Any, SolveStats]]


class FusionOutput(NamedTuple):
    """What every fusion returns; what a fusion does not have is None.

    Attributes:
      fused: [B, …, d] the fused features.
      modalities: the equilibrium of each modality, [B, …, d].
      gates: $α_i$ [B, …, d], how much of the fused state each modality lets through; 0 if missing.
      stats: `SolveStats` of the solve.
      jacobian_penalty: scalar, when an rng "jacobian" is given.
      spectral_radius: [B], of ∂f/∂z at the result, when an rng "radius" is given.
    """

    fused: jax.Array
    modalities: Modalities | None = None
    gates: Modalities | None = None
    stats: SolveStats | None = None
    jacobian_penalty: jax.Array | None = None
    spectral_radius: jax.Array | None = None


export.register_namedtuple_serialization(
    FusionOutput, serialized_name="deq_fusion_jax.FusionOutput"
)


class Iterated(nn.Module):
    """Fusion by iterating a cell, a module (z, injection) → z; a subclass says how, in `iterate`.

    Attributes:
      features: d, the width of every equilibrium.
      dropout: rate within the cell; one mask a solve.
      jacobian_probes: of `jacobian_penalty`.
      dtype: computation dtype of the layers.
    """

    features: int
    _: KW_ONLY
    dropout: float = 0.0
    jacobian_probes: int = 2
    dtype: Any = None

    def run(
        self, cell: nn.Module, z0: PyTree, injection: PyTree, adjoint0: Adjoint | None
    ) -> tuple[PyTree, SolveStats | None, jax.Array | None, jax.Array | None]:
        """The state iterated to, how it went, and the Jacobian penalty and the spectral radius
        there, each if its rng is given."""
        if self.is_initializing():
            cell(z0, injection)  # creates the parameters
        unbound, variables = cell.unbind()
        z, stats = self.iterate(unbound, z0, variables, injection, adjoint0)
        penalty = radius = None
        f = as_map(unbound)
        if self.has_rng("jacobian"):
            key, probes = self.make_rng("jacobian"), self.jacobian_probes
            penalty = jacobian_penalty(f, z, variables, injection, key=key, probes=probes)
        if self.has_rng("radius"):
            key = self.make_rng("radius")
            radius = spectral_radius(f, z, variables, injection, key=key)
        return z, stats, penalty, radius

    def iterate(
        self,
        cell: Any,
        z0: PyTree,
        variables: PyTree,
        injection: PyTree,
        adjoint0: Adjoint | None,
    ) -> tuple[PyTree, SolveStats | None]:
        """The state that the unbound cell is iterated to from z0, and how it went, if measured."""
        raise NotImplementedError


class Equilibrium(Iterated):
    """An `Iterated` that goes to the fixed point of its cell.

    Attributes:
      solver, gradient, batch_axis: see `DEQFusion`.
    """

    solver: Solver = Anderson(tol=1e-4, max_steps=50)
    gradient: GradientRule = Implicit()
    batch_axis: str | None = None

    def solve(self) -> Solve:
        """`deq_fixed_point`, of every device's own samples where a batch axis is named."""
        solve: Solve = partial(deq_fixed_point, solver=self.solver, gradient=self.gradient)
        if self.batch_axis is None or self.is_initializing():
            return solve
        return _on_each_device(solve, self.batch_axis)

    def iterate(
        self,
        cell: Any,
        z0: PyTree,
        variables: PyTree,
        injection: PyTree,
        adjoint0: Adjoint | None,
    ) -> tuple[PyTree, SolveStats]:
        return self.solve()(as_map(cell), z0, variables, injection, adjoint0=adjoint0)

    @staticmethod
    def state(out: FusionOutput) -> PyTree:
        """What `z0` is like, from an output."""
        raise NotImplementedError


def _on_each_device(solve: Solve, axis: str) -> Solve:
    """`solve` of every device's shard of z0 and the inputs; the variables are replicated."""
    sharded, replicated = PartitionSpec(axis), PartitionSpec()
    trace = PartitionSpec(None, axis)
    stats = SolveStats(sharded, sharded, sharded, trace, sharded)  # type: ignore[arg-type]

    def solve_shards(
        f: Map, z0: Any, variables: Any, *inputs: Any, adjoint0: Adjoint | None
    ) -> tuple[Any, SolveStats]:
        def solve_shard(z0, variables, inputs, adjoint0):
            return solve(f, z0, variables, *inputs, adjoint0=adjoint0)

        specs = (sharded, replicated, sharded, sharded)
        operands: tuple[Any, ...] = (z0, variables, inputs, adjoint0)
        mesh = jax.sharding.get_abstract_mesh()
        if dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(axis) is AxisType.Explicit:
            operands = tuple(
                jax.tree.map(lambda x, spec=spec: jax.reshard(x, spec), operand)
                for operand, spec in zip(operands, specs, strict=True)
            )
        shards = jax.shard_map(solve_shard, in_specs=specs, out_specs=(sharded, stats))
        return shards(*operands)

    return solve_shards
