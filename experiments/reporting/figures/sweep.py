"""Quantities against a number that is varied."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike

from experiments.reporting.figures.style import (
    CYCLE,
    MARKERS,
    Figure,
    legend_beside,
    percent_axis,
    row,
)


def sweep(
    x: Sequence[float],
    panels: Mapping[str, Mapping[str, ArrayLike]],
    xlabel: str,
    ylabel: str | None = None,
    log: Collection[str] = (),
    xticks: Mapping[float, str] | None = None,
) -> Figure:
    """A panel for each quantity, a line for each name: {quantity: {name: values}}.

    The quantities label the vertical axes; with a `ylabel` for all of them, they are the titles of
    panels that share one axis. Values are [X], or [X, N]: their median, with a band from 5 to 95 %
    of the N samples. What is labelled "share …" is in per cent. `log` has the labels of the
    logarithmic axes.
    """
    figure, axes = row(len(panels), width=3.2 if ylabel is None else 2.6)
    for panel, (quantity, lines) in zip(axes, panels.items(), strict=True):
        for i, (name, values) in enumerate(lines.items()):
            _line(panel, x, np.asarray(values, np.float64), CYCLE[i], MARKERS[i], name)
        if xlabel in log:
            panel.set_xscale("log")
        if xticks:
            panel.set_xticks(list(xticks), list(xticks.values()))
            panel.xaxis.set_minor_formatter(NullFormatter())
        _vertical(panel, ylabel or quantity, log)
        if ylabel is None:
            panel.set_xlabel(xlabel)
        else:
            panel.set_title(quantity, fontsize=10)
    if ylabel is not None:
        figure.supxlabel(xlabel, fontsize=10)
        for panel in axes[1:]:
            panel.sharey(axes[0])
            panel.label_outer()
        axes[0].autoscale(axis="y")
        _vertical(axes[0], ylabel, log)
    legend_beside(axes[-1])
    return figure


def _vertical(panel: Axes, label: str, log: Collection[str]) -> None:
    panel.set_ylabel(label)
    if label.startswith("share"):
        percent_axis(panel, label)
    elif label in log:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))


def _line(
    panel: Axes, x: Sequence[float], values: np.ndarray, color: str, marker: str, name: str
) -> None:
    if values.ndim == 2:
        low, values, high = np.percentile(values, [5, 50, 95], axis=1)
        panel.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    panel.plot(x, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=name)
