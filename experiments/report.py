"""What a run leaves behind to read: `results.json`, `report.md`, the table on the terminal, and the
comparison of several runs. Synthetic data is always called "sample (synthetic)".

Undefined numbers (None, NaN) are null in JSON and "–" in text.
"""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from experiments.evaluate import Metrics, Results, compare_floors, compare_rows, defined

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
PACKAGES = ("jax", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy", "scikit-learn")


# Files


def write_text(path: Path, text: str) -> None:
    """Write all of it or nothing: a reader, or a crash, never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """`value` as strict JSON, whole or not at all (see `plain` for what becomes of what)."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """JSON's own types: NaN and infinities → None, arrays → lists, paths → text,
    dataclasses → dicts with their `type`, functions and classes → their name."""
    return json.loads(json.dumps(value, default=_plainer), parse_constant=lambda _: None)


def _plainer(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **_fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else getattr(value, "__name__", str(value))


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON; nested dataclasses (a solver, say) keep their `type`."""
    return plain(_fields(config))


def versions() -> dict[str, str]:
    """Python, the packages that decide the numbers, and the devices."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    devices = jax.devices()
    return {**found, "device": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"}


# One run


def report_markdown(
    results: Results,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    per_class: Mapping[str, Metrics] | None = None,
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
    lines += [f"- {line}" for line in _summary(results, per_class)]
    if per_class:
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
        cells = [["name", "value"], *_flat(table)]
        lines += ["", f"## {heading}", "", markdown_table(cells, left=2)]
    return "\n".join(lines) + "\n"


def print_results(
    results: Results,
    run_dir: Path,
    per_class: Mapping[str, Metrics] | None = None,
    *,
    console: Console | None = None,
) -> None:
    """The outcome of a run on the terminal, within 80 columns."""
    console = console or Console()
    say = partial(console.print, markup=False, highlight=False)
    say(title(results), style="bold")
    for header, *rows in _blocks(_scores(results), width=78):
        table = Table(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in [SELECTION[results["selection"]], *_summary(results, per_class)]:
        say(line)
    for remark in _remarks(results, ()):
        say(remark, style="yellow")
    say(f"Run directory: {run_dir}", soft_wrap=True)  # stays one word to copy


def title(results: Results) -> str:
    return f"{results['experiment']}: {results['fusion']}, seed {results['seed']}, {_data(results)}"


def _data(results: Results) -> str:
    return "sample (synthetic)" if results["data"] == "sample" else f"{results['dataset']} data"


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    """[name, value] of every entry, nested ones as `solver.tol`."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
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


def _summary(results: Results, per_class: Mapping[str, Metrics] | None) -> list[str]:
    lines = []
    if per_class:
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
        f"relative residual {number(solver.get('residual'), 1, 'e')}."
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


# Several runs


def comparison_table(rows: Sequence[Results]) -> str:
    """`compare_rows` in Markdown: the test scores, then what they cost."""
    groups = compare_rows(rows)
    metrics = list(dict.fromkeys(name for group in groups for name in group["test"]))
    costs = [["fusion", "converged", "mean steps", "parameters", "seconds"]]
    costs += [
        [
            g["fusion"],
            percent(g["solver"].get("converged", {}).get("mean")),
            number(g["solver"].get("mean_steps", {}).get("mean"), 1),
            number(g["parameters"]["mean"], 0),
            number(g["seconds"]["mean"], 1),
        ]
        for g in groups
    ]
    lines = [f"# {rows[0]['experiment']}: fusions compared, {_data(rows[0])}", ""]
    lines += ["Test scores, mean ± standard deviation (ddof = 1) over n seeds.  "]
    lines += [SELECTION[rows[0]["selection"]], ""]
    lines += [_spreads([*groups, *compare_floors(rows)], "test", metrics), ""]
    for part, selection in (("last_epoch", "last"), ("best_on_test", "test")):
        if any(group[part] for group in groups):
            lines += [SELECTION[selection], "", _spreads(groups, part, metrics), ""]
    lines += ["Means over the seeds; – where a fusion has no solver.", "", markdown_table(costs)]
    if len({tuple(sorted(g["seeds"])) for g in groups}) > 1:
        lines += ["", "The fusions were not run with the same seeds: compare with care."]
    return "\n".join(lines) + "\n"


def _spreads(groups: Sequence[Mapping[str, Any]], part: str, metrics: Sequence[str]) -> str:
    rows = [[g["fusion"], str(g["n"]), *(spread(g[part].get(m)) for m in metrics)] for g in groups]
    return markdown_table([["fusion", "n", *metrics], *rows])


def spread(value: Mapping[str, float | None] | None) -> str:
    mean, std = (value or {}).get("mean"), (value or {}).get("std")
    return number(mean) if std is None else f"{number(mean)} ± {number(std)}"


# Text


def number(value: float | None, digits: int = 3, form: str = "f") -> str:
    if not defined(value):
        return "–"
    return f"{value:,}" if isinstance(value, Integral) else f"{value:,.{digits}{form}}"


def percent(fraction: float | None) -> str:
    """Rounded towards 50 %, so that 99.96 % never reads 100.0 %."""
    if not defined(fraction):
        return "–"
    tenths = round(1000 * fraction, 6)
    return f"{(math.floor(tenths) if fraction > 0.5 else math.ceil(tenths)) / 10:.1f} %"


def markdown_table(lines: list[list[str]], left: int = 1, width: int = 80) -> str:
    """Aligned columns, header first, the first `left` of them flush left; cut at `width`."""
    pieces = []
    for cells in _blocks([[cell.replace("|", r"\|") for cell in line] for line in lines], width):
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        align = ["<"] * left + [">"] * (len(widths) - left)
        form = "| " + " | ".join(f"{{:{a}{w}}}" for a, w in zip(align, widths, strict=True)) + " |"
        pieces.append("\n".join(form.format(*line) for line in (cells[0], rule, *cells[1:])))
    return "\n\n".join(pieces)


def _blocks(lines: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """A table cut by columns into pieces within `width`, each led by the first column."""
    first, *columns = zip(*lines, strict=True)
    block = [first]
    for column in columns:
        if len(block) > 1 and sum(max(map(len, c)) + 3 for c in (*block, column)) >= width:
            yield [list(line) for line in zip(*block, strict=True)]
            block = [first]
        block.append(column)
    yield [list(line) for line in zip(*block, strict=True)]
