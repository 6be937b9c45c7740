"""How far the ratios of `experiments.benchmark` differ from run to run.

    python -m experiments.benchmarks.spread runs/benchmark-1 runs/benchmark-2 runs/benchmark-3

Writes `spread.md` into the first of the run directories, and prints it.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from experiments.benchmarks.tables import LIBRARIES, Row, above_floor, called, next_library
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import read_json, write_text
from experiments.common.text import markdown_table, number


def torchdeq(rows: Sequence[Row]) -> float | None:
    """How much longer than the fastest of ours torchdeq's implicit differentiation takes."""
    return next((row["ratio"] for row in rows if row["contender"] == LIBRARIES[-1]), None)


RATIOS: dict[str, Callable[[Sequence[Row]], float | None]] = {
    "next library / ours": next_library,
    "torchdeq / ours": torchdeq,
    "ours / floor": above_floor,
}


def cases(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The contenders of every layer and training, by what was measured."""
    found: dict[str, list[Row]] = {}
    for row in results.get("layer", []):
        found.setdefault(f"{called(row['shape'])}, tolerance {row['tolerance']:g}", []).append(row)
    for row in results.get("training", []):
        found.setdefault(f"training, {row['name']}, dropout {row['dropout']:g}", []).append(row)
    return found


def spread(runs: Sequence[Mapping[str, Any]]) -> str:
    """The ratios, each with its value in every run, in Markdown.

    Raises:
      InputError: the runs did not measure the same, or nothing that has ratios.
    """
    first, *others = found = [cases(results) for results in runs]
    if not first or any(list(other) != list(first) for other in others):
        raise InputError("the runs share no shapes, tolerances and parts; give runs of one command")
    lines = [["measured", *RATIOS]]
    for name in first:
        each = [[number(ratio(run[name]), 2) for run in found] for ratio in RATIOS.values()]
        lines.append(
            [name, *(" ".join(values) if set(values) != {"–"} else "–" for values in each)]
        )
    about = f"Ratios in {len(runs)} runs; ours is the fastest of ours, cold or warm."
    return "\n".join(["# Spread", "", about, "", markdown_table(lines, width=120)]) + "\n"


def parse_args(args: Sequence[str]) -> list[Path]:
    """The run directories."""
    if not args or (options := [word for word in args if word.startswith("-")]):
        given = " ".join(options) if args else "no runs"
        raise InputError(f"{given}: give the folders that experiments.benchmark wrote")
    return [Path(word) for word in args]


def load(run_dir: Path) -> dict[str, Any]:
    """What `experiments.benchmark` wrote there."""
    try:
        return read_json(run_dir / "benchmark.json")
    except (OSError, ValueError) as error:
        raise InputError(f"{run_dir}: no benchmark.json there; give a run's folder") from error


@exit_cleanly()
def main() -> None:
    folders = parse_args(sys.argv[1:])
    text = spread([load(folder) for folder in folders])
    write_text(folders[0] / "spread.md", text)
    Console().print(Markdown(text))


if __name__ == "__main__":
    main()
