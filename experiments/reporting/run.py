"""One run to read: `report.md`, and the table on the terminal.

Synthetic data is always called "sample (synthetic)".
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common.files import versions
from experiments.common.text import blocks, defined, markdown_table, number, percent
from experiments.training.metrics import Metrics, Results

SELECTION = {
    "validation": "Scores are of the epoch with the best validation score.",
    "refit": "Scores are of the epoch with the best validation score, trained on those rows too.",
    "test": "Scores are of the epoch with the best TEST score: optimistic, not a result.",
    "last": "Scores are of the last epoch.",
}
OTHER_SELECTIONS = {
    "last_epoch": "test, last epoch",
    "best_on_test": "best epoch ON TEST",
}


def report_markdown(
    results: Results,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    *,
    command: str,
    figures: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """`report.md`: results, classes, solver, figures ({"figures/x.png": caption}), notes."""
    lines = [f"# {title(results)}", "", SELECTION[results["selection"]]]
    if results["data"] == "sample":
        lines.append("The data are synthetic: the scores show that the code runs, nothing more.")
    lines += ["", "```", command, "```", "", "## Results", ""]
    lines += [markdown_table(_scores(results)), ""]
    lines += [f"- {line}" for line in _summary(results)]
    if per_class := results["classes"]:
        ranked = [[n, number(s["f1"]), number(s["support"])] for n, s in _ranked(per_class)]
        if len(ranked) > 30:
            ranked = [*ranked[:12], ["…", "", ""], *ranked[-12:]]
        lines += ["", "## Classes", "", markdown_table([["class", "F1", "support"], *ranked])]
    if figures:
        lines += ["", "## Figures"]
        lines += [line for path, text in figures.items() for line in ("", f"![{text}]({path})")]
    remarks = [*notes, *_remarks(results, history)] or ["Nothing went wrong that was looked for."]
    lines += ["", "## Notes", "", *(f"- {remark}" for remark in remarks)]
    for heading, table in (("Configuration", config), ("Versions", versions())):
        cells = [["name", "value"], *flat(table)]
        lines += ["", f"## {heading}", "", markdown_table(cells, left=2)]
    return "\n".join(lines) + "\n"


def print_results(
    results: Results,
    run_dir: Path,
    *,
    console: Console | None = None,
) -> None:
    """The outcome of a run on the terminal, within 80 columns."""
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False)
    say(title(results), style="bold")
    for header, *rows in blocks(_scores(results), width=78):
        table = Table(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in [SELECTION[results["selection"]], *_summary(results)]:
        say(line)
    for remark in _remarks(results, ()):
        say(remark, style="yellow")
    say(f"Run directory: {run_dir}", soft_wrap=True)  # stays one word to copy


def title(results: Results) -> str:
    return f"{results['experiment']}: {results['fusion']}, seed {results['seed']}, {about(results)}"


def about(results: Results) -> str:
    if results["data"] == "sample":
        return "sample (synthetic)"
    name = results["dataset"]
    return name if name.endswith("data") else f"{name} data"


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """[name, value] of every entry, nested ones as `solver.tol`."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield [f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)]


def _scores(results: Results) -> list[list[str]]:
    named = {"validation": results["validation"], "test": results["test"]}
    selections: Mapping[str, Any] = results
    named |= {name: selections.get(key) or {} for key, name in OTHER_SELECTIONS.items()}
    named |= selections.get("floors") or {}
    metrics = list(results["test"] or results["validation"])
    rows = [[name, *(number(s.get(m)) for m in metrics)] for name, s in named.items() if s]
    return [["scores", *metrics], *rows]


def _summary(results: Results) -> list[str]:
    lines = []
    if per_class := results["classes"]:
        seen = [(name, s) for name, s in _ranked(per_class) if s["support"]]
        text = [f"{name} {number(s['f1'])} (n={s['support']})" for name, s in seen]
        shown = min(3, max(1, len(text) // 2))
        lines.append(f"Best classes by F1: {', '.join(text[:shown])}.")
        lines.append(f"Worst classes by F1: {', '.join(text[::-1][:shown])}.")
    size, seconds = number(results["parameters"]), number(results["seconds"], 1)
    return [*lines, _solver(results["solver"]), f"Size: {size} parameters. Time: {seconds} s."]


def _solver(solver: Metrics | None) -> str:
    if not solver:
        return "Solver: none in this fusion."
    return (
        f"Solver: {percent(solver.get('converged'))} of the samples converged, "
        f"{number(solver.get('mean_steps'), 1)} steps on average, "
        f"largest relative residual {number(solver.get('residual'), 2, 'e')}."
    )


def _ranked(per_class: Mapping[str, Metrics]) -> list[tuple[str, Metrics]]:
    return sorted(per_class.items(), key=lambda item: -item[1]["f1"])


def _remarks(results: Results, history: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers themselves say went wrong."""
    remarks = []
    converged = (results["solver"] or {}).get("converged")
    if defined(converged) and converged < 1:
        remarks.append(f"{percent(1 - converged)} of the samples did not converge in evaluation.")
    solved = [r for r in history if defined((r.get("solver") or {}).get("converged"))]
    low = min(solved, key=lambda row: row["solver"]["converged"], default=None)
    if low and low["solver"]["converged"] < 1:
        share = percent(low["solver"]["converged"])
        remarks.append(f"During training convergence was lowest in epoch {low['epoch']}: {share}.")
    trained = [row for row in history if row["epoch"] > 0]  # before the first step: no loss yet
    bad = [row["epoch"] for row in trained if not defined(row.get("loss"))]
    if bad:
        remarks.append(f"The loss was not finite in {len(bad)} epoch(s), the first {bad[0]}.")
    undefined = [name for name, value in (results["test"] or {}).items() if not defined(value)]
    if undefined:
        remarks.append(f"Not defined on this test set: {', '.join(undefined)}.")
    return remarks
