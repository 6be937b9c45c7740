"""One run to read: `report.md`, and the table on the terminal.

Synthetic data is always called "sample (synthetic)".
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.common.files import versions
from experiments.common.text import defined, markdown_table, number, percent
from experiments.reporting.terminal import print_table
from experiments.training.metrics import Metrics
from experiments.training.results import Results

WARNING = "Warning: "

SELECTION = {
    "validation": "Scores are of the epoch with the best validation score.",
    "refit": "Scores are of the epoch with the best validation score, trained on those rows too.",
    "cross-validation": "Scores are of the epoch with the best score in cross-validation, trained "
    "on all rows but those of test.",
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
    confused: Sequence[str] = (),
    examples: Sequence[Sequence[str]] = (),
) -> str:
    """`report.md`: warnings, results, classes, solver, figures ({"figures/x.png": caption}), notes.

    `notes` that begin with "Warning: " stand with the warnings; `confused` says which classes are
    taken for which; `examples` are a table of test rows, its header first.
    """
    warnings, others = split_notes(results, history, notes)
    lines = [f"# {title(results)}", "", SELECTION[results["selection"]]]
    if results["data"] == "sample":
        lines.append("The data are synthetic: the scores show that the code runs, nothing more.")
    lines += ["", "```", command, "```", ""]
    if warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in warnings), ""]
    lines += ["## Results", ""]
    lines += [markdown_table(_scores(results)), ""]
    lines += [f"- {line}" for line in _summary(results)]
    if per_class := results["classes"]:
        ranked = [[n, number(s["f1"]), number(s["support"])] for n, s in _ranked(per_class)]
        if len(ranked) > 30:
            ranked = [*ranked[:12], ["…", "", ""], *ranked[-12:]]
        lines += ["", "## Classes", "", markdown_table([["class", "F1", "support"], *ranked])]
    if confused:
        lines += ["", f"Most often confused: {'; '.join(confused)}."]
    if examples:
        lines += ["", "## Examples", "", markdown_table(examples, left=3)]
    if figures:
        lines += ["", "## Figures"]
        lines += [line for path, text in figures.items() for line in ("", f"![{text}]({path})")]
    others += [] if warnings else ["Nothing went wrong that was looked for."]
    if others:
        lines += ["", "## Notes", "", *(f"- {note}" for note in others)]
    for heading, table in (("Configuration", config), ("Versions", versions())):
        cells = [["name", "value"], *flat(table)]
        lines += ["", f"## {heading}", "", markdown_table(cells, left=2)]
    return "\n".join(lines) + "\n"


def print_results(
    results: Results,
    run_dir: Path,
    history: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    *,
    console: Console | None = None,
) -> None:
    """The outcome of a run on the terminal, what went wrong first."""
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False)
    say(title(results), style="bold")
    for warning in split_notes(results, history, notes)[0]:
        say(f"Warning: {warning}", style="yellow")
    print_table(_scores(results), console)
    for line in [SELECTION[results["selection"]], *_summary(results)]:
        say(line)
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
    every, prefix = number(solver.get("mean_steps"), 1), "mean_steps, "
    parts = {n.removeprefix(prefix): x for n, x in solver.items() if n.startswith(prefix)}
    apart = ", ".join(f"{name} {number(steps, 1)}" for name, steps in parts.items())
    return (
        f"Solver: {percent(solver.get('converged'))} of the samples converged, "
        f"{every} steps on average{f' ({apart})' if apart else ''}, "
        f"largest relative residual {number(solver.get('residual'), 2, 'e')}."
    )


def _ranked(per_class: Mapping[str, Metrics]) -> list[tuple[str, Metrics]]:
    return sorted(per_class.items(), key=lambda item: -item[1]["f1"])


def split_notes(
    results: Results, history: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> tuple[list[str], list[str]]:
    """What went wrong, by the numbers themselves or a note "Warning: …", and the other notes."""
    warned = [note.removeprefix(WARNING) for note in notes if note.startswith(WARNING)]
    others = [_plain(note) for note in notes if not note.startswith(WARNING)]
    return [*_of_results(results), *_of_history(history), *warned], others


def _plain(note: str) -> str:
    """A note of the terminal on one line, without the word."""
    text = " ".join(note.split()).removeprefix("Note: ")
    return text[:1].upper() + text[1:]


def beaten_by(
    scores: Metrics, floors: Mapping[str, Metrics], metric: str, rows: int
) -> Iterator[str]:
    """A warning of every simpler model that is more than two standard errors above, by a metric.

    √(p (1 − p) / n) is that of a share p of n rows; of a metric that is none it gives the size.
    """
    for name, floor in floors.items():
        score, other = scores[metric], floor.get(metric)
        if not (defined(score) and defined(other)):
            continue
        error = math.sqrt(max(other * (1 - other), 1 / rows) / rows)
        if other > score + 2 * error:
            yield (
                f"{WARNING}{name} is far better: {metric} {number(other)} on the test rows, where "
                f"the fusion has {number(score)}. Use it, or see what the fusion does not see."
            )


def _of_results(results: Results) -> Iterator[str]:
    converged = (results["solver"] or {}).get("converged")
    if defined(converged) and converged < 1:
        yield f"{percent(1 - converged)} of the samples did not converge in evaluation."
    undefined = [name for name, value in (results["test"] or {}).items() if not defined(value)]
    if undefined:
        yield f"Not defined on this test set: {', '.join(undefined)}."


def _of_history(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    solves = (
        ("solver", "converged", "During training convergence was lowest"),
        ("train", "backward_converged", "Convergence of the backward solves was lowest"),
    )
    for part, name, text in solves:
        solved = [row for row in history if defined((row.get(part) or {}).get(name))]
        low = min(solved, key=lambda row: row[part][name], default=None)
        if low and low[part][name] < 1:
            yield f"{text} in epoch {low['epoch']}: {percent(low[part][name])}."
    if bad := sum((row.get("train") or {}).get("bad_steps", 0) for row in history):
        what = "had no finite gradient, or inputs out of all range, and changed nothing"
        yield f"{bad:.0f} steps {what}."
    trained = [row for row in history if row["epoch"] > 0]  # before the first step: no loss yet
    lost = [row["epoch"] for row in trained if not defined(row.get("loss"))]
    if lost:
        yield f"The loss was not finite in {len(lost)} epoch(s), the first {lost[0]}."
