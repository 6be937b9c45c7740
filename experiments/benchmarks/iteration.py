"""An equilibrium beside the same map applied a few times, and beside attention, in one table.

    python -m experiments.benchmarks.iteration vqa --seeds 5
        --easy-vqa --images 400 --features 32 --epochs 30 --patience 30
    python -m experiments.benchmarks.iteration relations --variants equilibrium "its map once"
        --deepest 1 --epochs 2 --then --deepest 2 --epochs 3 --then --deepest 3 --epochs 5

Every variant is trained with every seed, which draws the same rows for all of them, so scores are
compared seed by seed. Options that are not the command's own go to the experiment. What follows
--then is a stage: the variant is trained once more, from the weights of the stage before, with the
first stage's options and these; the table has the last one. With --begin, those that share its map
go through the stages before the last as one variant, in place of their own. Writes
`iteration.json` and `iteration.md` into --run-dir; runs that are there already are taken as they
are.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.common.cli import Parser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import write_json, write_text
from experiments.common.lock import folder_alone
from experiments.common.text import markdown_table, number, percent, spread
from experiments.run import EXPERIMENTS, experiment
from experiments.training.config import SOLVED
from experiments.training.metrics import Metrics
from experiments.training.results import Results, mean_std
from experiments.training.run_directory import finished, read_history

ONCE = ("--fusion", "tokens_unrolled", "--jacobian-weight", "0")
SHALLOW = ("--shallow-epochs", "8")
DEEP_FIRST = ("--shallow-epochs", "1", "--shallow-steps", "10")
POOLED = ("--fusion", "deq")
VARIANTS: Mapping[str, Sequence[str]] = {
    "equilibrium": ("--fusion", "tokens"),
    "equilibrium, shallow start": ("--fusion", "tokens", *SHALLOW),
    "equilibrium, 10 times first": ("--fusion", "tokens", *DEEP_FIRST),
    "equilibrium, no penalty": ("--fusion", "tokens", "--jacobian-weight", "0"),
    "its map once": ONCE,
    "its map 3 times": (*ONCE, "--unroll-steps", "3"),
    "its map 10 times": (*ONCE, "--unroll-steps", "10"),
    "cross-attention": ("--fusion", "cross_attention"),
    "concatenated vectors": ("--fusion", "concat"),
    "DEQ fusion of vectors": POOLED,
    "DEQ fusion of vectors, shallow start": (*POOLED, *SHALLOW),
    "DEQ fusion of vectors, clip 0": (*POOLED, "--clip", "0"),
    "DEQ fusion of vectors, clip 1": (*POOLED, "--clip", "1"),
    "DEQ fusion of vectors, clip 1, shallow start": (*POOLED, "--clip", "1", *SHALLOW),
    "DEQ fusion of vectors, clip 1, warm-up": (*POOLED, "--clip", "1", "--warmup", "100"),
    "DEQ fusion at every cell": (*POOLED, "--place", "middle"),
    "DEQ fusion at every cell alone": (*POOLED, "--place", "middle", "--alone"),
}


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command's own options, and `stages`, the experiment's options in each of them."""
    split: list[list[str]] = [[]]
    for word in args:
        split.append([]) if word == "--then" else split[-1].append(word)
    first, *others = split
    parser = Parser("benchmarks.iteration", __doc__.split("\n")[0], EXPERIMENTS)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    begins = [name for name in VARIANTS if _shares_map(name)]
    parser.add_argument("--begin", choices=begins, help="of the stages before the last")
    options, rest = parser.own_and_rest(first)
    options.stages = [rest, *([*rest, *stage] for stage in others)]
    return options


def _shares_map(variant: str) -> bool:
    return VARIANTS[variant][1].startswith("tokens")


def _stage_variant(options: argparse.Namespace, variant: str) -> str:
    """As what a variant goes through the stages before the last."""
    return options.begin if options.begin and _shares_map(variant) else variant


def stages_of(options: argparse.Namespace, variant: str) -> list[Any]:
    """A configuration a stage. Raises InputError where the experiment has no such variant."""
    parse, last = experiment(options.experiment).parse_args, len(options.stages) - 1
    begin = _stage_variant(options, variant)
    stages = [
        parse([*stage, *VARIANTS[variant if number_of == last else begin]])
        for number_of, stage in enumerate(options.stages)
    ]
    if len(stages) > 1 and not hasattr(stages[0], "start"):
        raise InputError(f"--then needs --start, which {options.experiment} does not have")
    return stages


def run(
    options: argparse.Namespace, variant: str, stages: Sequence[Any], seed: int
) -> dict[str, Any]:
    """{"variant", "results", "history"} of the last stage; stages that are there are taken."""
    results, run_dir = None, options.run_dir
    for number_of, config in enumerate(stages, 1):
        last = number_of == len(stages)
        name = variant if last else _stage_variant(options, variant)
        stage = f", stage {number_of}" if len(stages) > 1 else ""
        start = {"start": run_dir} if number_of > 1 else {}
        folder = f"{name}, seed {seed}{stage}".replace(", ", "-").replace(" ", "-")
        run_dir = options.run_dir / folder
        config = dataclasses.replace(config, seed=seed, run_dir=run_dir, resume=True, **start)
        results = finished(options.experiment, config, run_dir)
        results = results or experiment(options.experiment).run(config)
        jax.clear_caches()  # programs of a hundred runs are more than a process may map
    return {"variant": variant, "results": results, "history": read_history(run_dir)}


