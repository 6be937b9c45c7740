"""Does the fusion converge at initialisation, whatever the scale of its inputs?

    python -m experiments.benchmarks.initialisation            (about 5 minutes on two cores)

For every width d, number of modalities M, kind of input (N(0, s²), and ReLU of it) and scale s,
random layers are applied to random inputs of 64 samples at tolerance 1e-4 and at most 30 solver
steps: the official initialisation, and the library's default. Writes `results.json` and
`table.md` into the run directory and prints the table: share of samples that converged, and the
most steps that any of them took.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from deq_fusion_jax import Anderson, DEQFusion
from experiments.common.cli import parse
from experiments.common.errors import exit_cleanly
from experiments.common.files import versions, write_json, write_text
from experiments.common.text import markdown_table

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Config:
    """Convergence of the fusion layer at initialisation.

    Attributes:
      widths: the widths d.
      modalities: the numbers of modalities M.
      seeds: random layers for each row of the table.
      run_dir: where to write.
    """

    widths: tuple[int, ...] = (64, 256, 512)
    modalities: tuple[int, ...] = (2, 3, 5)
    seeds: int = 10
    run_dir: Path = Path("runs/initialisation")


def steps_to_converge(layer: DEQFusion, modalities: int, relu: bool, key: jax.Array) -> jax.Array:
    """[scales, BATCH] steps of every sample, 0 where it did not converge, for one random layer."""

    def one_scale(scale: jax.Array) -> jax.Array:
        keys = jax.random.split(key, modalities + 1)
        inputs = {}
        for i in range(modalities):
            x = scale * jax.random.normal(keys[i], (BATCH, layer.features))
            inputs[f"modality{i}"] = jax.nn.relu(x) if relu else x
        out: Any = layer.apply(layer.init(keys[-1], inputs), inputs)
        return jnp.where(out.stats.converged, out.stats.steps, 0)

    return jax.lax.map(one_scale, jnp.array(SCALES))


def measure(config: Config) -> list[dict[str, Any]]:
    """One row for each initialisation, d, M and kind of input."""
    solver = Anderson(tol=1e-4, max_steps=30)
    cases = [
        (name, make(features, solver=solver), modalities, relu)
        for name, make in (("official", DEQFusion.official), ("default", DEQFusion))
        for features in config.widths
        for modalities in config.modalities
        for relu in (False, True)
    ]
    keys = jax.random.split(jax.random.key(0), config.seeds)
    rows = []
    for name, layer, modalities, relu in track(cases, description="measuring"):
        run = jax.jit(partial(steps_to_converge, layer, modalities, relu))
        steps = np.stack([run(key) for key in keys], axis=1)  # [scales, seeds, BATCH]
        rows.append(
            {
                "initialisation": name,
                "features": layer.features,
                "modalities": modalities,
                "inputs": "ReLU N" if relu else "N",
                "converged": [float(np.mean(s > 0)) for s in steps],
                "max_steps": [int(s.max()) for s in steps],
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the share that converged, and below 100 % nothing more; else the most steps."""
    header = ["initialisation", "d", "M", "inputs", *(f"s = {scale:g}" for scale in SCALES)]
    lines = [header]
    for row in rows:
        cells = [
            f"{steps} steps" if share == 1 else f"{share:.0%} converge"
            for share, steps in zip(row["converged"], row["max_steps"], strict=True)
        ]
        where = [str(row[name]) for name in ("initialisation", "features", "modalities", "inputs")]
        lines.append([*where, *cells])
    return markdown_table(lines, left=4, width=120)


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.benchmarks.initialisation")


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    start = time.monotonic()
    rows = measure(config)
    seconds = time.monotonic() - start
    settings = {"scales": SCALES, "batch": BATCH, "seeds": config.seeds, "seconds": seconds}
    write_json(config.run_dir / "results.json", {**settings, "rows": rows, "versions": versions()})
    write_text(config.run_dir / "table.md", table(rows))
    print(table(rows))
    print(f"Done in {seconds:.0f} s; written to {config.run_dir}.")


if __name__ == "__main__":
    main()
