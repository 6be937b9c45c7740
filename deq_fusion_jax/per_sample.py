"""The solve that Picard, Anderson and Broyden share, as one jaxopt `IterativeSolver`.

It is per sample: a sample has its own residual and its own stop, and is frozen once it is done, so
it gets the same answer alone and in any batch. Each evaluation is measured, the best iterate kept,
what went wrong begun again from there; a solver only proposes the next iterate.

This is the only file that imports jaxopt.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deq_fusion_jax.state import Map, PyTree, ravel, unraveler, varying, working_dtype
from deq_fusion_jax.stats import SolveStats

with warnings.catch_warnings():  # jaxopt is unmaintained, and says so at import
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained")
    import jaxopt.base

# A sample stalls when MIXED evaluations in a row leave its residual above PROGRESS × what it was.
# Then PLAIN plain steps follow, then MIXED mixed ones again, until there is progress. Plain steps
# that take the residual above ESCAPE × what it was, and above FAR, diverge: mixing starts anew from
# there. Below FAR they may be on their way over a hump, where mixing would only take them back.
PROGRESS, MIXED, PLAIN, ESCAPE, FAR = 0.9, 6, 42, 10, 0.2


class _State(NamedTuple):
    """State of `_Loop`, one entry per sample b; jaxopt reads `iter_num` and `error`."""

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
class _Loop(jaxopt.base.IterativeSolver):
    """jaxopt solver for z = f(z) on matrices [B, N], one independent problem per row."""

    f: Callable[..., jax.Array]
    config: "PerSample"
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

    def run(self, z: jax.Array, *args: PyTree) -> jaxopt.OptStep:
        """jaxopt's loop, less its first step outside the loop: half the program to compile."""

        def unfinished(step: jaxopt.OptStep) -> jax.Array:
            return (step.state.error > self.tol) & (step.state.iter_num < self.maxiter)

        start = varying(jaxopt.OptStep(z, self.init_state(z, *args)), [jax.typeof(z)])
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

    def update(self, z: jax.Array, state: _State, *args: PyTree) -> jaxopt.OptStep:
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

        return jaxopt.OptStep(
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
        residual = row_norm((fz - z) / size) / (row_norm(fz / size) + limits.tiny)
        # Past this size 1 / size is denormal, and the quotients would be flushed to 0.
        return jnp.where(size[:, 0] < 0.01 * limits.max, residual, jnp.inf)

    # Squares of small or large states leave the range of float32; such rows are scaled first.
    step, size = row_norm(fz - z), row_norm(fz)
    low, high = limits.tiny**0.25, limits.max**0.25
    in_range = (size > low) & (size < high) & (step < high)
    residual = step / size
    return jax.lax.cond(
        jnp.all(in_range), lambda: residual, lambda: jnp.where(in_range, residual, scaled())
    )


def row_norm(x: jax.Array) -> jax.Array:
    """‖x_b‖ [B] of the rows of x [B, N]."""
    return jnp.sqrt(jnp.sum(x * x, axis=1))


@dataclass(frozen=True)
class PerSample:
    """Options that Picard, Anderson and Broyden have, and the solve itself.

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
        loop = _Loop(
            f=lambda z, *args: ravel(f(unravel(z), *args)),
            config=self,
            round=(lambda z: ravel(unravel(z))) if mixed else (lambda z: z),
        )
        _, state = loop.run(ravel(z0), *args)
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
