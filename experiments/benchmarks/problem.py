"""The fusion layer as a problem to be timed: weights, inputs, the map, and the exact answer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deq_fusion_jax import Anderson, DEQFusion, FusionCell, FusionState
from deq_fusion_jax.cell import as_map
from deq_fusion_jax.injection import Inject
from deq_fusion_jax.state import PyTree
from experiments.common.errors import InputError

EPSILON = float(jnp.finfo(jnp.float32).eps)

Shape = tuple[int, int, int]  # batch, channels, modalities
Equilibrium = Callable[[PyTree, PyTree], tuple[FusionState, Any]]  # (params, inputs) → z*, aux


class Outcome(NamedTuple):
    """What a contender found, in numpy: z*, and the gradient by (parameters, inputs)."""

    z: FusionState
    gradient: PyTree


@dataclass(frozen=True, eq=False)
class Problem:
    """z* and the gradient of ⟨c, z_f*⟩ for a layer of official initialisation, in float32."""

    shape: Shape
    seed: int
    params: PyTree
    inputs: Any  # {modality: [B, d]} from 2 · N(0, 1)
    c: Any  # [B, d] from N(0, 1)

    @property
    def start(self) -> FusionState:
        return jax.tree.map(np.zeros_like, FusionState(dict(self.inputs), self.c))

    def f(self, z: FusionState, variables: PyTree, injection: PyTree) -> FusionState:
        cell = FusionCell(tuple(self.inputs), self.shape[1], gate_scale=1.0, residual_scale=1.0)
        return as_map(cell)(z, variables, injection)

    def arguments(self, params: PyTree, inputs: PyTree) -> tuple[PyTree, PyTree]:
        """What f is given beside z."""
        injection = Inject(self.shape[1], lift=0.0).apply({"params": params["inject"]}, inputs)
        return {"params": params["cell"]}, injection

    def value_and_grad(self, equilibrium: Equilibrium) -> Any:
        """Jitted: (params, inputs) → (⟨c, z_f⟩, (z, aux)), gradient."""

        def loss(params: PyTree, inputs: PyTree) -> tuple[jax.Array, Any]:
            z, aux = equilibrium(params, inputs)
            return jnp.sum(z.fused * self.c), (z, aux)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))

    @cached_property
    def reference(self) -> Outcome:
        """Our layer's own answer in float64, at tolerance 1e-12.

        Raises:
          InputError: there is none, as samples of this problem do not converge.
        """
        solver = Anderson(tol=1e-12, max_steps=2000)
        layer = DEQFusion.official(self.shape[1], solver=solver, schedule="joint")
        with jax.enable_x64(True):
            solve = self.value_and_grad(through(layer, lambda stats: stats.converged))
            (_, (z, converged)), gradient = jax.device_get(solve(*_wide(self.params, self.inputs)))
        if not converged.all():
            raise InputError(
                f"shape {self.shape} with seed {self.seed}: {np.sum(~converged)} samples find no "
                "equilibrium to compare with; choose another --seed, or more channels"
            )
        return Outcome(z, gradient)

    @cached_property
    def size(self) -> float:
        """‖z*‖ over the batch, which turns a relative tolerance into an absolute one."""
        return norm(self.reference.z)

    def gradient_error(self, gradient: PyTree) -> float:
        """‖g − g*‖ / ‖g*‖ over all parameters and inputs."""
        exact = self.reference.gradient
        return norm(jax.tree.map(np.subtract, _wide(gradient)[0], exact)) / norm(exact)

    def residuals(self, z: FusionState) -> tuple[float, float]:
        """‖f(z) − z‖ / ‖f(z)‖ in float64: the largest of a sample, and that of the batch."""
        with jax.enable_x64(True):
            image = jax.device_get(self._image(*_wide(z, self.params, self.inputs)))
        difference = _norms(jax.tree.map(np.subtract, image, z))
        size = _norms(image)
        return float(np.max(difference / size)), norm(difference) / norm(size)

    @cached_property
    def _image(self) -> Callable[..., FusionState]:
        return jax.jit(lambda z, params, inputs: self.f(z, *self.arguments(params, inputs)))


@lru_cache(maxsize=1)
def make_problem(shape: Shape, seed: int) -> Problem:
    """The last one is kept, as its reference serves every tolerance."""
    batch, features, modalities = shape
    start, target, *keys = jax.random.split(jax.random.key(seed), 2 + modalities)
    normal = partial(jax.random.normal, shape=(batch, features))
    inputs = {f"modality{i}": 2 * normal(key) for i, key in enumerate(keys)}
    params = jax.jit(DEQFusion.official(features).init)(start, inputs)["params"]
    return Problem(shape, seed, *jax.device_get((params, inputs, normal(target))))


def reaches(residual: float, tol: float) -> bool:
    """Whether a residual, which differs a little from the contender's own, is at the tolerance."""
    return residual <= 1.05 * tol


def through(layer: nn.Module, aux: Callable[[Any], Any]) -> Equilibrium:
    """A fusion layer as an `Equilibrium`, with aux(stats)."""

    def equilibrium(params: PyTree, inputs: PyTree) -> tuple[FusionState, Any]:
        out: Any = layer.apply({"params": params}, inputs)
        return FusionState(out.modalities, out.fused), aux(out.stats)

    return equilibrium


def norm(tree: PyTree) -> float:
    """‖·‖ over all arrays of the tree."""
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=float)) for x in jax.tree.leaves(tree))))


def _norms(z: FusionState) -> np.ndarray:
    """‖z‖ [B] per sample."""
    return np.linalg.norm(np.concatenate(jax.tree.leaves(z), axis=1), axis=1)


def _wide(*trees: PyTree) -> tuple[PyTree, ...]:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), trees)
