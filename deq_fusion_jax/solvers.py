"""Fixed-point solvers: frozen configurations that build jaxopt `IterativeSolver`s.

Picard, Anderson and Broyden differ in the next iterate they propose; see `PerSample` for the rest.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deq_fusion_jax.mixing import along, combination, mixing_weights, products, put, ring_like
from deq_fusion_jax.per_sample import PerSample, jaxopt
from deq_fusion_jax.program import collective_axes
from deq_fusion_jax.residual import measured, row_norm
from deq_fusion_jax.state import Map, PyTree, ravel, unraveler, zeros_of_rows
from deq_fusion_jax.static import known
from deq_fusion_jax.stats import SolveStats, Status, judged


class Solver(Protocol):
    """What `deq_fixed_point` asks of a solver; hashable, so that it is static under jit."""

    @property
    def tol(self) -> float: ...

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]: ...


@dataclass(frozen=True)
class Picard(PerSample):
    """Picard iteration, which converges linearly, at the spectral radius of f:

    $$z ← (1 − β) z + β f(z).$$

    See `Anderson` for the shared options tol, max_steps, damping (β), trace and atol.
    """

    def remember(self, z: jax.Array) -> tuple[()]:
        return ()

    def propose(self, memory, k, age, z, fz, plain):
        return memory, z + self.damping * (fz - z)


class _History(NamedTuple):
    """The last m evaluations in a ring; slot k mod m holds evaluation k, and its change Δ_k."""

    residuals: jax.Array  # [B, m, N] r_j = f(z_j) − z_j
    images: jax.Array  # [B, m, N] z_j + β r_j
    gram: jax.Array  # [m, m, B] ⟨Δ_i r, Δ_j r⟩ with Δ_j r = r_j − r_{j−1}
    projection: jax.Array  # [m, B] ⟨Δ_j r, r⟩ with the newest r


@dataclass(frozen=True)
class Anderson(PerSample):
    r"""Anderson acceleration (type II), one least-squares problem per sample and step.

    The next iterate mixes the last `history` ones so that the mixed residual is smallest. With
    r = f(z) − z and the changes Δ between successive iterates,

    $$z ← z + β r − ∑_j γ_j Δ_j (z + β r),$$
    $$γ = \arg\min ‖r − ∑_j γ_j Δ_j r‖^2 + λ ∑_j γ_j^2 ‖Δ_j r‖^2.$$

    The ridge λ is relative to each change of the residual, so that it means the same at the first
    step and at the last, and for modes in which f moves slowly.

    Attributes:
      tol, atol: the relative and the absolute tolerance, as rtol and atol of `numpy.allclose`: a
        sample is done when $‖f(z) − z‖ ≤ \mathtt{atol} + \mathtt{tol} ‖f(z)‖$. With atol None it is
        1e-9 tol: a state whose norm is below 1e-9 counts as zero. Either may be an array.
      max_steps: the most evaluations of f a sample may use; it may be an array. One
        more, of what is returned, follows where a sample fails.
      damping: β in (0, 1].
      trace: whether `SolveStats.trace` is recorded.
      history: m, how many iterates are mixed.
      ridge: λ.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, §2.
    """

    history: int = 6
    ridge: Any = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if self.history < 2:
            raise ValueError(f"Anderson(history={self.history}): mixing needs at least 2 iterates.")
        if known(self.ridge) and not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): expected a value ≥ 0.")

    def remember(self, z: jax.Array) -> _History:
        m, row = self.history, zeros_of_rows(z)
        ring, gram = ring_like(z, m), jnp.broadcast_to(row, (m, m, *row.shape))
        return _History(ring, ring, gram, gram[0])

    def propose(self, memory, k, age, z, fz, plain):
        m, usable = self.history, (age > 0)[:, None]
        slot = k % m
        r = jnp.where(usable, fz - z, 0)
        image = jnp.where(usable, z + self.damping * r, 0)
        memory = _remembered(memory, slot, r, image, _rounding(fz))
        evaluations_ago = ((slot - jnp.arange(m)) % m)[:, None]
        # A change takes two evaluations.
        valid = evaluations_ago < (jnp.minimum(age, m) - 1)[None]
        gamma = mixing_weights(memory.gram, memory.projection, valid, self.ridge)
        mixed = jnp.all(jnp.isfinite(gamma), axis=0) & ~plain
        gamma = jnp.where(mixed[None], gamma, 0)
        # As weights of the images; the newest alone is the plain step.
        newest = (evaluations_ago == 0).astype(z.dtype)
        return memory, combination(newest - gamma + jnp.roll(gamma, -1, axis=0), memory.images)


def _remembered(
    memory: _History, slot: jax.Array, r: jax.Array, image: jax.Array, rounding: jax.Array
) -> _History:
    """The memory with an evaluation, r [B, N] and its image, in a slot of the ring."""
    residuals = put(memory.residuals, r, slot, 1)
    # Read when the ring has been written, which XLA then does in place.
    last = (slot - 1) % residuals.shape[1]
    change = r - jax.lax.dynamic_index_in_dim(residuals, last, 1, keepdims=False)
    # Differences of products, not products of differences: so only evaluations are kept, and read
    # once. Their rounding is that of a product with r.
    row = products(residuals, change).T
    square = along(change, change)
    square = jnp.where(square > rounding**2, square, 0)
    row = put(row - jnp.roll(row, 1, axis=0), square, slot, 0)
    gram = put(put(memory.gram, row, slot, 0), row, slot, 1)
    projection = put(memory.projection + row, along(change, r), slot, 0)
    return _History(residuals, put(memory.images, image, slot, 1), gram, projection)


def _rounding(fz: jax.Array) -> jax.Array:
    """The size [B] below which a change of f(z) − z is rounding.

    A secant through rounding leaps: f(z) = z + 1 would be said to converge where 1 is negligible.
    """
    return 4 * jnp.finfo(fz.dtype).eps * row_norm(fz)


class _Secants(NamedTuple):
    """B⁻¹ = −I + Σ_j u_j v_jᵀ, and the evaluation that the next secant pair starts from."""

    u: jax.Array  # [B, m, N]
    v: jax.Array  # [B, m, N]
    z: jax.Array  # [B, N]
    g: jax.Array  # [B, N] f(z) − z


@dataclass(frozen=True)
class Broyden(PerSample):
    r"""Broyden's good method on f(z) − z, with rank-one secant updates:

    $$z ← z − β B^{-1} g(z), \qquad g(z) = f(z) − z.$$

    $B^{-1}$ starts as −I, so the first step is the plain one. A step adds $u v^⊤$ to it, with

    $$v = B^{-⊤} Δz, \qquad u = (Δz − B^{-1} Δg) / (v^⊤ Δg).$$

    When the memory is full it starts afresh.

    Attributes:
      tol, max_steps, damping (β), trace, atol: as in `Anderson`.
      history: m, how many secant pairs are kept.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965.
    """

    history: int = 12

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"Broyden(history={self.history}): at least 1 secant pair is needed.")

    def remember(self, z: jax.Array) -> _Secants:
        ring = ring_like(z, self.history)
        return _Secants(ring, ring, z, jnp.zeros_like(z))

    def propose(self, memory, k, age, z, fz, plain):
        m = self.history
        slot = k % m
        g = jnp.where(age[:, None] > 0, fz - z, 0)
        # Pairs since the last restart; age − 1 of them fit the newest evaluation.
        pairs = jnp.maximum(age - 1, 0) % (m + 1)
        evaluations_ago = (slot - jnp.arange(m)) % m
        ago = evaluations_ago[None]
        old = ((ago > 0) & (ago < pairs[:, None]))[:, :, None]
        u, v = jnp.where(old, memory.u, 0), jnp.where(old, memory.v, 0)

        dz, dg = z - memory.z, g - memory.g
        new_v = _apply(v, u, dz)
        denominator = jnp.sum(new_v * dg, axis=1, keepdims=True)
        small = jnp.finfo(z.dtype).eps * (row_norm(new_v) * row_norm(dg))[:, None]
        changed = row_norm(dg) > _rounding(fz)
        usable = ((pairs > 0) & changed)[:, None] & (jnp.abs(denominator) > small)
        new_u = (dz - _apply(u, v, dg)) / jnp.where(usable, denominator, 1)
        u = put(u, jnp.where(usable, new_u, 0), slot, 1)
        v = put(v, jnp.where(usable, new_v, 0), slot, 1)
        step = -_apply(u, v, g)
        mixed = jnp.all(jnp.isfinite(step), axis=1) & ~plain
        return _Secants(u, v, z, g), z + self.damping * jnp.where(mixed[:, None], step, g)


def _apply(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """(−I + Σ_j u_j v_jᵀ) x per sample; u, v [B, m, N], x [B, N]."""
    return combination(products(v, x).T, u) - x


# --- jaxopt's own solver objects -------------------------------------------------------------


@dataclass(frozen=True)
class _Jaxopt:
    """A jaxopt solver handed in by the user; it mixes and stops for the batch as a whole.

    jaxopt's `tol` bounds one absolute norm over the batch. `SolveStats` is still per sample and
    relative: `steps` is jaxopt's iteration count, `residual` is measured once more at the end.
    """

    solver: jaxopt.base.IterativeSolver

    @property
    def tol(self) -> float:
        return self.solver.tol

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]:
        if axes := collective_axes(f):
            raise ValueError(
                f"f communicates over {axes}, but jaxopt's solvers stop on every device by "
                "themselves; give Picard, Anderson or Broyden of this library, which stop together."
            )
        changes: dict[str, Any] = {"implicit_diff": False, "has_aux": False, "unroll": False}
        if isinstance(self.solver, jaxopt.Broyden):  # a root finder
            changes["fun"] = lambda z, *args: jax.tree.map(jnp.subtract, f(z, *args), z)
        else:
            changes["fixed_point_fun"] = f
        z, state = dataclasses.replace(self.solver, **changes).run(z0, *args)
        flat, flat0 = ravel(z), ravel(z0)
        flat = jnp.where(jnp.all(jnp.isfinite(flat), axis=1, keepdims=True), flat, flat0)
        z = unraveler(z0)(flat)
        _, residual = measured(ravel(f(z, *args)), flat, 0.0)
        steps = jnp.full(flat.shape[0], state.iter_num, jnp.int32)
        return z, judged(steps, residual, self.solver.tol, Status.OUT_OF_STEPS)


def as_solver(solver: Any) -> Solver:
    """`solver` itself, or a jaxopt solver object wrapped so that `deq_fixed_point` can call it.

    Raises:
      TypeError: it is neither.
    """
    theirs = (jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration, jaxopt.Broyden)
    if isinstance(solver, theirs):
        return _Jaxopt(solver)
    if callable(getattr(solver, "solve", None)) and not isinstance(solver, type):
        return solver
    raise TypeError(
        f"solver is {solver!r}; expected an object such as Anderson(tol=1e-4): Picard, Anderson or "
        "Broyden of this library, or jaxopt's FixedPointIteration, AndersonAcceleration or Broyden."
    )
