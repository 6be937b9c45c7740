"""README's picture, drawn from a solve of a fresh layer on random inputs.

python -m experiments.reporting.overview            (writes notebooks/overview.png)
"""

from pathlib import Path

import jax

from deq_fusion_jax import Anderson, DEQFusion
from experiments.reporting.figures.overview import overview

PATH = Path("notebooks/overview.png")


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = {name: jax.random.normal(k, (64, 64)) for name, k in zip("ab", keys[:2], strict=True)}
    solver = Anderson(tol=1e-5, trace=True)
    out, _ = jax.jit(DEQFusion(64, solver=solver).init_with_output)(keys[2], inputs)
    PATH.parent.mkdir(exist_ok=True)
    overview(out.stats.trace, solver.tol).savefig(PATH, dpi=150)
    print(f"Picture: {PATH}")


if __name__ == "__main__":
    main()
