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
      residual: [B] relative residual $‖f(z) − z‖ / ‖f(z)‖$ at the returned z, in float32 or wider;
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


def in_parts(first: SolveStats, second: SolveStats) -> SolveStats:
    """Statistics of a map that was solved in two parts, [B] each.

    An evaluation of the map is one of each part, so a sample's `steps` are the larger of the two
    counts. Its `residual` is the larger one as well, and it has `converged` if both parts have.
    `trace` has the larger residual of the parts that were still going on.
    """
    trace = None
    if first.trace is not None and second.trace is not None:
        trace = jnp.fmax(first.trace, second.trace)
    return SolveStats(
        jnp.maximum(first.steps, second.steps),
        jnp.maximum(first.residual, second.residual),
        first.converged & second.converged,
        trace,
    )
