"""How a solve goes: paths in the plane, residuals, steps."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from experiments.reporting.figures.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREY,
    MARKERS,
    SKY,
    STYLES,
    VERMILION,
    Figure,
    legend_beside,
    percent_axis,
    row,
    tidy,
    whole_ticks,
)


def phase_portrait(
    f: Callable[[np.ndarray], ArrayLike],
    paths: Mapping[str, ArrayLike],
    fixed_points: ArrayLike,
    limits: tuple[tuple[float, float], tuple[float, float]],
) -> Figure:
    """A map of the plane: arrows f(z) − z (scaled down), and a panel for each path of points.

    Args:
      f: [N, 2] → [N, 2].
      paths: [K, 2] each, the points at which a solver evaluated f; the first is a circle.
      fixed_points: [P, 2], drawn as stars.
      limits: (left, right), (bottom, top).
    """
    (left, right), (bottom, top) = limits
    grid = np.stack(np.meshgrid(np.linspace(left, right, 16), np.linspace(bottom, top, 16)), -1)
    grid = grid.reshape(-1, 2).astype(np.float32)
    move = np.asarray(f(grid)) - grid
    figure, panels = row(len(paths), width=3.0, height=3.3)
    figure.set_layout_engine("compressed")  # as the panels keep their shape
    for i, (axes, (name, path)) in enumerate(zip(panels, paths.items(), strict=True)):
        arrows = {"color": "#c4c4c4", "angles": "xy", "width": 0.004}
        axes.quiver(*grid.T, *move.T, label="arrows f(z) − z", **arrows)
        style = {"marker": MARKERS[i], "markersize": 3.5, "linewidth": 1.2}
        axes.plot(*np.asarray(path).T, color=CYCLE[i], label="path", **style)
        start = {"color": BLACK, "markerfacecolor": "white", "label": "its start"}
        axes.plot(*np.asarray(path)[0], "o", **start)
        star = {"color": BLACK, "markersize": 11, "label": "fixed point"}
        axes.plot(*np.asarray(fixed_points).T, "*", **star)
        axes.set_title(name, fontsize=10)
        axes.set(xlabel="$z_1$", ylabel="$z_2$", xlim=limits[0], ylim=limits[1], aspect="equal")
        axes.grid(False)
        axes.label_outer()
    return figure


def residual_traces(traces: Mapping[str, ArrayLike], tol: float) -> Figure:
    """Relative residuals [steps, B], NaN after a sample stopped, and the share below `tol`.

    A column for each. A finished sample keeps its last value, so every step shows the distribution
    over all samples.
    """
    last = max(map(_last, traces.values()))
    figure = Figure(figsize=(2.4 + 4.0 * len(traces), 5.6), layout="constrained")
    top, bottom = figure.subplots(
        2, len(traces), sharex=True, sharey="row", height_ratios=(3, 1), squeeze=False
    )
    for above, below, (name, trace) in zip(top, bottom, traces.items(), strict=True):
        above.set_title(name, fontsize=10)
        _quantiles(above, below, _carried_on(trace, last), tol)
    top[0].set_ylabel("relative residual ‖f(z) − z‖ / ‖f(z)‖")
    legend_beside(top[-1])
    whole_ticks(bottom[0], [1, last])
    percent_axis(bottom[0], "converged")
    return figure


def residuals(traces: Mapping[str, ArrayLike], tol: float, rate: float | None = None) -> Figure:
    """A line of relative residuals [steps] for each trace; `rate` draws rateᵏ beside them."""
    figure, (axes,) = row(1, width=5.2, height=3.4)
    last = 1
    for i, (name, trace) in enumerate(traces.items()):
        trace = np.asarray(trace, np.float64)
        trace = trace[~np.isnan(trace)]
        last = max(last, len(trace))
        style = {"color": CYCLE[i % len(CYCLE)], "marker": MARKERS[i % len(MARKERS)]}
        style["linestyle"] = STYLES[i // len(CYCLE)]
        axes.semilogy(np.arange(1, len(trace) + 1), trace, markersize=3.5, label=name, **style)
    if rate is not None:
        step = np.arange(1, last + 1)
        label = f"proportional to {rate:.2f}ᵏ"
        axes.semilogy(step, rate**step, color=GREY, linestyle="--", label=label, zorder=1)
    axes.axhline(tol, color=VERMILION, linestyle=":", label=f"tolerance {tol:g}")
    axes.set(xlabel="step k (evaluations of f)", ylabel="relative residual")
    whole_ticks(axes, [1, last])
    legend_beside(axes)
    return figure


def steps_by_radius(solves: Mapping[str, tuple[ArrayLike, ArrayLike]], tol: float) -> Figure:
    """Steps against the spectral radius at the fixed point, a dot per sample: {name: (ρ, steps)}.

    The line is what plain iteration would need from a residual of 1: ln tol / ln ρ.
    """
    figure, (axes,) = row(1, width=5.2, height=3.6)
    most, lowest, highest = 1.0, 1.0, 1.0
    for i, (name, solved) in enumerate(solves.items()):
        radius, steps = map(np.asarray, solved)
        style = {"color": CYCLE[i], "marker": MARKERS[i], "linestyle": "", "alpha": 0.5}
        axes.plot(radius, steps, markersize=4, label=name, markeredgewidth=0, **style)
        most = max(most, float(np.max(steps)))
        lowest = min(lowest, float(np.min(radius)))
        highest = max(highest, float(np.max(radius)))
    rho = np.linspace(0.8 * lowest, 0.999, 400)
    axes.plot(rho, np.log(tol) / np.log(rho), color=GREY, linestyle="--", label="ln tol / ln ρ")
    axes.axvline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="spectral radius ρ of ∂f/∂z at the fixed point", ylabel="solver steps")
    axes.set(xlim=(0.8 * lowest, 1.05 * highest), ylim=(0, 1.1 * most))
    legend_beside(axes)
    return figure


def radii(radius: np.ndarray, what: str) -> Figure:
    """How many samples have which spectral radius [N] at the fixed point, and where 1 is.

    Above 1 plain iteration leaves the fixed point. `what` says of which samples, in words.
    """
    figure, (axes,) = row(1, width=5.2, height=2.6)
    axes.hist(radius, bins=min(30, max(5, len(radius) // 4)), color=BLUE, alpha=0.8)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, 0.97), max(right, 1.03))
    axes.axvline(1, color=VERMILION, linestyle="--", linewidth=1.2, label="ρ = 1")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set(xlabel="spectral radius ρ of ∂f/∂z at the fixed point", ylabel=what)
    legend_beside(axes)
    return figure


def _last(trace: ArrayLike) -> int:
    """The last step that any sample took."""
    if np.ndim(trace) != 2 or not np.isfinite(trace).any():
        raise ValueError(f"trace {np.shape(trace)}: expected [steps, B] with at least one number")
    return int(np.flatnonzero(np.isfinite(trace).any(axis=1))[-1]) + 1


def _carried_on(trace: ArrayLike, last: int) -> np.ndarray:
    """[last, B] with every sample's last number in place of the NaN after it."""
    trace = np.asarray(trace, np.float64)
    highest = trace[np.isfinite(trace)].max()  # stands in for an overflow, which has no place
    trace = np.where(np.isposinf(trace), highest, trace)
    seen = np.where(np.isnan(trace), 0, np.arange(len(trace))[:, None])
    carried = np.take_along_axis(trace, np.maximum.accumulate(seen, axis=0), axis=0)
    return carried[np.minimum(np.arange(last), len(carried) - 1)]


def _quantiles(above: Axes, below: Axes, trace: np.ndarray, tol: float) -> None:
    step = np.arange(1, len(trace) + 1)
    low, lower, median, upper, high = np.nanpercentile(trace, [5, 25, 50, 75, 95], axis=1)
    above.fill_between(step, low, high, color=SKY, alpha=0.35, lw=0, label="5–95 % of samples")
    above.fill_between(step, lower, upper, color=BLUE, alpha=0.35, lw=0, label="25–75 %")
    above.plot(step, median, color=BLUE, linewidth=2, label="median")
    above.axhline(tol, color=VERMILION, linestyle="--", linewidth=1.2, label=f"tolerance {tol:g}")
    above.set_yscale("log")
    below.step(step, (trace <= tol).mean(axis=1), where="mid", color=BLUE, linewidth=2)
    below.set_xlabel("solver step")
    tidy(above)
    tidy(below)
