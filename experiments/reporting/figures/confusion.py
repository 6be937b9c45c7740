"""Which classes are taken for which."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import ArrayLike

from experiments.reporting.figures.style import BLUE, GREY, Figure

COUNTED = 12  # classes whose counts can be read in their squares
NAMED = 40  # classes whose names can be read along the axes


def confusion(counts: ArrayLike, names: Sequence[str]) -> Figure:
    """Counts [C, C], a row for each true class, in the classes' own order.

    The colour is the share of the row; the counts are written where there is room.
    """
    counts = np.asarray(counts)
    classes = len(counts)
    if counts.shape != (classes, classes) or classes != len(names):
        raise ValueError(f"counts {counts.shape} of {len(names)} classes: expected [C, C]")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.8 + (0.42 * classes if classes <= COUNTED else min(0.17 * classes, 5.0))
    figure = Figure(figsize=(side + 1.2, side), layout="compressed")
    axes = figure.add_subplot()
    colours = LinearSegmentedColormap.from_list("share", ["white", BLUE])
    image = axes.imshow(shares, cmap=colours, vmin=0, vmax=1)
    number = "" if classes <= NAMED else ", by number"
    axes.set(xlabel=f"predicted class{number}", ylabel=f"true class{number}")
    _name_ticks(axes, [_short(name) for name in names])
    axes.spines[:].set_color(GREY)
    if classes <= COUNTED:
        _write_counts(axes, counts, shares)
    bar = figure.colorbar(image, shrink=0.6, label="share of the row", ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return figure


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    if len(names) > NAMED:
        return
    size = 9 if len(names) <= COUNTED else 7
    upright = max(map(len, names)) > 3
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)


def _write_counts(axes: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    for (i, j), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shares[i, j] > 0.55 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=ink, fontsize=8)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"
