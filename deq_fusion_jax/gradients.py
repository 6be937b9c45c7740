"""How the equilibrium is differentiated: three rules, each apart from the solver.

The value of `deq_fixed_point` is z* whichever rule is chosen; the rule only turns the cotangent
g = ∂ℓ/∂z* into the cotangents of `args`. Every rule is itself differentiable in reverse mode.
`Adjoint` is how the backward solve of `Implicit` is seen, and warm-started, from outside.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp

from deq_fusion_jax.solvers import Anderson, Solver
from deq_fusion_jax.state import Map, PyTree, ravel, working_dtype


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
        adjoint0: "Adjoint | None",
    ) -> tuple[PyTree, ...]:
        """The cotangents of adjoint0 and of every one of args.

        `fixed_point` is `deq_fixed_point`, `solver` the forward one.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adjoint:
    """The backward solve of `Implicit`: where it starts as a value, how it ended as a gradient.

    JAX keeps what happens in a backward pass to itself, except for gradients. So `deq_fixed_point`
    takes an `Adjoint` to start from and hands out the final one as the gradient with respect to it:

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import Adjoint, deq_fixed_point
        >>> def loss(a, adjoint0):
        ...     f, z0 = lambda z, a: jnp.cos(a * z), jnp.zeros((2, 1))
        ...     z_star, _ = deq_fixed_point(f, z0, a, adjoint0=adjoint0)
        ...     return z_star.sum()
        >>> adjoint0 = Adjoint.zeros(jnp.zeros((2, 1)))
        >>> gradient, adjoint = jax.grad(loss, argnums=(0, 1))(jnp.ones((2, 1)), adjoint0)
        >>> adjoint.failed.tolist()
        [0.0, 0.0]

    As gradients do, the statistics of several solves with one `Adjoint` add up.

    Attributes:
      u: like z0, the solution for a cotangent g scaled to a largest entry of 1 in every sample.
        As a start, zeros mean that there is no guess.
      steps: [B] float32, products with $J^⊤$ that the sample used.
      residual: [B] relative residual $‖J^⊤ u + g − u‖ / ‖J^⊤ u + g‖$ at the returned u.
      failed: [B] float32, 0 where the solve converged and 1 where it did not.
    """

    u: PyTree
    steps: jax.Array
    residual: jax.Array
    failed: jax.Array

    @classmethod
    def zeros(cls, z0: PyTree) -> Self:
        """No guess, for a state like z0 [B, …]."""
        batch = jax.tree.leaves(z0)[0].shape[0]
        return cls(
            jax.tree.map(jnp.zeros_like, z0),
            steps=jnp.zeros(batch, jnp.float32),
            residual=jnp.zeros(batch, working_dtype(z0)),
            failed=jnp.zeros(batch, jnp.float32),
        )


@dataclass(frozen=True)
class Implicit:
    r"""Implicit differentiation: the adjoint equation at the fixed point, solved for u,

    $$u = J^⊤ u + g, \qquad ∂ℓ/∂θ = u^⊤ ∂f/∂θ,$$

    with J = ∂f/∂z at $z^⋆$ and the cotangent $g = ∂ℓ/∂z^⋆$. f is linearised once at $z^⋆$; every
    step of the adjoint solve applies that linear map. Memory does not depend on the number of
    solver steps. The adjoint solve is a `deq_fixed_point` itself.

    Attributes:
      solver: solver of the adjoint equation; None takes the forward solver, Anderson's with a
        ridge of 1e-4 at most: the equation is linear, so mixing needs little restraint.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, theorem 1; paper §3.3.
    """

    solver: Any = None

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver, adjoint0):
        _, vjp = jax.vjp(f, z_star, *args)
        # The equation is linear: solved for cotangents of unit size, small ones do not underflow.
        size = jax.lax.stop_gradient(_largest(g))
        unit = _per_sample(lambda s, x: x / s, jnp.where(size > 0, size, 1), g)

        def adjoint_map(u: PyTree) -> PyTree:
            return jax.tree.map(jnp.add, vjp(u)[0], unit)

        start = unit if adjoint0 is None else _guess(adjoint0.u, unit)
        solver = self.solver or _for_linear(solver)
        u, stats = fixed_point(adjoint_map, start, solver=solver, gradient=self)
        adjoint = None
        if adjoint0 is not None:
            steps, failed = (x.astype(jnp.float32) for x in (stats.steps, ~stats.converged))
            adjoint = Adjoint(u, steps, stats.residual, failed)
        return adjoint, *vjp(_per_sample(jnp.multiply, size, u))[1:]


def _largest(z: PyTree) -> jax.Array:
    """The largest absolute entry [B] of every sample."""
    return jnp.max(jnp.abs(ravel(z)), axis=1)


def _guess(u0: PyTree, unit: PyTree) -> PyTree:
    """u0, or `unit`, one step from zero, where there is no u0; 0 where there is no cotangent."""
    return _per_sample(jnp.where, (_largest(u0) > 0) & (_largest(unit) > 0), u0, unit)


def _for_linear(solver: Solver) -> Solver:
    if isinstance(solver, Anderson):
        return dataclasses.replace(solver, ridge=min(solver.ridge, 1e-4))
    return solver


def _per_sample(operation: Callable[..., jax.Array], s: jax.Array, *trees: PyTree) -> PyTree:
    """operation(s, *leaves) with one number s [B] per sample, in the dtype of the first tree."""

    def leaf(*x: jax.Array) -> jax.Array:
        return operation(s.reshape(-1, *(1 for _ in x[0].shape[1:])), *x).astype(x[0].dtype)

    return jax.tree.map(leaf, *trees)


@dataclass(frozen=True)
class Phantom:
    r"""Phantom gradient: backpropagation through `steps` damped steps from the fixed point $z^⋆$,

    $$z ← (1 − λ) z + λ f(z).$$

    Cheap and biased: a truncated Neumann series in place of its limit,

    $$u = λ ∑_k (λ J^⊤ + (1 − λ) I)^k g \quad \text{for} \quad u = (I − J^⊤)^{-1} g.$$

    No adjoint equation is solved, so nothing in it can fail to converge.

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

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver, adjoint0):
        _no_adjoint(self, adjoint0)
        return None, *_unrolled_pullback(f, z_star, args, g, self.steps, self.damping)


@dataclass(frozen=True)
class Unrolled:
    """Backpropagation through `steps` plain iterations from z0, the solver aside,

    $$z ← f(z).$$

    Exact to $O(ρ^K)$ where f contracts with spectral radius ρ, and useless where it does not.
    Memory grows with the number of steps.

    Attributes:
      steps: K, how many iterations are unrolled.
    """

    steps: int = 30

    def __post_init__(self):
        _check_steps(self)

    def pullback(self, f, z0, z_star, args, g, fixed_point, solver, adjoint0):
        _no_adjoint(self, adjoint0)
        return None, *_unrolled_pullback(f, z0, args, g, self.steps, 1.0)


def _no_adjoint(rule: Phantom | Unrolled, adjoint0: Adjoint | None) -> None:
    if adjoint0 is not None:
        raise ValueError(f"{rule} solves no adjoint equation; adjoint0 is for Implicit().")


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
