"""An equilibrium beside the same map applied a few times, and beside attention, in one table.

    python -m experiments.benchmarks.iteration vqa --seeds 5
        --options --images 400 --features 32 --epochs 30 --patience 30

Every variant is trained with every seed, which draws the same rows for all of them, so scores are
compared seed by seed. What follows --options goes to the experiment. Writes `iteration.json` and
`iteration.md` into --run-dir; runs that are there already are taken as they are.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.cli import ArgumentParser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import make_folder, write_json, write_text
from experiments.common.text import markdown_table, number, percent, spread
from experiments.run import EXPERIMENTS, experiment
from experiments.training.results import Results, mean_std
from experiments.training.run_directory import finished, read_history

ONCE = ("--fusion", "tokens_unrolled", "--jacobian-weight", "0")
POOLED = ("--fusion", "deq")
VARIANTS: Mapping[str, Sequence[str]] = {
    "equilibrium": ("--fusion", "tokens"),
    "equilibrium, shallow start": ("--fusion", "tokens", "--shallow-epochs", "8"),
    "equilibrium, no penalty": ("--fusion", "tokens", "--jacobian-weight", "0"),
    "its map once": ONCE,
    "its map 3 times": (*ONCE, "--unroll-steps", "3"),
    "its map 10 times": (*ONCE, "--unroll-steps", "10"),
    "cross-attention": ("--fusion", "cross_attention"),
    "concatenated vectors": ("--fusion", "concat"),
    "DEQ fusion of vectors": POOLED,
    "DEQ fusion of vectors, shallow start": (*POOLED, "--shallow-epochs", "8"),
    "DEQ fusion at every cell": (*POOLED, "--place", "middle"),
    "DEQ fusion at every cell alone": (*POOLED, "--place", "middle", "--alone"),
}


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks.iteration", description=__doc__.split("\n")[0]
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=5)
    default = Path("runs/iteration") / time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--run-dir", type=Path, default=default)
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args(args)
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: expected 1 or more")
    return options


def config_of(options: argparse.Namespace, variant: str) -> Any:
    """Raises InputError where the experiment has no such variant."""
    return experiment(options.experiment).parse_args([*options.options, *VARIANTS[variant]])


def run(options: argparse.Namespace, variant: str, config: Any, seed: int) -> dict[str, Any]:
    """{"variant", "results", "history"} of a run, or of the one that is there."""
    run_dir = options.run_dir / f"{variant}, seed {seed}".replace(", ", "-").replace(" ", "-")
    config = dataclasses.replace(config, seed=seed, run_dir=run_dir, resume=True)
    results = finished(options.experiment, config, run_dir) or experiment(options.experiment).run(
        config
    )
    jax.clear_caches()  # compiled programs of a hundred runs are more than a process may map
    return {"variant": variant, "results": results, "history": read_history(run_dir)}


# --- the table ---------------------------------------------------------------------------------


def table(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A row a variant; the first one is what the others are set beside."""
    variants = list(dict.fromkeys(one["variant"] for one in found))
    first = variants[0]
    lines = [["variant", "n", metric, f"less {first}", "converged", "steps", "size", "seconds"]]
    for variant in variants:
        runs = [one for one in found if one["variant"] == variant]
        results: list[Results] = [one["results"] for one in runs]
        steps = [(result["solver"] or {}).get("mean_steps") for result in results]
        sizes = [result["parameters"] for result in results]
        seconds = [result["seconds"] for result in results]
        lines.append(
            [
                variant,
                str(len(runs)),
                spread(mean_std([result["test"][metric] for result in results])),
                "–" if variant == first else paired(found, first, variant, metric),
                worst_converged([row for one in runs for row in one["history"]]),
                number(mean_std(steps)["mean"], 1),
                number(mean_std(sizes)["mean"], 0),
                number(mean_std(seconds)["mean"], 0),
            ]
        )
    return markdown_table(lines, width=200)


def paired(found: Sequence[Mapping[str, Any]], first: str, variant: str, metric: str) -> str:
    """Mean difference over the seeds that both have, ± its standard error, s / √n."""
    scores = {
        name: {
            one["results"]["seed"]: one["results"]["test"][metric]
            for one in found
            if one["variant"] == name
        }
        for name in (first, variant)
    }
    seeds = scores[first].keys() & scores[variant].keys()
    differences = [scores[variant][seed] - scores[first][seed] for seed in seeds]
    if len(differences) < 2:
        return "–"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{statistics.mean(differences):+.3f} ± {error:.3f}"


def worst_converged(history: Sequence[Mapping[str, Any]]) -> str:
    """Shares that converged, forward and backward in training and in validation, in the epoch and
    with the seed where they were smallest; – where nothing is solved."""
    trained = [row["train"] for row in history if "backward_converged" in row["train"]]
    if not trained:
        return "–"
    shares = [min(row[name] for row in trained) for name in ("converged", "backward_converged")]
    solved = [row["solver"]["converged"] for row in history if row["solver"]]
    return " / ".join(percent(share) for share in (*shares, min(solved)))


@exit_cleanly()
def main() -> None:
    options = parse_args(sys.argv[1:])
    make_folder(options.run_dir, "--run-dir")
    # Refused before the first run, not after hours of them.
    configs = {variant: config_of(options, variant) for variant in options.variants}
    seeds = range(options.seeds)
    found = [run(options, *variant, seed) for variant in configs.items() for seed in seeds]
    write_json(options.run_dir / "iteration.json", found)
    metric = next(iter(found[0]["results"]["test"]))
    text = (
        f"{options.experiment} {' '.join(options.options)}: test {metric}, mean ± standard "
        "deviation (ddof = 1) over n seeds, and the paired difference ± its standard error. "
        "Converged: the smallest share of any epoch and seed, forward and backward in training, "
        "and in validation. Steps: of the solver, on test rows. Size: parameters, encoders "
        f"included.\n\n{table(found, metric)}\n"
    )
    write_text(options.run_dir / "iteration.md", text)
    print(text)


if __name__ == "__main__":
    main()
