"""Fixed-point solvers: frozen configurations that build jaxopt `IterativeSolver`s.

Every solver here is per sample: a sample has its own residual, its own mixing and its own stop,
and is frozen once it is done, so it gets the same answer alone and in any batch. The shared part
(`_PerSample`: measure, keep the best, fall back, stop) is one jaxopt solver; Picard, Anderson and
Broyden differ only in the next iterate they propose.

This is the only file that imports jaxopt.
"""

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from deq_fusion_jax.mixing import combination, mixing_weights, products
from deq_fusion_jax.state import PyTree, ravel, unraveler, varying, working_dtype
from deq_fusion_jax.stats import SolveStats

with warnings.catch_warnings():  # jaxopt is unmaintained, and says so at import
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained")
    import jaxopt
    from jaxopt.base import IterativeSolver, OptStep

Map = Callable[..., PyTree]


class Solver(Protocol):
    """What `deq_fixed_point` asks of a solver; hashable, so that it is static under jit."""

    @property
    def tol(self) -> float: ...

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]: ...


# --- the part that all solvers share ---------------------------------------------------------

# A sample stalls when MIXED evaluations in a row leave its residual above PROGRESS × what it was.
# Then PLAIN plain steps follow, then MIXED mixed ones again, until there is progress. Plain steps
# that take the residual above ESCAPE × what it was, and above FAR, diverge: mixing starts anew from
# there. Below FAR they may be on their way over a hump, where mixing would only take them back.
PROGRESS, MIXED, PLAIN, ESCAPE, FAR = 0.9, 6, 42, 10, 0.2


class _State(NamedTuple):
    """State of `_PerSample`, one entry per sample b; jaxopt reads `iter_num` and `error`."""

    iter_num: jax.Array  # [] evaluations so far
    error: jax.Array  # [] the largest residual among unfinished samples, 0 when all are done
    best: jax.Array  # [B, N] finite iterate of lowest residual
    residual: jax.Array  # [B] its residual
    steps: jax.Array  # [B] evaluations used
    active: jax.Array  # [B] not finished yet
    age: jax.Array  # [B] evaluations since the start or the last restart
    milestone: jax.Array  # [B] the residual that progress is measured against
    since: jax.Array  # [B] evaluations since then
    memory: Any  # what the proposal remembers
    trace: jax.Array | None  # [max_steps, B]


@dataclass(eq=False)
class _PerSample(IterativeSolver):
    """jaxopt solver for z = f(z) on matrices [B, N], one independent problem per row."""

    f: Callable[..., jax.Array]
    config: "_Configured"
    round: Callable[[jax.Array], jax.Array] = lambda z: z  # to what f's own dtype can hold

    implicit_diff = False  # the gradient is fixed_point.py's business
    jit = True
    unroll = False
    verbose = False

    def __post_init__(self):
        """Not jaxopt's, which would jit `update` a second time inside the loop."""

    @property
    def tol(self) -> float:
        return self.config.tol

    @property
    def maxiter(self) -> int:
        return self.config.max_steps

    def run(self, z: jax.Array, *args: PyTree) -> OptStep:
        """jaxopt's loop, less its first step outside the loop: half the program to compile."""

        def unfinished(step: OptStep) -> jax.Array:
            return (step.state.error > self.tol) & (step.state.iter_num < self.maxiter)

        start = varying(OptStep(z, self.init_state(z, *args)), [jax.typeof(z)])
        return jax.lax.while_loop(unfinished, lambda step: self.update(*step, *args), start)

    def init_state(self, z: jax.Array, *args: PyTree) -> _State:
        batch = z.shape[0]
        shape = (self.maxiter, batch)
        return _State(
            iter_num=jnp.zeros((), jnp.int32),
            error=jnp.full((), jnp.inf, z.dtype),
            best=z,
            residual=jnp.full(batch, jnp.inf, z.dtype),
            steps=jnp.zeros(batch, jnp.int32),
            active=jnp.ones(batch, bool),
            age=jnp.zeros(batch, jnp.int32),
            milestone=jnp.full(batch, jnp.inf, z.dtype),
            since=jnp.zeros(batch, jnp.int32),
            memory=self.config.remember(z),
            trace=jnp.full(shape, jnp.nan, z.dtype) if self.config.trace else None,
        )

    def update(self, z: jax.Array, state: _State, *args: PyTree) -> OptStep:
        """One evaluation of f, and the next iterate of every unfinished sample."""
        fz = self.f(z, *args)
        residual = relative_residual(fz, z)
        finite = jnp.isfinite(residual)
        active = state.active

        better = active & (residual < state.residual)
        best = jnp.where(better[:, None], z, state.best)
        lowest = jnp.where(better, residual, state.residual)
        trace = state.trace
        if trace is not None:
            trace = trace.at[state.iter_num].set(jnp.where(active, residual, jnp.nan))

        # NaN or overflow: once more from the best iterate, with an empty memory and a plain step.
        # Where the plain step itself led here there is nothing left to try.
        stuck = ~finite & (state.age <= 1)
        unfinished = active & ~stuck & ~(residual <= self.tol)
        age = jnp.where(finite, state.age + 1, 0)
        milestone, since = _progress(state, residual)
        memory, proposal = self.config.propose(
            state.memory, state.iter_num, age, z, fz, plain=_stalled(since)
        )
        z_next = jnp.where((unfinished & finite)[:, None], self.round(proposal), best)

        return OptStep(
            z_next,
            _State(
                iter_num=state.iter_num + 1,
                error=jnp.max(jnp.where(unfinished, lowest, 0), initial=0),
                best=best,
                residual=lowest,
                steps=state.steps + active,
                active=unfinished,
                age=age,
                milestone=milestone,
                since=since,
                memory=memory,
                trace=trace,
            ),
        )

    def optimality_fun(self, z: jax.Array, *args: PyTree) -> jax.Array:
        return self.f(z, *args) - z


