"""README's picture: what deep equilibrium fusion is, and how a solve goes."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from numpy.typing import ArrayLike

from experiments.reporting.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    VERMILION,
    Figure,
    tidy,
    whole_ticks,
)

INK = "#333333"


def overview(trace: ArrayLike, tol: float) -> Figure:
    """Left the maps of the layer; right the relative residuals [steps, B] of a real solve."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.75, 1))
    _maps(left)
    _residuals(right, np.asarray(trace, np.float64), tol)
    return figure


def _maps(axes: Axes) -> None:
    axes.set(xlim=(0, 11.4), ylim=(0, 5.6), aspect="equal")
    axes.axis("off")
    rows = (("image", BLUE, 4.4), ("text", VERMILION, 2.8), ("…", GREEN, 1.2))
    for i, (name, color, y) in enumerate(rows):
        sub = ("1", "2", "M")[i]
        _box(axes, 0.9, y, f"{name}\n$x_{sub}$", color, 1.5)
        _arrow(axes, (1.7, y), (3.1, y), color)
        _box(axes, 3.9, y, f"$f_{sub}$", color, 1.5)
        _loop(axes, 3.9, y + 0.42, f"$z_{sub}$", color)
        _arrow(axes, (4.7, y), (7.1, 2.8 + 0.35 * (1 - i)), color)
        above = (y + 2.8) / 2 + (0.38, 0.15, -0.55)[i]
        axes.text(5.7, above, rf"gate $\alpha_{sub}$", color=color)
    _box(axes, 7.95, 2.8, r"$f_\mathrm{fuse}$", BLACK, 1.6, 1.5)
    _loop(axes, 7.95, 3.57, r"$z_\mathrm{fuse}\odot\sum_i\alpha_i$", BLACK)
    _arrow(axes, (7.95, 1.35), (7.95, 2.02), BLACK)
    axes.text(7.95, 0.95, r"$\sum_i w_i x_i$", ha="center", color=INK, fontsize=11)
    _arrow(axes, (8.8, 2.8), (9.7, 2.8), BLACK)
    axes.text(9.8, 2.8, r"$z_\mathrm{fuse}^\star$", va="center", fontsize=15)
    note = "iterated until nothing moves:  $z^\\star = f(z^\\star, x)$"
    axes.text(5.2, 0.05, note, ha="center", color=INK, fontsize=11)


def _residuals(axes: Axes, trace: np.ndarray, tol: float) -> None:
    tidy(axes)
    trace = trace[~np.isnan(trace).all(axis=1)]
    for sample in trace.T:
        sample = sample[~np.isnan(sample)]
        axes.semilogy(np.arange(1, len(sample) + 1), sample, color=BLUE, alpha=0.3, linewidth=1)
        axes.plot(len(sample), sample[-1], "o", color=BLUE, markersize=3.5)
    axes.axhline(tol, color=VERMILION, linestyle="--", linewidth=1.2)
    axes.text(1, tol * 1.4, f"tolerance {tol:g}", color=VERMILION, fontsize=9)
    axes.set(xlabel="step (evaluations of $f$)", ylabel="relative residual")
    whole_ticks(axes, [1, len(trace)])
    title = f"{trace.shape[1]} random samples, fresh weights:\neach stops by itself"
    axes.set_title(title, fontsize=10)


def _box(
    axes: Axes, x: float, y: float, text: str, color: str, width: float, height: float = 0.84
) -> None:
    corner = (x - width / 2, y - height / 2)
    box = FancyBboxPatch(corner, width, height, boxstyle="round,pad=0,rounding_size=0.15")
    box.set(facecolor="white", edgecolor=color, linewidth=1.8)
    axes.add_patch(box)
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=11, linespacing=1.3)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.4, "color": color}
    axes.annotate("", end, start, arrowprops={**style, "mutation_scale": 12})


def _loop(axes: Axes, x: float, y: float, text: str, color: str) -> None:
    """From the top of a box back into it."""
    style = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 1.4, "color": color}
    style |= {"mutation_scale": 12, "connectionstyle": "arc3,rad=-1.6"}
    axes.annotate("", (x + 0.25, y), (x - 0.25, y), arrowprops=style)
    axes.text(x + 0.52, y + 0.18, text, color=INK, fontsize=11)
