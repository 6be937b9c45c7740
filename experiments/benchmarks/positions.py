"""What a training step of a fusion of positions costs, against positions and steps.

    python -m experiments.benchmarks.positions
    python -m experiments.benchmarks.positions --positions 16 64 --features 64 --batch 64

Two modalities of so many positions each, standard normal, all of them there, which the program is
told at run time, as by a data set. The step is the value and the gradient, in parameters and
inputs, of the mean square of the fused vectors. The equilibrium is solved to tolerances that take
it so many evaluations; its map is applied 1, 3 and 10 times; attention is the transformer with as
many parameters. Contenders take turns, at the same number of positions. Memory is what the compiled
program needs beside its arguments and results. Writes `positions.json` and `positions.md` into
--run-dir, after every number of positions.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from deq_fusion_jax import Anderson, TokenFusion
from deq_fusion_jax.token_baselines import CrossAttention, TokensUnrolled
from experiments.benchmarks.timing import Contender, interleaved
from experiments.common.cli import ArgumentParser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import processor, versions, write_json, write_text
from experiments.common.lock import folder_alone
from experiments.common.text import markdown_table, number

ONCE = "map once"

Arrays = dict[str, jax.Array]


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks.positions", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--positions", type=int, nargs="+", default=[4, 16, 64, 196])
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--run-dir", type=Path)
    options = parser.parse_args(args)
    for name in ("features", "batch", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: expected 1 or more")
    if min(options.positions) < 1:
        raise InputError(f"--positions {min(options.positions)}: expected 1 or more")
    if options.features % 4:
        raise InputError(f"--features {options.features}: expected a multiple of the 4 heads")
    return options


def fusions(features: int) -> Iterator[tuple[str, nn.Module]]:
    for tol in (1e-2, 1e-3, 1e-5):
        solver = Anderson(tol=tol, max_steps=60)
        yield f"equilibrium to {tol:.0e}", TokenFusion(features, solver=solver)
    yield ONCE, TokensUnrolled(features, steps=1, tol=None)
    for steps in (3, 10):
        yield f"map {steps} times", TokensUnrolled(features, steps=steps, tol=None)
    yield "attention", CrossAttention(features)


def contender(name: str, fusion: nn.Module, inputs: Arrays, lengths: Arrays) -> Contender:
    """A training step of one fusion, compiled."""
    variables = fusion.init(jax.random.key(0), inputs, lengths=lengths)

    def loss(variables: Any, inputs: Arrays, lengths: Arrays) -> tuple[jax.Array, jax.Array | int]:
        out: Any = fusion.apply(variables, inputs, train=True, lengths=lengths)
        steps = jnp.mean(out.stats.steps) if out.stats else 0
        return jnp.mean(out.fused**2), steps

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = step.lower(variables, inputs, lengths).compile()
    memory: Any = compiled.memory_analysis()

    def run() -> Any:
        return jax.block_until_ready(compiled(variables, inputs, lengths))

    (_, steps), _ = run()
    return Contender(name, run, forward=round(float(steps)), temporaries=memory.temp_size_in_bytes)


def measure(options: argparse.Namespace, positions: int) -> list[dict[str, Any]]:
    """A row a fusion."""
    rng = np.random.default_rng(0)
    shape = options.batch, positions, options.features
    inputs = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in "ab"}
    lengths = {name: jnp.full(options.batch, positions) for name in inputs}
    sizes = inputs, lengths
    contenders = [contender(name, fusion, *sizes) for name, fusion in fusions(options.features)]
    seconds = interleaved(contenders, options.rounds)
    jax.clear_caches()
    return [
        {
            "positions": positions,
            "fusion": one.name,
            "evaluations": one.forward,
            "seconds": seconds[one.name],
            "ratio": median(a / b for a, b in zip(seconds[one.name], seconds[ONCE], strict=True)),
            "temporaries": one.temporaries,
        }
        for one in contenders
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [["positions", "fusion", "evaluations", "ms", "by the map once", "memory, MB"]]
    for row in rows:
        lines.append(
            [
                str(row["positions"]),
                row["fusion"],
                str(row["evaluations"] or "–"),
                number(1e3 * median(row["seconds"]), 1),
                number(row["ratio"], 2),
                number(row["temporaries"] / 1e6, 1),
            ]
        )
    return markdown_table(lines, left=2)


def page(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """What positions.md says."""
    device = jax.devices()[0]
    return (
        f"A training step on {options.batch} samples, two modalities of so many positions, "
        f"d = {options.features}, at the first weights; medians over {options.rounds} rounds in "
        f"turns. On 1 × {device.device_kind} ({device.platform}).\n\n{table(rows)}\n"
    )


@exit_cleanly()
def main() -> None:
    options = parse_args(sys.argv[1:])
    new = Path("runs/positions") / time.strftime("%Y%m%d-%H%M%S")
    with folder_alone(options.run_dir, new) as folder:
        rows: list[dict[str, Any]] = []
        about = {"processor": processor(), "versions": versions()}
        for positions in track(options.positions, "positions"):
            rows += measure(options, positions)
            write_json(folder / "positions.json", {"rows": rows, **about})
            write_text(folder / "positions.md", page(options, rows))
        print(page(options, rows))


if __name__ == "__main__":
    main()