# --- the table ---------------------------------------------------------------------------------


def table(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A row a variant; the first one is what the others are set beside."""
    variants = _by_variant(found)
    first = next(iter(variants))
    columns = ("converged", "steps", "size", "seconds")
    lines = [["variant", "n", "validation", "test", f"less {first}", *columns]]
    for variant, runs in variants.items():
        results: list[Results] = [one["results"] for one in runs]
        steps = [(result["solver"] or {}).get("mean_steps") for result in results]
        sizes = [result["parameters"] for result in results]
        seconds = [result["seconds"] for result in results]
        lines.append(
            [
                variant,
                str(len(runs)),
                spread(mean_std([result["validation"][metric] for result in results])),
                spread(mean_std([result["test"][metric] for result in results])),
                "–" if variant == first else paired(found, first, variant, metric),
                worst_converged([row for one in runs for row in one["history"]]),
                number(mean_std(steps)["mean"], 1),
                number(mean_std(sizes)["mean"], 0),
                number(mean_std(seconds)["mean"], 0),
            ]
        )
    return markdown_table(lines, width=200)


def _by_variant(found: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    variants = dict.fromkeys(one["variant"] for one in found)
    return {name: [one for one in found if one["variant"] == name] for name in variants}


def parts_table(
    found: Sequence[Mapping[str, Any]], values: Callable[[Results], Metrics]
) -> str | None:
    """A row a variant, a column a value that a run has; None where there are fewer than two."""
    rows = {
        variant: [values(one["results"]) for one in runs]
        for variant, runs in _by_variant(found).items()
    }
    rows = {variant: runs for variant, runs in rows.items() if runs[0]}
    names = list(next(iter(rows.values()), [{}])[0])
    if len(names) < 2:
        return None
    lines = [
        [variant, *(spread(mean_std([run[name] for run in runs])) for name in names)]
        for variant, runs in rows.items()
    ]
    return markdown_table([["variant", *names], *lines], width=200)


def steps_by_part(results: Results) -> Metrics:
    """Mean solver steps of every part of the test rows; {} where nothing is solved."""
    solver = results["solver"] if results["fusion"] in SOLVED else None
    start = "mean_steps, "
    return {n.removeprefix(start): v for n, v in (solver or {}).items() if n.startswith(start)}


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
    with the seed where they were smallest; – where nothing is solved. Weights that no step with a
    solve has changed do not count."""
    solved = [row for row in history if "backward_converged" in row["train"]]
    if not solved:
        return "–"
    names = ("converged", "backward_converged")
    shares = [min(row["train"][name] for row in solved) for name in names]
    validated = min(row["solver"]["converged"] for row in solved)
    return " / ".join(percent(share) for share in (*shares, validated))


def page(options: argparse.Namespace, found: Sequence[Mapping[str, Any]]) -> str:
    """What iteration.md says."""
    metric = next(iter(found[0]["results"]["test"]))
    stages = (" ".join([options.experiment, *map(_named, stage)]) for stage in options.stages)
    begin = f", begun as {options.begin!r}" if options.begin else ""
    pieces = [
        f"{found[0]['results']['dataset']}; {'; then '.join(stages)}{begin}: {metric}, mean ± "
        "standard deviation (ddof = 1) over n seeds, and the paired difference on test ± its "
        "standard error. "
        "Converged: the smallest share of any epoch and seed, forward and backward in training, "
        "and in validation. Steps: of the solver, on test rows. Size: parameters, encoders "
        "included.",
        table(found, metric),
    ]
    scores = parts_table(found, lambda results: results["test"])
    steps = parts_table(found, steps_by_part)
    pieces += ["All scores on test:", scores] if scores else []
    pieces += ["Steps of the solver:", steps] if steps else []
    return "\n\n".join(pieces) + "\n"


def _named(word: str) -> str:
    """An option, or of a path its name: a page does not tell where things lie on a machine."""
    return Path(word).name if Path(word).is_absolute() else word


@exit_cleanly()
def main() -> None:
    options = parse_args(sys.argv[1:])
    # Refused before the first run, not after hours of them.
    stages = {variant: stages_of(options, variant) for variant in options.variants}
    new = Path("runs/iteration") / time.strftime("%Y%m%d-%H%M%S")
    with folder_alone(options.run_dir, new) as options.run_dir:
        seeds = range(options.seeds)
        found = [run(options, *variant, seed) for variant in stages.items() for seed in seeds]
        write_json(options.run_dir / "iteration.json", found)
        text = page(options, found)
        write_text(options.run_dir / "iteration.md", text)
        print(text)


if __name__ == "__main__":
    main()
