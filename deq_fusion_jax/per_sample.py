"""The solve that Picard, Anderson and Broyden share, as one jaxopt `IterativeSolver`.

It is per sample: a sample has its own residual and its own stop, and rests once it is done, so it
gets the same answer alone and in any batch. Each evaluation is measured, the best iterate kept,
what went wrong begun again from there; a solver only proposes the next iterate.

This is the only file that imports jaxopt.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from deq_fusion_jax.program import collective_axes
from deq_fusion_jax.residual import FLOOR, measured
from deq_fusion_jax.state import (
    Map,
    PyTree,
    ravel,
    unraveler,
    varying,
    working_dtype,
    zeros_of_rows,
)
from deq_fusion_jax.static import is_array, known
from deq_fusion_jax.stats import SolveStats, Status, judged

with warnings.catch_warnings():  # jaxopt is unmaintained, and says so at import
    warnings.filterwarnings("ignore", message="JAXopt is no longer maintained")
    import jaxopt.base

# A sample stalls when MIXED evaluations in a row leave its residual above PROGRESS × what it was.
# Then PLAIN plain steps follow, MIXED mixed ones again, then LONG plain ones, and so forth until
# there is progress. Plain steps that take the residual above ESCAPE × what it was, and above FAR,
# diverge: mixing starts anew from there. Below FAR they may be on their way over a hump, where
# mixing would only take them back. Mixing that takes it as far starts anew from the best iterate.
PROGRESS, MIXED, PLAIN, LONG, ESCAPE, FAR = 0.9, 12, 42, 168, 10, 0.2


class _State(NamedTuple):
    """State of `_Loop`, one entry per sample b; jaxopt reads `iter_num` and `error`."""

    iter_num: jax.Array  # [] evaluations so far
    error: jax.Array  # [] infinite while another evaluation is due, then 0
    best: jax.Array  # [B, N] the iterate with the smallest ‖f(z) − z‖, or the one at the tolerance
    step: jax.Array  # [B] ‖f(z) − z‖ there
    residual: jax.Array  # [B] its relative residual, by the last evaluation where it is at rest
    steps: jax.Array  # [B] evaluations used
    active: jax.Array  # [B] not finished yet; the others are at rest, at their best
    status: jax.Array  # [B] why it would fail
    age: jax.Array  # [B] evaluations since the start or the last restart
    milestone: jax.Array  # [B] the residual that progress is measured against
    since: jax.Array  # [B] evaluations since then
    memory: Any  # what the proposal remembers
    trace: jax.Array | None  # [max_steps, B]


@dataclass(eq=False)
class _Loop(jaxopt.base.IterativeSolver):
    """jaxopt solver for z = f(z) on matrices [B, N], one problem per row.

    Rows may read one another. So a row at rest is measured in every evaluation, and goes on if it
    is no longer at its tolerance; and the loop ends with an evaluation of the state it returns.
    """

    f: Callable[..., jax.Array]
    config: "PerSample"
    round: Callable[[jax.Array], jax.Array] = lambda z: z  # to what f's own dtype can hold
    axes: tuple[str, ...] = ()  # of a mesh: f has collectives, so its devices stop together

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
        start = varying(jaxopt.OptStep(z, self.init_state(z, *args)), [jax.typeof(z)])
        return jax.lax.while_loop(
            lambda step: step.state.error > 0, lambda step: self.update(*step, *args), start
        )

    def init_state(self, z: jax.Array, *args: PyTree) -> _State:
        row = zeros_of_rows(z)
        count, infinite = row.astype(jnp.int32), jnp.full_like(row, jnp.inf)
        trace = None
        if self.config.trace:  # the last row is for the evaluation of what is returned
            blank = jnp.full_like(row, _blank())
            trace = jnp.broadcast_to(blank, (self.maxiter + 1, *row.shape))
        return _State(
            iter_num=jnp.zeros((), jnp.int32),
            error=jnp.full((), jnp.inf, z.dtype),
            best=z,
            step=infinite,
            residual=infinite,
            steps=count,
            active=count == 0,
            status=jnp.full_like(count, Status.OUT_OF_STEPS),
            age=count,
            milestone=infinite,
            since=count,
            memory=self.config.remember(z),
            trace=trace,
        )

    def update(self, z: jax.Array, state: _State, *args: PyTree) -> jaxopt.OptStep:
        """One evaluation of f, and the next iterate of every unfinished sample."""
        fz = self.f(z, *args)
        step, residual = measured(fz, z, self.config.floor)
        finite, reached = jnp.isfinite(residual), residual <= self.tol
        in_time = state.iter_num < self.maxiter

        # A row that had reached the tolerance and has lost it, because others moved, starts anew.
        disturbed = ~state.active & (state.residual <= self.tol) & ~reached & in_time
        active = state.active | disturbed
        # Smaller by more than rounding, so that the end of a solve that gets nowhere is not "best".
        noise = jnp.finfo(z.dtype).eps / residual
        better = active & (reached | disturbed | (step * (1 + noise) < state.step))
        best = jnp.where(better[:, None], z, state.best)

        # NaN, overflow, or mixed far astray: once more from the best iterate, with an empty memory
        # and a plain step. Where a plain step led to NaN there is nothing left to try.
        stuck = active & ~finite & (state.age <= 1)
        usable = finite & ~_astray(state, step, residual)
        unfinished = active & ~stuck & ~reached & (state.iter_num + 1 < self.maxiter)
        age = jnp.where(usable, jnp.where(disturbed, 1, state.age + 1), 0)
        milestone, since = _progress(state, residual, disturbed)
        memory, proposal = self.config.propose(
            state.memory, state.iter_num, age, z, fz, plain=_stalled(since)
        )
        z_next = jnp.where((unfinished & usable)[:, None], self.round(proposal), best)

        return jaxopt.OptStep(
            z_next,
            _State(
                iter_num=state.iter_num + 1,
                # Rows that fail go back to their best, which another evaluation has to see.
                error=self._infinite_if_any(unfinished | (active & ~reached), residual),
                best=best,
                step=jnp.where(better, step, state.step),
                residual=jnp.where(better | ~active, residual, state.residual),
                steps=state.steps + active.astype(jnp.int32),
                active=unfinished,
                status=_status(state, active, better, stuck, step),
                age=age,
                milestone=milestone,
                since=since,
                memory=memory,
                trace=_recorded(state, jnp.where(active, residual, _blank())),
            ),
        )

    def _infinite_if_any(self, due: jax.Array, like: jax.Array) -> jax.Array:
        error = jnp.where(jnp.any(due), jnp.inf, 0.0).astype(like.dtype)
        return varying(jax.lax.pmax(error, self.axes), [jax.typeof(like)]) if self.axes else error

    def optimality_fun(self, z: jax.Array, *args: PyTree) -> jax.Array:
        return self.f(z, *args) - z


def _astray(state: _State, step: jax.Array, residual: jax.Array) -> jax.Array:
    """Whether mixing led to where the residual is much larger than at the best iterate."""
    mixed = (state.age > 1) & ~_stalled(state.since)
    return mixed & (step > ESCAPE * state.step) & (residual > FAR)


def _recorded(state: _State, residual: jax.Array) -> jax.Array | None:
    """The trace with this evaluation in it, if there is one."""
    if state.trace is None:
        return None
    return jax.lax.dynamic_update_index_in_dim(state.trace, residual, state.iter_num, 0)


def _status(
    state: _State, active: jax.Array, better: jax.Array, stuck: jax.Array, step: jax.Array
) -> jax.Array:
    """Why a sample would fail, if it ended here."""
    away = ~(step <= ESCAPE * state.step)
    status = jnp.where(away, Status.DIVERGED, state.status)
    status = jnp.where(better, Status.OUT_OF_STEPS, status)
    status = jnp.where(stuck, Status.NOT_FINITE, status)
    return jnp.where(active, status, state.status).astype(jnp.int32)


def _progress(
    state: _State, residual: jax.Array, disturbed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The residual that progress is measured against from here on, and evaluations since it.

    Mixing can come to rest where the residual has a minimum that is no fixed point; plain iteration
    walks on. So a sample that stalls alternates between the two.
    """
    anew = disturbed | (residual < PROGRESS * state.milestone)
    anew |= _stalled(state.since) & (residual > jnp.maximum(ESCAPE * state.milestone, FAR))
    return jnp.where(anew, residual, state.milestone), jnp.where(anew, 0, state.since + 1)


