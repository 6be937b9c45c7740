"""What a fixed-point solve did, sample by sample."""

import enum
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from deq_fusion_jax.state import exportable


class Status(enum.IntEnum):
    """How the solve of a sample ended; an entry of `SolveStats.status`."""

    CONVERGED = 0  # the residual is at most the tolerance
    OUT_OF_STEPS = 1  # max_steps evaluations, and it was not
    DIVERGED = 2  # the last iterates went away: ‖f(z) − z‖ grew tenfold, or overflowed
    NOT_FINITE = 3  # f is NaN or infinite where the iteration starts or leads to


class ConvergenceError(RuntimeError):
    """Raised by `SolveStats.raise_if_failed` when a sample missed the tolerance."""


class ConvergenceWarning(RuntimeWarning):
    """Issued when a gradient was computed of a sample whose solve missed its tolerance."""


@exportable
@dataclass(frozen=True)
class SolveStats:
    r"""Per-sample statistics of one solve; plain arrays, so they pass through jit, vmap and scan.

    They carry no gradient.

    Attributes:
      steps: [B] int32, evaluations of f that the sample used, the last one included.
      residual: [B] $‖f(z) − z‖ / (‖f(z)‖ + \mathtt{atol} / \mathtt{tol})$ at the returned z, in
        float32 or wider; infinite where f is not finite there.
      converged: [B] bool, residual ≤ tol.
      trace: [max_steps, B] the residual of every evaluation, NaN after a sample's last one; None
        unless the solver was built with `trace=True`. Under jax_debug_nans, infinite, not NaN.
      status: [B] int32, a `Status` that says why: 0 converged, 1 out of steps, 2 diverged, 3 not
        finite; None where a solver of your own does not tell.
    """

    steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    trace: jax.Array | None = None
    status: jax.Array | None = None

    def raise_if_failed(self) -> None:
        """Raises if any sample failed to converge, and says how many, why and what to try.

        Outside `jax.jit` this is a `ConvergenceError`. Under a transformation it is a
        `checkify.check`, which `jax.experimental.checkify.checkify` turns into an error value.
        """
        failed, total = jnp.sum(~self.converged), jnp.asarray(self.converged.size)
        values: dict[str, Any] = {
            "failed": failed,
            "total": total,
            "worst": jnp.max(self.residual, initial=0),
        }
        if self.status is not None:
            for status in (Status.OUT_OF_STEPS, Status.DIVERGED, Status.NOT_FINITE):
                values[status.name.lower()] = jnp.sum(self.status == status)
        if isinstance(failed, jax.core.Tracer):
            checkify.check(failed == 0, _message(values), **values)
        elif failed:
            shown = {name: int(value) for name, value in values.items() if name != "worst"}
            present = {name: value for name, value in shown.items() if value}
            text = _message(present).format(**present, worst=f"{float(values['worst']):.2e}")
            raise ConvergenceError(text)


# What helps a solve that ended in a status, whatever the solver.
_ADVICE = {
    "out_of_steps": "{out_of_steps} ran out of steps (more max_steps, or a larger tol; Anderson or "
    "Broyden where it was Picard; with Anderson a longer history or a smaller ridge)",
    "diverged": "{diverged} moved away from their best (damping below 1, smaller weights, Jacobian "
    "penalty, another z0; Anderson or Broyden where it was Picard)",
    "not_finite": "{not_finite} met NaN or infinity in f (look at its inputs and at z0)",
}


def _message(values: dict[str, Any]) -> str:
    """The message of `raise_if_failed`, to be formatted with the values."""
    text = "{failed} of {total} samples did not converge; the worst relative residual is {worst}"
    reasons = [advice for name, advice in _ADVICE.items() if name in values]
    return text + (": " + "; ".join(reasons) if reasons else "") + "."


def judged(
    steps: jax.Array,
    residual: jax.Array,
    tol: Any,
    reason: jax.Array | Status | None = None,
    trace: jax.Array | None = None,
) -> SolveStats:
    """Statistics from the residual [B] at the returned state; `reason`, why a sample would fail."""
    finite = jnp.isfinite(residual)
    residual = jnp.where(finite, residual, jnp.inf)
    converged, status = residual <= tol, None
    if reason is not None:
        status = jnp.where(finite, reason, Status.NOT_FINITE)
        status = jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32)
    return SolveStats(steps, residual, converged, trace, status)


def in_parts(first: SolveStats, second: SolveStats) -> SolveStats:
    """Statistics of a map that was solved in two parts, [B] each.

    An evaluation of the map is one of each part, so a sample's `steps` are the larger of the two
    counts. Its `residual` and `status` are the larger ones, too; it has `converged` if both have.
    `trace` has the larger residual of the parts that were still going on.
    """
    trace = None
    if first.trace is not None and second.trace is not None:
        trace = jnp.fmax(first.trace, second.trace)
    status = None
    if first.status is not None and second.status is not None:
        status = jnp.maximum(first.status, second.status)
    return SolveStats(
        jnp.maximum(first.steps, second.steps),
        jnp.maximum(first.residual, second.residual),
        first.converged & second.converged,
        trace,
        status,
    )
