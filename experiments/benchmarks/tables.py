"""The tables of `experiments.benchmark`, and the exponents of its part `scaling`."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from experiments.common.text import markdown_table, number

Row = Mapping[str, Any]

MEGABYTE = 1e6


def tables(results: Mapping[str, Any], details: bool = True) -> str:
    """All parts that were measured, in Markdown; without `details` one layer table a tolerance."""
    lines = ["# Forward and backward of the fusion layer", ""]
    about = [["name", "value"], *([name, value] for name, value in results["machine"].items())]
    lines += [markdown_table(about, left=2)]
    if results["missing"]:
        names = ", ".join(results["missing"])
        lines += ["", f"Left out, not installed: {names}. `pip install '.[bench]'` has them."]
    lines += layer_tables(results.get("layer", []), details)
    lines += training_tables(results.get("training", []))
    lines += profile_tables(results.get("profile", []))
    lines += depth_tables(results.get("depth", []))
    lines += scaling_tables(results.get("scaling", []), results["fits"])
    return "\n".join(lines) + "\n"


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """The values that a column has, in order."""
    return list(dict.fromkeys(row[name] for row in rows))


def called(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape[:2])) + f", M = {shape[2]}"


# --- layer -----------------------------------------------------------------------------------


def layer_tables(rows: Sequence[Row], details: bool = True) -> list[str]:
    """For each tolerance all shapes beside one another, then each with all that was measured."""
    if not rows:
        return []
    lines = ["", "## One layer", ""]
    lines += ["Batch × channels, M modalities; median milliseconds of the rounds, and evaluations"]
    lines += ["of f / of its vector–Jacobian product by the slowest sample, of the staged ones the"]
    lines += ["larger of the two parts'."]
    lines += ["", r"\* The tolerance was missed over the batch."]
    for tol in distinct(rows, "tolerance"):
        chosen = [row for row in rows if row["tolerance"] == tol]
        lines += ["", f"### Tolerance {tol:g}", "", markdown_table(_overview(chosen), width=120)]
        for shape in distinct(chosen, "shape") if details else ():
            cell = [row for row in chosen if row["shape"] == shape]
            lines += ["", f"{called(shape)}, tolerance {tol:g}:", ""]
            lines += [markdown_table(_details(cell), width=120), ""]
            lines += [_settings(cell)]
    if not details:
        return lines
    lines += [
        "",
        "ratio: to the fastest of ours. sample, batch: ‖f(z) − z‖ / ‖f(z)‖, the largest of",
    ]
    lines += ["a sample and over the batch. gradient: relative error against float64."]
    return [*lines, "MB: temporaries. s: compilation."]


def _overview(rows: Sequence[Row]) -> list[list[str]]:
    shapes = distinct(rows, "shape")
    lines = [["contender", *map(called, shapes)]]
    for name in distinct(rows, "contender"):
        cells = {row["shape"]: row for row in rows if row["contender"] == name}
        texts = [_time(cells[s]) + _mark(cells[s]) if s in cells else "–" for s in shapes]
        lines.append([name, *texts])
    columns = [[row for row in rows if row["shape"] == shape] for shape in shapes]
    for name, ratio in (NEXT, next_library), (FLOOR, above_floor):
        lines.append([name, *(number(ratio(column), 2) for column in columns)])
    return lines


NEXT, FLOOR = "next library / fastest of ours", "fastest of ours / floor"
LIBRARIES = ("jaxopt", "optimistix", "torchdeq, implicit")


def next_library(rows: Sequence[Row]) -> float | None:
    """How much longer the fastest other library takes that reaches the tolerance."""
    there = [r["ratio"] for r in rows if r["contender"].startswith(LIBRARIES) and r.get("reached")]
    return min(there, default=None)


def above_floor(rows: Sequence[Row]) -> float | None:
    """How much longer than the floor the fastest of ours takes."""
    return next((1 / row["ratio"] for row in rows if row["contender"] == "floor"), None)


def _time(row: Row) -> str:
    counts = _evaluations(row)
    return number(1e3 * row["median"], 1) + (f" ({counts})" if counts else "")


def _mark(row: Row) -> str:
    return " *" if row.get("reached") is False else ""


def _evaluations(row: Row) -> str:
    return "/".join(number(row[name]) for name in ("forward", "backward") if row[name])


def _details(rows: Sequence[Row]) -> list[list[str]]:
    header = ["contender", "ms", "ratio", "f / vjp", "sample", "batch", "gradient", "MB", "s"]
    return [header, *(_detail(row) for row in rows)]


def _detail(row: Row) -> list[str]:
    errors = [row.get(name) for name in ("sample_residual", "residual", "gradient_error")]
    return [
        row["contender"] + _mark(row),
        number(1e3 * row["median"], 1),
        number(row["ratio"], 2),
        _evaluations(row) or "–",
        *(number(error, 1, "e") for error in errors),
        megabytes(row),
        number(row["compile_seconds"], 1),
    ]


def megabytes(row: Row) -> str:
    size = row["temporaries"]
    return "–" if size is None else number(size / MEGABYTE, 1)


def _settings(rows: Sequence[Row]) -> str:
    chosen = [f"{row['contender']}: {row['settings']}" for row in rows if row["settings"]]
    return f"Settings: {'; '.join(chosen)}." if chosen else ""


# --- training --------------------------------------------------------------------------------


def training_tables(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", "## Training", "", "Synthetic rows in the shapes of the data named. A step of"]
    lines += ["training, tolerance 1e-3; f / vjp: mean evaluations, loss: mean, of the last epoch."]
    for name, dropout in product(distinct(rows, "name"), distinct(rows, "dropout")):
        own = [row for row in rows if (row["name"], row["dropout"]) == (name, dropout)]
        first = own[0]
        title = f"{name}, {first['rows']} rows, {called(first['shape'])}, dropout {dropout:g}:"
        lines += ["", title, "", markdown_table([TRAINING, *map(_lesson, own)], width=120)]
        lines += ["", _settings(own)]
    return lines


TRAINING = ["contender", "ms", "ratio", "f / vjp", "converged", "loss"]


def _lesson(row: Row) -> list[str]:
    last = row["last"]
    counts = [last.get(name) for name in ("mean_steps", "backward_steps")]
    shares = [last[name] for name in ("converged", "backward_converged") if name in last]
    return [
        row["contender"],
        number(1e3 * row["median"], 1),
        number(row["ratio"], 2),
        "/".join(number(count, 1) for count in counts if count is not None) or "–",
        f"{min(shares):.1%}" if shares else "–",
        number(last["loss"], 4),
    ]


# --- profile ---------------------------------------------------------------------------------


def profile_tables(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    programs, shapes = distinct(rows, "program"), distinct(rows, "shape")
    times = {(row["shape"], row["program"]): row["median"] for row in rows}
    lines = [["", *map(called, shapes)]]
    for program in programs:
        texts = []
        for shape in shapes:
            time = times[shape, program]
            share = time / times[shape, "accelerated step"]
            texts.append(f"{number(1e3 * time, 2)} ({share:.0%})")
        lines.append([program, *texts])
    head = ["", "## A step", "", "Milliseconds of one step of the joint schedule, and their share"]
    head += ["of an accelerated one. Each of the first four contains the one before: products are"]
    head += ["the 2M + 2 of ours alone, a plain step adds the residual to f, an accelerated one"]
    return [*head, "the mixing. Backward is a vector–Jacobian product.", "", markdown_table(lines)]


# --- depth -----------------------------------------------------------------------------------


def depth_tables(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    names = distinct(rows, "contender")
    header = ["steps", *(f"{name}, {unit}" for unit, name in product(("MB", "ms"), names))]
    lines = [header]
    for steps in distinct(rows, "steps"):
        cells = [row for row in rows if row["steps"] == steps]
        lines.append([str(steps), *map(megabytes, cells), *map(_time, cells)])
    title = f"{called(rows[0]['shape'])}: temporaries, median time and evaluations by steps."
    return ["", "## Depth", "", title, "", markdown_table(lines, width=120)]


# --- scaling ---------------------------------------------------------------------------------


def scaling_tables(rows: Sequence[Row], fitted: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", "## Scaling", "", "Median milliseconds (evaluations of f), temporaries in MB."]
    lines += ["", r"\* The tolerance was missed over the batch."]
    for axis in distinct(rows, "axis"):
        chosen = [row for row in rows if row["axis"] == axis]
        names = distinct(chosen, "contender")
        table = [[axis, *(f"{name}, {unit}" for name, unit in product(names, ("ms", "MB")))]]
        for value in distinct(chosen, "value"):
            cells = [row for row in chosen if row["value"] == value]
            texts = [text for row in cells for text in (_time(row) + _mark(row), megabytes(row))]
            table.append([f"{value:g}", *texts])
        lines += ["", markdown_table(table, width=120), ""]
        lines += [f"- {_sentence(fit)}" for fit in fitted if fit["axis"] == axis]
    return lines


def fits(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each axis and contender the exponents of time, time per evaluation, and temporaries.

    For the tolerance: how many evaluations of f another decade takes.
    """
    found = []
    for axis, name in product(distinct(rows, "axis"), distinct(rows, "contender")):
        chosen = [row for row in rows if (row["axis"], row["contender"]) == (axis, name)]
        x, time, steps, size = (
            np.array([row[column] for row in chosen], float)
            for column in ("value", "median", "forward", "temporaries")
        )
        fit = {"axis": axis, "contender": name, "from": x[0], "to": x[-1]}
        if axis == "tolerance":
            fit["evaluations_per_decade"] = slope(-np.log10(x), steps)
        else:
            fit["time"] = power_law(x, time)
            fit["time_per_evaluation"] = power_law(x, time / steps)
            fit["temporaries"] = power_law(x, size)
        found.append(fit)
    return found


def power_law(x: np.ndarray, y: np.ndarray) -> float:
    """a of y ∝ xᵃ, by least squares in the logarithms."""
    return slope(np.log(x), np.log(y))


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """a of y = a x + b, by least squares."""
    return float(np.polyfit(x, y, 1)[0])


def _sentence(fit: Row) -> str:
    begin = f"{fit['contender']}, {fit['axis']} from {fit['from']:g} to {fit['to']:g}:"
    if "evaluations_per_decade" in fit:
        return f"{begin} {fit['evaluations_per_decade']:.1f} evaluations per decade."
    return (
        f"{begin} exponent {fit['time']:.2f} of time, {fit['time_per_evaluation']:.2f} of time per "
        f"evaluation, {fit['temporaries']:.2f} of temporaries."
    )
