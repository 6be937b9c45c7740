"""`experiments.features` without any option, over sets, fusions and seeds, in one table.

    python -m experiments.benchmarks.untuned digits wine nutrimouse/ data.npz rosmap=DIR
        --fusions deq concat sum lmf gmu attention --seeds 5
    python -m experiments.benchmarks.untuned digits wine --fusions deq concat --tuned

With --tuned every fusion is also trained with each of TUNED, with the first seed. The one with the
best validation score is set beside the runs without options: is it better on test by more than one
standard error? Writes `untuned.json`, `untuned.md` and `tuned.md` into --run-dir; runs that are
there already are taken as they are.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.benchmarks.views import files_of
from experiments.common.cli import ArgumentParser
from experiments.common.errors import exit_cleanly
from experiments.common.files import make_folder, write_json, write_text
from experiments.common.text import markdown_table, number, percent, spread
from experiments.run import experiment
from experiments.training.results import Results, mean_std
from experiments.training.run_directory import finished

MONITORS = ("macro_f1", "r2")  # what selects the epoch
METRICS = ("accuracy", "micro_f1", "r2")  # the first that a set has
TUNED: dict[str, dict[str, Any]] = {
    "rate 0.0003": {"learning_rate": 3e-4},
    "rate 0.003": {"learning_rate": 3e-3},
    "dropout 0.6": {"dropout": 0.6},
    "mixing 0": {"mixing": 0.0},
    "mixing 0.3": {"mixing": 0.3},
    "weight decay 1": {"weight_decay": 1.0},
    "Jacobian weight 1": {"jacobian_weight": 1.0},
}


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m experiments.benchmarks.untuned", description=__doc__.split("\n")[0]
    )
    parser.add_argument("sets", nargs="+", help="digits, wine, …, DIR of .csv files, FILE.npz")
    parser.add_argument("--fusions", nargs="+", default=["deq", "concat"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tuned", action="store_true", help="beside the best of some settings")
    default = Path("runs/untuned") / time.strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--run-dir", type=Path, default=default)
    return parser.parse_args(args)


def run(files: tuple[Path, ...], run_dir: Path, **options: Any) -> Results:
    """The results of a run, or of the one that is there and had the same options."""
    features = experiment("features")
    config = features.parse_args([*map(str, files)])
    config = dataclasses.replace(config, run_dir=run_dir, resume=True, **options)
    return finished("features", config, run_dir) or features.run(config)


def of_set(named: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of a set: {"rows": [Results], "tuned": {fusion: {setting: Results}}, …}."""
    files = files_of(named, options.run_dir)
    name = Path(named.partition("=")[0]).stem
    rows, tuned = [], {}
    for fusion in options.fusions:
        where = options.run_dir / name
        for seed in range(options.seeds):
            rows.append(run(files, where / f"{fusion}-seed{seed}", fusion=fusion, seed=seed))
        if options.tuned:
            tuned[fusion] = {
                setting: run(files, where / f"{fusion}, {setting}", fusion=fusion, **changed)
                for setting, changed in TUNED.items()
                if fusion == "deq" or "jacobian_weight" not in changed
            }
        jax.clear_caches()  # compiled programs of a hundred runs are more than a process may map
    return {"set": name, "rows": rows, "tuned": tuned}


# --- tables ------------------------------------------------------------------------------------


def metric_of(row: Results) -> str:
    return next(name for name in METRICS if name in row["test"])


def tested_rows(row: Results) -> int:
    return sum(int(of_class["support"]) for of_class in (row["classes"] or {}).values())


def standard_error(scores: Sequence[float], rows: int) -> float:
    """Of an accuracy on so many rows, √(p (1 − p) / n) with p = (k + 1) / (n + 2) (Laplace); where
    rows are not counted, as of R², the standard deviation over the seeds."""
    if not rows:
        return statistics.stdev(scores) if len(scores) > 1 else math.nan
    p = (statistics.mean(scores) * rows + 1) / (rows + 2)
    return math.sqrt(p * (1 - p) / rows)


def scores_table(sets: Sequence[dict[str, Any]], fusions: Sequence[str]) -> str:
    lines = [["set", "score", "test rows", *fusions, "linear", "converged", "seconds, deq"]]
    for found in sets:
        rows: list[Results] = found["rows"]
        metric = metric_of(rows[0])
        cells = [found["set"], metric, number(tested_rows(rows[0]) or None)]
        for fusion in fusions:
            scores = [row["test"][metric] for row in rows if row["fusion"] == fusion]
            cells.append(spread(mean_std(scores)))
        linear = [s[metric] for row in rows for n, s in row["floors"].items() if "regression" in n]
        solved = [row for row in rows if row["solver"]]
        share = [row["solver"]["converged"] for row in solved if row["solver"]]
        seconds = [row["seconds"] for row in rows if row["fusion"] == "deq"]
        cells.append(spread(mean_std(linear)))
        cells.append(percent(min(share, default=None)))  # type: ignore[type-var]
        lines.append([*cells, number(statistics.mean(seconds) if seconds else None, 0)])
    return markdown_table(lines, width=200)


def tuned_table(sets: Sequence[dict[str, Any]], fusions: Sequence[str]) -> str:
    lines = [["set", "fusion", "no option", "tuned", "setting", "standard error", "within it"]]
    for found in sets:
        for fusion in fusions:
            plain = [row for row in found["rows"] if row["fusion"] == fusion]
            metric, choices = metric_of(plain[0]), {"none": plain[0]} | found["tuned"][fusion]
            best = max(choices, key=lambda name: _validated(choices[name]))
            scores = [row["test"][metric] for row in plain]
            score, tuned = statistics.mean(scores), choices[best]["test"][metric]
            error = standard_error(scores, tested_rows(plain[0]))
            within = "yes" if score >= tuned - error else "no"
            cells = [number(score), number(tuned), best, number(error), within]
            lines.append([found["set"], fusion, *cells])
    return markdown_table(lines, left=2, width=200)


def _validated(row: Results) -> float:
    """What the settings are chosen by."""
    scores = (row["validation"].get(name) for name in MONITORS)
    return next((score for score in scores if score is not None), -math.inf)


@exit_cleanly()
def main() -> None:
    options = parse_args(sys.argv[1:])
    make_folder(options.run_dir, "--run-dir")
    sets = [of_set(named, options) for named in options.sets]
    write_json(options.run_dir / "untuned.json", sets)
    text = "Test scores without any option, mean ± standard deviation (ddof = 1) over seeds.\n\n"
    tables = {"untuned.md": text + scores_table(sets, options.fusions) + "\n"}
    if options.tuned:
        text = "Test scores without any option, mean over seeds, and with the setting that has the "
        text += "best validation score, one seed.\n\n"
        tables["tuned.md"] = text + tuned_table(sets, options.fusions) + "\n"
    for name, table in tables.items():
        write_text(options.run_dir / name, table)
        print(table)


if __name__ == "__main__":
    main()
