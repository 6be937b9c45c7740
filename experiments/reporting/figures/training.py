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
    """The solver over the whole training: steps, share converged, residual, spectral radius."""
    if not any(row.get("solver") for row in history):
        raise ValueError("no row of this history has solver statistics: its fusion solves nothing")
    radius = _column(history, "solver", "spectral_radius")
    residual = _column(history, "solver", "residual")
    has_residual, has_radius = np.isfinite(residual).any(), np.isfinite(radius).any()
    figure, axes = stack(2 + int(has_residual) + int(has_radius))
    epoch = [row["epoch"] for row in history]
    _plot_steps(axes[0], epoch, history)
    _plot_converged(axes[1], epoch, history)
    if has_residual:
        axes[2].semilogy(epoch, residual, color=BLUE, **_marks(history))
        axes[2].set_ylabel("relative\nresidual")
        axes[2].set_ylim(*_decades(residual))
    if has_radius:
        axes[-1].plot(epoch, radius, color=BLUE, **_marks(history))
        axes[-1].axhline(1, color=GREY, linestyle="--", linewidth=1)
        note = {"transform": axes[-1].get_yaxis_transform(), "ha": "right", "fontsize": 8}
        axes[-1].text(1, 1.02, "1: plain iteration stops contracting", color="#666666", **note)
        axes[-1].set_ylabel("spectral radius\nat the fixed point")
        axes[-1].set_ylim(0, 1.15 * max(1, np.nanmax(radius)))
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
        axes.plot(epoch, most, color=GREY, linestyle="--", linewidth=1.2, label="slowest sample")
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


def _decades(values: np.ndarray) -> tuple[float, float]:
    """The whole powers of ten around the positive values."""
    powers = np.log10(values, where=values > 0, out=np.full_like(values, np.nan))
    powers = powers[np.isfinite(powers)] if np.isfinite(powers).any() else np.zeros(1)
    return 10.0 ** np.floor(powers.min()), 10.0 ** np.ceil(powers.max() + 0.3)
