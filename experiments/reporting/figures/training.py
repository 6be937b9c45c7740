"""The course of a training.

`history` is the rows of metrics.jsonl: {"epoch", "loss", "validation_loss" where it is measured,
"validation": {metric: value}, "solver":
{"converged", "mean_steps", "max_steps", "residual", …} or None for a fusion without a solver}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.reporting.figures.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    STYLES,
    VERMILION,
    Figure,
    legend_beside,
    percent_axis,
    stack,
    whole_ticks,
)

History = Sequence[Mapping[str, Any]]


def learning_curve(history: History, unit: str = "epoch") -> Figure:
    """Loss, validation metrics, and (where there is a solver) how it fared, against the epoch.

    Or against another `unit`, which then is a key of every row.
    """
    solved = any(row.get("solver") for row in history)
    metrics = list(dict.fromkeys(name for row in history for name in row.get("validation") or {}))
    figure, axes = stack(1 + bool(metrics) + 2 * solved)
    epoch = [row[unit] for row in history]
    axes[0].plot(epoch, _column(history, "loss"), color=BLACK, label="training", **_marks(history))
    if np.isfinite(_column(history, "validation_loss")).any():
        style = {"color": GREY, "linestyle": "--", "label": "validation"} | _marks(history)
        axes[0].plot(epoch, _column(history, "validation_loss"), **style)
    axes[0].set_ylabel("loss")
    legend_beside(axes[0])
    for i, name in enumerate(metrics):
        style = {"color": CYCLE[i % len(CYCLE)], "linestyle": STYLES[i % len(STYLES)]}
        style |= _marks(history) | {"label": name.replace("_", " ")}
        axes[1].plot(epoch, _column(history, "validation", name), **style)
    if metrics:
        axes[1].set_ylabel("validation score")
        legend_beside(axes[1])
    if solved:
        _plot_converged(axes[-2], epoch, history)
        _plot_steps(axes[-1], epoch, history)
    axes[-1].set_xlabel(unit)
    whole_ticks(axes[-1], epoch)
    return figure


def learning_curves(histories: Mapping[str, History]) -> Figure:
    """Of several runs: training loss, the first validation metric, and their solvers' steps."""
    solved = any(row.get("solver") for history in histories.values() for row in history)
    figure, axes = stack(3 if solved else 2)
    for i, (name, history) in enumerate(histories.items()):
        epoch = [row["epoch"] for row in history]
        lap, place = divmod(i, len(CYCLE))
        style = {"color": CYCLE[place], "linestyle": STYLES[lap % len(STYLES)]} | _marks(history)
        metric = next(iter(history[-1].get("validation") or {"score": None}))
        axes[0].plot(epoch, _column(history, "loss"), label=name, **style)
        label = metric.replace("_", " ")
        axes[1].plot(epoch, _column(history, "validation", metric), label=label, **style)
        if any(row.get("solver") for row in history):
            axes[2].plot(epoch, _column(history, "solver", "mean_steps"), **style)
    axes[0].set_ylabel("training loss")
    legend_beside(axes[0])
    metrics = dict.fromkeys(line.get_label() for line in axes[1].lines)
    axes[1].set_ylabel("\n".join(["validation", *metrics]))
    if solved:
        axes[2].set_ylabel("solver steps,\nmean")
        axes[2].set_ylim(bottom=0)
    axes[-1].set_xlabel("epoch")
    whole_ticks(axes[-1], [row["epoch"] for history in histories.values() for row in history])
    return figure


def solver_health(history: History) -> Figure:
    """The solver over the whole training: steps and share converged, forward and backward.

    Forward are the solves of the validation rows, backward those of the training steps.
    """
    if not any(row.get("solver") for row in history):
        raise ValueError("no row of this history has solver statistics: its fusion solves nothing")
    figure, axes = stack(2)
    epoch = [row["epoch"] for row in history]
    _plot_steps(axes[0], epoch, history)
    _plot_converged(axes[1], epoch, history)
    backward = ("backward_steps", "backward_converged")
    for panel, name in zip(axes, backward, strict=True):
        values = _column(history, "train", name)
        if np.isfinite(values).any():
            panel.lines[0].set_label("forward")
            style = {"color": VERMILION, "linestyle": "--", "label": "backward"} | _marks(history)
            panel.plot(epoch, values, **style)
            legend_beside(panel)
    axes[1].set_ylabel("solves\nconverged")
    axes[-1].set_xlabel("epoch")
    whole_ticks(axes[-1], epoch)
    return figure


def _plot_converged(axes: Axes, epoch: Sequence[int], history: History) -> None:
    share = _column(history, "solver", "converged")
    axes.plot(epoch, share, color=GREEN, **_marks(history))
    percent_axis(axes, "samples\nconverged")


def _plot_steps(axes: Axes, epoch: Sequence[int], history: History) -> None:
    mean, most = _column(history, "solver", "mean_steps"), _column(history, "solver", "max_steps")
    axes.plot(epoch, mean, color=BLUE, label="mean", **_marks(history))
    if np.isfinite(most).any():
        axes.plot(epoch, most, color=GREY, linestyle=":", linewidth=1.2, label="slowest sample")
        legend_beside(axes)
    axes.set_ylabel("solver steps")
    axes.set_ylim(bottom=0)


def _column(history: History, *keys: str) -> np.ndarray:
    """row[key][key]… of every row as floats, NaN where a row lacks it."""
    values = []
    for row in history:
        value: Any = row
        for key in keys:
            value = (value or {}).get(key)
        values.append(np.nan if value is None else float(value))
    return np.array(values)


def _marks(history: History) -> dict[str, Any]:
    """Points where epochs are few enough to be seen one by one."""
    return {"linewidth": 1.6, "marker": "o" if len(history) <= 30 else None, "markersize": 3}
