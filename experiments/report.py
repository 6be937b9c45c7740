"""Runs side by side: what differs in their options, their scores, classes, solvers and curves.

    python -m experiments.report RUN_DIR RUN_DIR …

Writes `report.md`, `report.html` (self-contained) and `figures/` into the folder that --out names
and prints the tables.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import read_json, write_text
from experiments.common.page import page
from experiments.reporting import figures
from experiments.reporting.comparison import Run, side_by_side
from experiments.reporting.terminal import show
from experiments.training.run_directory import read_history


@dataclass(frozen=True, kw_only=True)
class Config:
    """Several runs, side by side.

    Attributes:
      runs: directories of finished runs.
      out: where to write; by default a new folder under runs/report.
    """

    POSITIONAL: ClassVar = ("runs",)

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    out: Path | None = None


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.report")


def read_run(folder: Path) -> Run:
    """What a run directory holds.

    Raises:
      InputError: it is no run directory, not finished, or cannot be read.
    """
    try:
        about = read_json(folder / "config.json")
        results = read_json(folder / "results.json")
        history = read_history(folder)
        return Run(folder.name, about["config"], about["command"], results, history)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {Path(error.filename).name}; give directories of finished runs"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{folder} cannot be read as a run: {error!r}") from error


def report(config: Config) -> str:
    """Writes the folder and returns the text."""
    if not config.runs:
        raise InputError("no runs given; name one run directory or more")
    folders = [run.expanduser().resolve() for run in config.runs]
    if len(set(folders)) < len(folders):
        raise InputError("a run is given twice; give each directory once")
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):  # of two comparisons, say
        runs = [r._replace(name=str(p)) for r, p in zip(runs, config.runs, strict=True)]
    folder = config.out or Path("runs/report") / time.strftime("%Y%m%d-%H%M%S")
    drawn = {}
    if any(len(run.history) > 1 for run in runs):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        histories = {run.name: run.history for run in runs}
        figures.learning_curves(histories).save(folder / "figures/curves.png")
        drawn = {"figures/curves.png": "Loss, validation score and solver of every run, by epoch"}
    text = side_by_side(runs, drawn)
    write_text(folder / "report.md", text)
    write_text(folder / "report.html", page(text, folder))
    print(f"Folder: {folder}")
    return text


@exit_cleanly()
def main() -> None:
    text = report(parse_args(sys.argv[1:]))
    show(text)


if __name__ == "__main__":
    main()
