"""How the equilibrium is differentiated: three rules, each apart from the solver.

The value of `deq_fixed_point` is z* whichever rule is chosen; the rule only says which linear map
dθ → dz* stands for its derivative, and how its transpose is applied. Forward and reverse mode, any
number of times, follow from the two. `Adjoint` is how the backward solve of `Implicit` is seen, and
warm-started, from outside.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp

from deq_fusion_jax.failures import warn_of, without_nan
from deq_fusion_jax.solvers import Anderson, Solver
from deq_fusion_jax.state import (
    Map,
    PyTree,
    exportable,
    ravel,
    unraveler,
    varying,
    working_dtype,
)
from deq_fusion_jax.stats import SolveStats

LINEAR_RIDGE = 1e-5  # Anderson's largest for a linear equation


class Solved(NamedTuple):
    """A fixed point, as a gradient rule is given it: z_star = f(z_star, theta)."""

    f: Map
    z0: PyTree
    z_star: PyTree
    theta: PyTree  # what z_star is differentiated in
    stats: SolveStats
    solver: Solver  # that found it
    fixed_point: Callable[..., Any]  # `deq_fixed_point`
    adjoint0: "Adjoint | None"


class GradientRule(Protocol):
    """What `deq_fixed_point` asks of a gradient rule; hashable, so that it is static under jit."""

    def tangent(self, solved: Solved, dtheta: PyTree, dadjoint: "Adjoint | None") -> PyTree:
        """The tangent of z_star for the tangent dtheta: linear, and JAX can transpose it.

        The cotangent of dadjoint, on which it does not depend, is how the transpose ended.
        """
        ...


@exportable
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

    with J = ∂f/∂z at $z^⋆$ and the cotangent $g = ∂ℓ/∂z^⋆$; in forward mode the tangent equation,

    $$dz = J\,dz + (∂f/∂θ)\,dθ.$$

    f is linearised once at $z^⋆$; every step of the solve applies that linear map. Memory does not
    depend on the number of solver steps. The solve is a `deq_fixed_point` itself.

    A sample fails where its fixed point was not found, this equation was not solved, or f has no
    finite derivative. Its gradient is then unknown. By default it adds exactly nothing to any
    gradient, as if it were not there, and a `ConvergenceWarning` says how many there were, except
    where an `Adjoint` is watching. The warning comes from a `jax.debug.callback` in a branch that
    is only taken when a sample failed, under jit, vmap and shard_map as well. What can hold no
    callback, such as a program for `jax.export`, takes "nan" or an `Adjoint`. A sample whose
    cotangent is zero, as one that the loss masks out, adds nothing, and does not count as failed.

    Attributes:
      solver: solver of the adjoint equation; None takes the forward solver, Anderson's with a
        ridge of 1e-5 at most: the equation is linear, so mixing needs little restraint.
      on_failure: what a failed sample adds to gradients: "zero", nothing; "keep", what follows from
        the best iterates, as is usual where equilibrium models are trained with few steps; "nan",
        NaN, and no warning.

    Source: Bai, Kolter and Koltun, "Deep Equilibrium Models", 2019, theorem 1; paper §3.3.
    """

    solver: Any = None
    on_failure: str = "zero"

    def __post_init__(self):
        if self.on_failure not in ("zero", "keep", "nan"):
            raise ValueError(
                f"Implicit(on_failure={self.on_failure!r}): expected 'zero', 'keep' or 'nan'."
            )

    def tangent(self, solved, dtheta, dadjoint):
        f, z_star, unravel = solved.f, ravel(solved.z_star), unraveler(solved.z_star)
        _, along_z = jax.linearize(lambda z: ravel(f(unravel(z), solved.theta)), z_star)
        _, along_theta = jax.linearize(lambda t: ravel(f(solved.z_star, t)), solved.theta)
        lost = ~solved.stats.converged
        (along_z, first), (along_theta, second) = (
            without_nan(linear, lost) for linear in (along_z, along_theta)
        )
        undefined = varying(first | second, [jax.typeof(z_star)])
        solve = partial(self._solve, solved, undefined)
        # The solution is differentiated by its equation alone, not by how it is solved.
        jvp = jax.lax.stop_gradient(along_z)

        def equation(x: _Tangents) -> _Tangents:
            image = along_z(x.dz)
            return _Tangents(x.dz - image, _tied(x.watch, image))

        def forward(_: Any, b: _Tangents) -> _Tangents:
            return _Tangents(solve(jvp, b.dz)[0], b.watch)

        def backward(_: Any, g: _Tangents) -> _Tangents:
            vjp = jax.linear_transpose(jvp, z_star)
            u, adjoint = solve(lambda u: vjp(u)[0], g.dz, solved.adjoint0)
            return _Tangents(u, None if g.watch is None else adjoint)

        b = along_theta(dtheta)
        b = _Tangents(_tied(b, dadjoint), _tied(dadjoint, b))
        return unravel(jax.lax.custom_linear_solve(equation, b, forward, backward).dz)

    def _solve(
        self,
        solved: Solved,
        undefined: jax.Array,
        apply: Callable[[jax.Array], jax.Array],
        b: jax.Array,
        guess: Adjoint | None = None,
    ) -> tuple[jax.Array, Adjoint]:
        """u = apply(u) + b for matrices [B, N], and how it ended."""
        lost = undefined | ~solved.stats.converged
        asked = jnp.max(jnp.abs(b), axis=1, initial=0)
        b = jnp.where((lost if self.on_failure == "zero" else undefined)[:, None], 0, b)
        # The equation is linear: solved for u of unit size, small ones do not underflow.
        size = jax.lax.stop_gradient(jnp.max(jnp.abs(b), axis=1, initial=0))
        size = jnp.where(size > 0, size, jnp.max(size, initial=0))
        size = jnp.where(size > 0, size, 1)[:, None]
        unit = b / size

        def scaled(v: jax.Array) -> jax.Array:
            return apply(v * size) / size + unit

        start = unit if guess is None else _guess(ravel(guess.u), unit)
        solver = self.solver or _for_linear(solved.solver)
        v, stats = solved.fixed_point(scaled, start, solver=solver, gradient=self)
        failed = jnp.isfinite(asked) & (~stats.converged | (lost & (asked > 0)))
        u = v * size
        if self.on_failure == "nan":
            u = jnp.where(failed[:, None], jnp.nan, u)
        elif self.on_failure == "zero":
            u = jnp.where(failed[:, None], 0, u)
        if solved.adjoint0 is None and self.on_failure != "nan":
            warn_of(failed, self.on_failure)
        steps, missed = (x.astype(jnp.float32) for x in (stats.steps, failed))
        return u, Adjoint(unraveler(solved.z_star)(v), steps, stats.residual, missed)


