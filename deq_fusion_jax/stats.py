"""What a fixed-point solve did, sample by sample."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental import checkify


class ConvergenceError(RuntimeError):
    """Raised by `SolveStats.raise_if_failed` when a sample missed the tolerance."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SolveStats:
    """Per-sample statistics of one solve; plain arrays, so they pass through jit, vmap and scan.

    They carry no gradient.

    Attributes:
      steps: [B] int32, evaluations of f that the sample used, the last one included.
      residual: [B] relative residual ‖f(z) − z‖ / ‖f(z)‖ at the returned z, in float32 or wider;
        infinite where no finite iterate was met.
      converged: [B] bool, residual ≤ tol.
      trace: [max_steps, B] the residual of every evaluation, NaN after a sample's last one; None
        unless the solver was built with `trace=True`.
    """

    steps: jax.Array
    residual: jax.Array
    converged: jax.Array
    trace: jax.Array | None = None

    def raise_if_failed(self) -> None:
        """Raises if any sample failed to converge, and says how many, how badly and what to try.

        Outside `jax.jit` this is a `ConvergenceError`. Under a transformation it is a
        `checkify.check`, which `jax.experimental.checkify.checkify` turns into an error value.
        """
        failed = jnp.sum(~self.converged)
        worst = jnp.max(self.residual)
        message = (
            "{failed} of {total} samples did not converge; the worst relative residual is {worst}. "
            "Try more max_steps, a larger tol, Anderson in place of Picard, or make f more "
            "contractive (smaller initial weights, a Jacobian penalty)."
        )
        total = jnp.asarray(self.converged.size)
        if isinstance(failed, jax.core.Tracer):
            checkify.check(failed == 0, message, failed=failed, total=total, worst=worst)
        elif failed:
            values = {"failed": failed, "total": total, "worst": f"{float(worst):.2e}"}
            raise ConvergenceError(message.format(**values))


def chained(first: SolveStats, second: SolveStats) -> SolveStats:
    """Statistics of a solve in two stages: M problems of every sample, then one that needs them.

    `first` is of M·B problems, [M, B] in row-major order, `second` of B. A sample's `steps` are
    those of its slowest first problem plus the second's, its `residual` is the largest, and it has
    `converged` if all have. `trace` has the largest residual of the first stage, step by step,
    followed by the second stage's.
    """
    batch = len(second.steps)
    steps, residual, converged = (
        x.reshape(-1, batch) for x in (first.steps, first.residual, first.converged)
    )
    before = jnp.max(steps, axis=0)
    trace = None
    if first.trace is not None and second.trace is not None:
        worst = jnp.nanmax(first.trace.reshape(len(first.trace), -1, batch), axis=1)
        row = jnp.arange(2 * len(worst))[:, None]
        padded = jnp.concatenate([worst, jnp.full_like(worst, jnp.nan)])
        moved = jnp.take_along_axis(second.trace, (row - before) % len(worst), axis=0)
        within = (row >= before) & (row < before + len(worst))
        trace = jnp.where(within, moved, padded)
    return SolveStats(
        before + second.steps,
        jnp.maximum(jnp.max(residual, axis=0), second.residual),
        jnp.all(converged, axis=0) & second.converged,
        trace,
    )
