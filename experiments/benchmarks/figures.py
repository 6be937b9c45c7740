"""The figures of the benchmarks: rows in, matplotlib `Figure`s out."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from experiments.benchmarks.tables import MEGABYTE, Row, called, distinct
from experiments.reporting.figures.style import (
    BLUE,
    CYCLE,
    GREY,
    ORANGE,
    STYLES,
    Figure,
    stack,
    whole_ticks,
)


def figures(results: Mapping[str, Any]) -> dict[str, Figure]:
    """One for each part that was measured."""
    draw = {"layer": time_by_size, "depth": cost_by_depth, "scaling": cost_by_axis}
    return {part: draw[part](results[part]) for part in draw if results.get(part)}


def time_by_size(rows: Sequence[Row]) -> Figure:
    """Time against the size of the layer, a panel for each tolerance; hollow: tolerance missed."""
    tolerances = distinct(rows, "tolerance")
    figure, axes = _panels(len(tolerances))
    for panel, tol in zip(axes, tolerances, strict=True):
        chosen = [row for row in rows if row["tolerance"] == tol]
        _lines(panel, chosen, _products, _milliseconds)
        missed = [row for row in chosen if row.get("reached") is False]
        for name, style in _styles(chosen).items():
            own = [row for row in missed if row["contender"] == name]
            hollow = {**style, "linestyle": "", "markerfacecolor": "white", "label": None}
            panel.plot(list(map(_products, own)), list(map(_milliseconds, own)), **hollow)
        _ticks(panel, {_products(row): called(row["shape"]) for row in chosen}, rotation=90)
        panel.set_title(f"tolerance {tol:g}", fontsize=10)
    axes[0].set_ylabel("forward and backward, ms")
    _legend(axes[-1])
    return figure


def cost_by_depth(rows: Sequence[Row]) -> Figure:
    """Temporaries and time against the number of steps."""
    figure, (memory, time) = _panels(2)
    _lines(memory, rows, itemgetter("steps"), lambda row: row["temporaries"] / MEGABYTE)
    _lines(time, rows, itemgetter("steps"), _milliseconds)
    memory.set_ylabel("temporaries, MB")
    time.set_ylabel("forward and backward, ms")
    for panel in (memory, time):
        _ticks(panel, {steps: str(steps) for steps in distinct(rows, "steps")})
        panel.set_xlabel("steps")
    _legend(time)
    return figure


def cost_by_axis(rows: Sequence[Row]) -> Figure:
    """Time of our schedules, a panel for each quantity that grows; the tolerance falls."""
    axes_names = distinct(rows, "axis")
    figure, axes = _panels(len(axes_names))
    for panel, axis in zip(axes, axes_names, strict=True):
        chosen = [row for row in rows if row["axis"] == axis]
        _lines(panel, chosen, itemgetter("value"), _milliseconds)
        _ticks(panel, {value: f"{value:g}" for value in distinct(chosen, "value")})
        panel.set_xlabel(axis)
        if axis == "tolerance":
            panel.invert_xaxis()
    axes[0].set_ylabel("forward and backward, ms")
    _legend(axes[-1])
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side with logarithmic axes."""
    figure = Figure(figsize=(2.0 + 2.9 * count, 3.6), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for panel in axes:
        panel.loglog()
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, list(axes)


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How each contender is drawn: ours bold, the floor grey."""
    styles = {}
    for i, name in enumerate(distinct(rows, "contender")):
        lap, place = divmod(i, len(CYCLE))  # more contenders than colours
        color = GREY if name == "floor" else CYCLE[place]
        style = {"color": color, "linestyle": STYLES[lap], "marker": "os^v"[lap], "label": name}
        styles[name] = {**style, "linewidth": 2.4 if name.startswith("ours") else 1.2}
    return styles


def _lines(
    axes: Axes, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]
) -> None:
    """y against x of every contender."""
    for name, style in _styles(rows).items():
        own = sorted((row for row in rows if row["contender"] == name), key=x)
        axes.plot(list(map(x, own)), list(map(y, own)), **style)


def _milliseconds(row: Row) -> float:
    return 1e3 * row["median"]


def _products(row: Row) -> int:
    """B d² (3M + 1), the multiplications in the products of one evaluation."""
    batch, features, modalities = row["shape"]
    return batch * features**2 * (3 * modalities + 1)


def _ticks(axes: Axes, labels: Mapping[Any, str], rotation: float = 0) -> None:
    axes.minorticks_off()
    axes.set_xticks(list(labels), list(labels.values()), rotation=rotation, fontsize=7)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)


def long_run(found: Mapping[str, Any]) -> Figure:
    """Memory, and the time of a step, by tenths of the run."""
    figure, (memory, time) = stack(2)
    tenths = list(range(1, len(found["parts"]) + 1))
    for kind, color in (("resident", ORANGE), ("in_use", BLUE)):
        megabytes = [(part[kind] or float("nan")) / 1e6 for part in found["parts"]]
        memory.plot(tenths, megabytes, "o-", color=color, label=kind.replace("_", " "))
    ms = [1e3 * part["seconds_per_epoch"] / found["batches"] for part in found["parts"]]
    time.plot(tenths, ms, "o-", color=BLUE)
    for panel, label in ((memory, "memory, MB"), (time, "ms a step")):
        panel.set_ylim(0, 1.15 * panel.dataLim.y1)
        panel.set_ylabel(label)
    memory.legend()
    whole_ticks(time, tenths)
    time.set_xlabel(f"tenth of the {found['steps']:,} steps")
    return figure