class _Tangents(NamedTuple):
    """The unknown of the linear system that JAX transposes."""

    dz: jax.Array  # [B, N]
    watch: Adjoint | None  # nothing depends on it; its cotangent is how the transpose ended


def _tied(tree: PyTree, others: PyTree) -> PyTree:
    """The tree as it is, but depending on `others` for JAX, at no cost.

    `custom_linear_solve` can only be transposed in all of its unknowns at once.
    """
    never = [jnp.where(False, jnp.sum(x), 0) for x in jax.tree.leaves(others)]
    return jax.tree.map(lambda x: x + sum(y.astype(x.dtype) for y in never), tree)


def _guess(u0: jax.Array, unit: jax.Array) -> jax.Array:
    """u0, or `unit`, one step from zero, where there is no u0; 0 where there is no cotangent."""
    usable = jnp.any(u0 != 0, axis=1) & jnp.any(unit != 0, axis=1)
    return jnp.where(usable[:, None], u0, unit)


def _for_linear(solver: Solver) -> Solver:
    if isinstance(solver, Anderson):
        return dataclasses.replace(solver, ridge=min(solver.ridge, LINEAR_RIDGE))
    return solver


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

    def tangent(self, solved, dtheta, dadjoint):
        return _unrolled(self, solved, solved.z_star, self.damping, dtheta)


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

    def tangent(self, solved, dtheta, dadjoint):
        return _unrolled(self, solved, solved.z0, 1.0, dtheta)


def _check_steps(rule: Phantom | Unrolled) -> None:
    if rule.steps < 1:
        raise ValueError(f"{type(rule).__name__}(steps={rule.steps}): at least 1 step is needed.")


def _unrolled(
    rule: Phantom | Unrolled, solved: Solved, start: PyTree, damping: float, dtheta: PyTree
) -> PyTree:
    """The tangent through `rule.steps` damped iterations of f from `start`, held constant.

    A sample for which that is not finite adds nothing.
    """
    if solved.adjoint0 is not None:
        raise ValueError(f"{rule} solves no adjoint equation; adjoint0 is for Implicit().")

    def unrolled(theta: PyTree) -> PyTree:
        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            return ((1 - damping) * old + damping * new).astype(old.dtype)

        def step(z: PyTree, _: None) -> tuple[PyTree, None]:
            return jax.tree.map(mix, z, solved.f(z, theta)), None

        return jax.lax.scan(step, start, None, length=rule.steps)[0]

    _, linear = jax.linearize(unrolled, solved.theta)
    return without_nan(linear, ~solved.stats.converged)[0](dtheta)