def _blank() -> float:
    """What the trace holds where nothing was measured; jax_debug_nans takes any NaN for a bug."""
    return jnp.inf if jax.debug_nans.value else jnp.nan


def _stalled(since: jax.Array) -> jax.Array:
    """Whether plain steps are due."""
    turn = since % (2 * MIXED + PLAIN + LONG)
    return (turn >= MIXED) & ~((turn >= MIXED + PLAIN) & (turn < 2 * MIXED + PLAIN))


@dataclass(frozen=True)
class PerSample:
    """Options that Picard, Anderson and Broyden have, and the solve itself; see `Anderson`."""

    tol: Any = 1e-4
    max_steps: Any = 50
    damping: Any = 1.0
    trace: bool = False
    atol: Any = None

    def __post_init__(self):
        name = type(self).__name__
        for option, value in self._arrays().items():
            if value.ndim:
                raise ValueError(
                    f"{name}({option}=…) has shape {list(value.shape)}; expected one number."
                )
        if known(self.tol) and not 0 < self.tol < math.inf:
            raise ValueError(f"{name}(tol={self.tol}): tol is a relative residual; give one > 0.")
        if known(self.atol) and not 0 <= self.atol < math.inf:
            raise ValueError(f"{name}(atol={self.atol}): expected a value ≥ 0, or None.")
        if known(self.max_steps) and self.max_steps < 1:
            raise ValueError(f"{name}(max_steps={self.max_steps}): at least 1 step is needed.")
        if not known(self.max_steps) and self.trace:
            raise ValueError(
                f"{name}(trace=True) allocates max_steps rows; give max_steps as a Python int."
            )
        if known(self.damping) and not 0 < self.damping <= 1:
            raise ValueError(f"{name}(damping={self.damping}): expected a value in (0, 1].")

    @property
    def floor(self) -> Any:
        """The size of f(z) below which the tolerance is absolute: atol / tol."""
        return FLOOR if self.atol is None else self.atol / self.tol

    def solve(self, f: Map, z0: PyTree, *args: PyTree) -> tuple[PyTree, SolveStats]:
        """Solves z = f(z, *args) from z0, every leaf [B, …]. No gradient; see `deq_fixed_point`.

        Raises:
          ValueError: tol is below the resolution of the coarsest dtype of z0.
        """
        coarsest = max((jnp.finfo(x.dtype) for x in jax.tree.leaves(z0)), key=lambda i: i.eps)
        if known(self.tol) and self.tol < coarsest.eps:
            raise ValueError(
                f"tol={self.tol} is below the resolution of {coarsest.dtype} "
                f"({float(coarsest.eps):.1e}); raise tol or use a wider dtype for the state."
            )
        unravel = unraveler(z0)
        mixed = any(x.dtype != working_dtype(z0) for x in jax.tree.leaves(z0))
        loop = _Loop(
            f=lambda z, *args: ravel(f(unravel(z), *args)),
            config=self._in(working_dtype(z0)),
            round=(lambda z: ravel(unravel(z))) if mixed else (lambda z: z),
            axes=collective_axes(f),
        )
        _, state = loop.run(ravel(z0), *args)
        trace = None if state.trace is None else state.trace[:-1]
        return unravel(state.best), judged(
            state.steps, state.residual, loop.tol, state.status, trace
        )

    def _in(self, dtype: jnp.dtype) -> Self:
        """The options that are arrays in the types that the loop computes with."""
        arrays: dict[str, Any] = {
            name: jnp.asarray(value).astype(jnp.int32 if name == "max_steps" else dtype)
            for name, value in self._arrays().items()
        }
        return replace(self, **arrays)

    def _arrays(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if is_array(value)}

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
