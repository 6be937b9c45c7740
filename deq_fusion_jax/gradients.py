"""How the equilibrium is differentiated: three rules, each apart from the solver.

The value of `deq_fixed_point` is z* whichever rule is chosen; the rule only turns the cotangent
g = ∂ℓ/∂z* into the cotangents of `args`. Every rule is itself differentiable in reverse mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from deq_fusion_jax.solvers import Map, Solver
from deq_fusion_jax.state import PyTree, ravel


class GradientRule(Protocol):
    """What `deq_fixed_point` asks of a gradient rule; hashable, so that it is static under jit."""

    def pullback(
        self,
        f: Map,
        z0: PyTree,
        z_star: PyTree,
        args: tuple[PyTree, ...],
        g: PyTree,
        fixed_point: Callable[..., Any],
        solver: Solver,
    ) -> tuple[PyTree, ...]:
        """The cotangents of args. `fixed_point` is `deq_fixed_point`; `solver` the forward one."""
        ...


@dataclass(frozen=True)
class Implicit:
    """Implicit differentiation: u solves u = Jᵀu + g, then ∂ℓ/∂θ = uᵀ ∂f/∂θ, with J = ∂f/∂z at z*.

    f is linearised once at z*; every step of the adjoint solve applies that linear map. Memory
    does not depend on the number of solver steps. The adjoint solve is a `deq_fixed_point` itself.

    Attributes:
      solver: solver of the adjoint equation; None takes the forward solver.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, theorem 1; paper §3.3.
    """

    solver: Any = None

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver):
        _, vjp = jax.vjp(f, z_star, *args)
        # The equation is linear: solved for cotangents of unit size, small ones do not underflow.
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(ravel(g)), axis=1))
        size = jnp.where(size > 0, size, 1)
        unit = _per_sample(jnp.divide, g, size)

        def adjoint_map(u: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, vjp(u)[0], unit)

        u, _ = fixed_point(adjoint_map, unit, solver=self.solver or solver, gradient=self)
        return vjp(_per_sample(jnp.multiply, u, size))[1:]


def _per_sample(operation: Callable[..., jax.Array], z: PyTree, s: jax.Array) -> PyTree:
    """operation(z, s) with one number s [B] per sample."""

    def leaf(x: jax.Array) -> jax.Array:
        return operation(x, s.reshape(-1, *(1 for _ in x.shape[1:]))).astype(x.dtype)

    return jax.tree.map(leaf, z)


@dataclass(frozen=True)
class Phantom:
    """Phantom gradient: backpropagation through `steps` damped steps z ← (1 − λ) z + λ f(z) at z*.

    Cheap and biased: the truncated Neumann series λ Σ_k (λ Jᵀ + (1 − λ) I)^k g in place of
    (I − Jᵀ)⁻¹ g. No adjoint equation is solved, so nothing in it can fail to converge.

    Attributes:
      steps: how many steps are unrolled.
      damping: λ in (0, 1].

    Source: Geng et al., "On Training Implicit Models", 2021, §3 (unrolling-based).
    """

    steps: int = 5
    damping: float = 1.0

    def __post_init__(self):
        _check_steps(self)
        if not 0 < self.damping <= 1:
            raise ValueError(f"Phantom(damping={self.damping}): expected a value in (0, 1].")

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver):
        return _unrolled_pullback(f, z_star, args, g, self.steps, self.damping)


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through `steps` plain iterations z ← f(z) from z0, the solver aside.

    Exact to O(ρ^steps) where f contracts with spectral radius ρ, and useless where it does not.
    Memory grows with `steps`.

    Attributes:
      steps: how many iterations are unrolled.
    """

    steps: int = 30

    def __post_init__(self):
        _check_steps(self)

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver):
        return _unrolled_pullback(f, z0, args, g, self.steps, 1.0)


def _check_steps(rule: Phantom | Unrolled) -> None:
    if rule.steps < 1:
        raise ValueError(f"{type(rule).__name__}(steps={rule.steps}): at least 1 step is needed.")


def _unrolled_pullback(f, start, args, g, steps: int, damping: float) -> tuple[PyTree, ...]:
    """Cotangents of args through `steps` damped iterations of f from `start`, held constant."""

    def unrolled(*args: PyTree) -> PyTree:
        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            return ((1 - damping) * old + damping * new).astype(old.dtype)

        def step(z: PyTree, _: None) -> tuple[PyTree, None]:
            return jax.tree.map(mix, z, f(z, *args)), None

        return jax.lax.scan(step, start, None, length=steps)[0]

    return jax.vjp(unrolled, *args)[1](g)