def _progress(state: _State, residual: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The residual that progress is measured against from here on, and evaluations since it.

    Mixing can come to rest where the residual has a minimum that is no fixed point; plain iteration
    walks on. So a sample that stalls alternates between the two.
    """
    anew = residual < PROGRESS * state.milestone
    anew |= _stalled(state.since) & (residual > jnp.maximum(ESCAPE * state.milestone, FAR))
    return jnp.where(anew, residual, state.milestone), jnp.where(anew, 0, state.since + 1)


def _stalled(since: jax.Array) -> jax.Array:
    """Whether plain steps are due."""
    return since % (MIXED + PLAIN) >= MIXED


def relative_residual(fz: jax.Array, z: jax.Array) -> jax.Array:
    """‖f(z) − z‖ / ‖f(z)‖ per row of [B, N] matrices; 0 where f(z) = z = 0."""
    limits = jnp.finfo(z.dtype)

    def scaled() -> jax.Array:
        size = jnp.max(jnp.maximum(jnp.abs(fz), jnp.abs(z)), axis=1, keepdims=True) + limits.tiny
        residual = _norm((fz - z) / size) / (_norm(fz / size) + limits.tiny)
        # Past this size 1 / size is denormal, and the quotients would be flushed to 0.
        return jnp.where(size[:, 0] < 0.01 * limits.max, residual, jnp.inf)

    # Squares of small or large states leave the range of float32; such rows are scaled first.
    step, size = _norm(fz - z), _norm(fz)
    low, high = limits.tiny**0.25, limits.max**0.25
    in_range = (size > low) & (size < high) & (step < high)
    residual = step / size
    return jax.lax.cond(
        jnp.all(in_range), lambda: residual, lambda: jnp.where(in_range, residual, scaled())
    )


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x * x, axis=1))


@dataclass(frozen=True)
class _Configured:
    """Options that every solver of this file has, and the solve itself.

    Attributes:
      tol: relative residual ‖f(z) − z‖ / ‖f(z)‖ at which a sample is done.
      max_steps: the most evaluations of f a sample may use.
      damping: β in (0, 1]; z ← z + β (f(z) − z) is the plain step.
      trace: whether `SolveStats.trace` is recorded.
    """

    tol: float = 1e-4
    max_steps: int = 50
    damping: float = 1.0
    trace: bool = False

    def __post_init__(self):
        name = type(self).__name__
        if not self.tol > 0:
            raise ValueError(f"{name}(tol={self.tol}): tol is a relative residual; give one > 0.")
        if self.max_steps < 1:
            raise ValueError(f"{name}(max_steps={self.max_steps}): at least 1 step is needed.")
        if not 0 < self.damping <= 1:
            raise ValueError(f"{name}(damping={self.damping}): expected a value in (0, 1].")

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]:
        """Solves z = f(z, *args) from z0, every leaf [B, …]. No gradient; see `deq_fixed_point`.

        Raises:
          ValueError: tol is below the resolution of the coarsest dtype of z0.
        """
        coarsest = max((jnp.finfo(x.dtype) for x in jax.tree.leaves(z0)), key=lambda i: i.eps)
        if self.tol < coarsest.eps:
            raise ValueError(
                f"tol={self.tol} is below the resolution of {coarsest.dtype} "
                f"({float(coarsest.eps):.1e}); raise tol or use a wider dtype for the state."
            )
        unravel = unraveler(z0)
        mixed = any(x.dtype != working_dtype(z0) for x in jax.tree.leaves(z0))
        solver = _PerSample(
            f=lambda z, *args: ravel(f(unravel(z), *args)),
            config=self,
            round=(lambda z: ravel(unravel(z))) if mixed else (lambda z: z),
        )
        _, state = solver.run(ravel(z0), *args)
        stats = SolveStats(state.steps, state.residual, state.residual <= self.tol, state.trace)
        return unravel(state.best), stats

    def remember(self, z: jax.Array) -> Any:
        """The empty memory for a state like z [B, N]."""
        raise NotImplementedError

    def propose(self, memory, k, age, z, fz, plain) -> tuple[Any, jax.Array]:
        """The memory with evaluation k added, and the next iterate [B, N].

        Args:
          k: [] int, evaluations before this one, the same for all samples.
          age: [B] int, how many of the last evaluations are valid, this one included; 0 where
            f(z) is not finite, and then the proposal is not used.
          z, fz: [B, N], the newest evaluation.
          plain: [B] bool, where a plain step is due; a singular mixing gives way to one as well.
        """
        raise NotImplementedError


# --- the solvers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Picard(_Configured):
    """Picard iteration z ← (1 − β) z + β f(z): linear convergence at the spectral radius of f.

    See `Anderson` for the shared options tol, max_steps, damping (β) and trace.
    """

    def remember(self, z: jax.Array) -> tuple[()]:
        return ()

    def propose(self, memory, k, age, z, fz, plain):
        return memory, z + self.damping * (fz - z)


class _History(NamedTuple):
    """The last m evaluations in a ring; slot k mod m holds evaluation k."""

    residuals: jax.Array  # [B, m, N] r_j = f(z_j) − z_j
    images: jax.Array  # [B, m, N] z_j + β r_j
    gram: jax.Array  # [m, m, B] ⟨r_i, r_j⟩


@dataclass(frozen=True)
class Anderson(_Configured):
    """Anderson acceleration (type II), one least-squares problem per sample and step.

    z ← Σ_j α_j (z_j + β r_j) with r_j = f(z_j) − z_j over the last `history` iterates and
    α = argmin ‖Σ_j α_j r_j‖² subject to Σ_j α_j = 1, that is α ∝ (D (C + λI) D)⁻¹ 1 with C the
    correlation matrix of the residuals and D the diagonal matrix of their norms. The ridge λ is
    relative, so that it means the same at the first step and at the last.

    Attributes:
      tol: relative residual ‖f(z) − z‖ / ‖f(z)‖ at which a sample is done.
      max_steps: the most evaluations of f a sample may use.
      damping: β in (0, 1].
      trace: whether `SolveStats.trace` is recorded.
      history: m, how many iterates are mixed.
      ridge: λ.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011, §2.
    """

    history: int = 5
    ridge: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if self.history < 2:
            raise ValueError(f"Anderson(history={self.history}): mixing needs at least 2 iterates.")
        if not self.ridge >= 0:
            raise ValueError(f"Anderson(ridge={self.ridge}): expected a value ≥ 0.")

    def remember(self, z: jax.Array) -> _History:
        m, (batch, n) = self.history, z.shape
        ring = jnp.zeros((batch, m, n), z.dtype)
        return _History(ring, ring, jnp.zeros((m, m, batch), z.dtype))

    def propose(self, memory, k, age, z, fz, plain):
        m = self.history
        slot = k % m
        r, usable = fz - z, (age > 0)[:, None]
        residuals = memory.residuals.at[:, slot].set(jnp.where(usable, r, 0))
        images = memory.images.at[:, slot].set(jnp.where(usable, z + self.damping * r, 0))
        row = products(residuals, r).T
        gram = memory.gram.at[slot].set(row).at[:, slot].set(row)
        evaluations_ago = (slot - jnp.arange(m)) % m
        valid = evaluations_ago[:, None] < age
        alpha = mixing_weights(gram, valid, self.ridge)
        # The newest image alone is the plain step.
        mixed = jnp.all(jnp.isfinite(alpha), axis=0) & ~plain
        alpha = jnp.where(mixed, alpha, evaluations_ago[:, None] == 0)
        return _History(residuals, images, gram), combination(alpha.T, images)


class _Secants(NamedTuple):
    """B⁻¹ = −I + Σ_j u_j v_jᵀ, and the evaluation that the next secant pair starts from."""

    u: jax.Array  # [B, m, N]
    v: jax.Array  # [B, m, N]
    z: jax.Array  # [B, N]
    g: jax.Array  # [B, N] f(z) − z


@dataclass(frozen=True)
class Broyden(_Configured):
    """Broyden's good method on g(z) = f(z) − z: z ← z − β B⁻¹ g(z), with rank-one secant updates.

    B⁻¹ starts as −I, so the first step is the plain one. The update is u vᵀ with
    v = B⁻ᵀ Δz and u = (Δz − B⁻¹ Δg) / (vᵀ Δg). When the memory is full it starts afresh.

    Attributes:
      tol, max_steps, damping (β), trace: as in `Anderson`.
      history: m, how many secant pairs are kept.

    Source: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965.
    """

    history: int = 12

    def __post_init__(self):
        super().__post_init__()
        if self.history < 1:
            raise ValueError(f"Broyden(history={self.history}): at least 1 secant pair is needed.")

    def remember(self, z: jax.Array) -> _Secants:
        ring = jnp.zeros((z.shape[0], self.history, z.shape[1]), z.dtype)
        return _Secants(ring, ring, z, jnp.zeros_like(z))

    def propose(self, memory, k, age, z, fz, plain):
        m = self.history
        slot = k % m
        g = jnp.where(age[:, None] > 0, fz - z, 0)
        # Pairs since the last restart; age − 1 of them fit the newest evaluation.
        pairs = jnp.maximum(age - 1, 0) % (m + 1)
        evaluations_ago = (slot - jnp.arange(m)) % m
        old = ((evaluations_ago > 0) & (evaluations_ago < pairs[:, None]))[:, :, None]
        u, v = jnp.where(old, memory.u, 0), jnp.where(old, memory.v, 0)

        dz, dg = z - memory.z, g - memory.g
        new_v = _apply(v, u, dz)
        denominator = jnp.sum(new_v * dg, axis=1, keepdims=True)
        small = jnp.finfo(z.dtype).eps * (_norm(new_v) * _norm(dg))[:, None]
        usable = (pairs > 0)[:, None] & (jnp.abs(denominator) > small)
        new_u = (dz - _apply(u, v, dg)) / jnp.where(usable, denominator, 1)
        u = u.at[:, slot].set(jnp.where(usable, new_u, 0))
        v = v.at[:, slot].set(jnp.where(usable, new_v, 0))
        step = -_apply(u, v, g)
        mixed = jnp.all(jnp.isfinite(step), axis=1) & ~plain
        return _Secants(u, v, z, g), z + self.damping * jnp.where(mixed[:, None], step, g)


def _apply(u: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    """(−I + Σ_j u_j v_jᵀ) x per sample; u, v [B, m, N], x [B, N]."""
    return combination(products(v, x), u) - x


# --- jaxopt's own solver objects -------------------------------------------------------------


@dataclass(frozen=True)
class _Jaxopt:
    """A jaxopt solver handed in by the user; it mixes and stops for the batch as a whole.

    jaxopt's `tol` bounds one absolute norm over the batch. `SolveStats` is still per sample and
    relative: `steps` is jaxopt's iteration count, `residual` is measured once more at the end.
    """

    solver: IterativeSolver

    @property
    def tol(self) -> float:
        return self.solver.tol

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]:
        changes: dict[str, Any] = {"implicit_diff": False, "has_aux": False, "unroll": False}
        if isinstance(self.solver, jaxopt.Broyden):  # a root finder
            changes["fun"] = lambda z, *args: jax.tree.map(jnp.subtract, f(z, *args), z)
        else:
            changes["fixed_point_fun"] = f
        z, state = dataclasses.replace(self.solver, **changes).run(z0, *args)
        flat, flat0 = ravel(z), ravel(z0)
        flat = jnp.where(jnp.all(jnp.isfinite(flat), axis=1, keepdims=True), flat, flat0)
        z = unraveler(z0)(flat)
        residual = relative_residual(ravel(f(z, *args)), flat)
        residual = jnp.where(jnp.isfinite(residual), residual, jnp.inf)
        steps = jnp.full(flat.shape[0], state.iter_num, jnp.int32)
        return z, SolveStats(steps, residual, residual <= self.solver.tol)


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
