"""Plots of a run. Each function takes plain data and returns a matplotlib `Figure`, ready for
`figure.savefig(path)`; none touches pyplot, so no display and no global state are involved.

`history` is the rows of metrics.jsonl: {"epoch", "loss", "validation_loss" where it is measured,
"validation": {metric: value}, "solver":
{"converged", "mean_steps", "max_steps", "residual", …} or None for a fusion without a solver}.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import ArrayLike

History = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, told apart by colour-blind readers; the styles serve print in grey.
BLACK, ORANGE, SKY, GREEN, BLUE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#999999"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
STYLES = ("-", "--", "-.", ":")


def learning_curve(history: History) -> Figure:
    """Loss, validation metrics, and (where there is a solver) how it fared, against the epoch."""
    solved = any(row.get("solver") for row in history)
    figure, axes = _stack(4 if solved else 2)
    epoch = [row["epoch"] for row in history]
    axes[0].plot(epoch, _column(history, "loss"), color=BLACK, label="training", **_marks(history))
    if np.isfinite(_column(history, "validation_loss")).any():
        style = {"color": GREY, "linestyle": "--", "label": "validation"} | _marks(history)
        axes[0].plot(epoch, _column(history, "validation_loss"), **style)
    axes[0].set_ylabel("loss")
    _legend_beside(axes[0])
    metrics = list(dict.fromkeys(name for row in history for name in row.get("validation") or {}))
    for i, name in enumerate(metrics):
        style = {"color": CYCLE[i % len(CYCLE)], "linestyle": STYLES[i % len(STYLES)]}
        style |= _marks(history) | {"label": name.replace("_", " ")}
        axes[1].plot(epoch, _column(history, "validation", name), **style)
    axes[1].set_ylabel("validation score")
    _legend_beside(axes[1])
    if solved:
        _plot_converged(axes[2], history)
        _plot_steps(axes[3], history)
    axes[-1].set_xlabel("epoch")
    _whole_ticks(axes[-1], epoch)
    return figure


def learning_curves(histories: Mapping[str, History]) -> Figure:
    """Of several runs: training loss, the first validation metric, and their solvers' steps."""
    solved = any(row.get("solver") for history in histories.values() for row in history)
    figure, axes = _stack(3 if solved else 2)
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
    _legend_beside(axes[0])
    metrics = dict.fromkeys(line.get_label() for line in axes[1].lines)
    axes[1].set_ylabel("\n".join(["validation", *metrics]))
    if solved:
        axes[2].set_ylabel("solver steps,\nmean")
        axes[2].set_ylim(bottom=0)
    axes[-1].set_xlabel("epoch")
    _whole_ticks(axes[-1], [row["epoch"] for history in histories.values() for row in history])
    return figure


def solver_health(history: History) -> Figure:
    """The solver over the whole training: steps, share converged, residual, spectral radius."""
    if not any(row.get("solver") for row in history):
        raise ValueError("no row of this history has solver statistics: its fusion solves nothing")
    radius = _column(history, "solver", "spectral_radius")
    residual = _column(history, "solver", "residual")
    has_residual, has_radius = np.isfinite(residual).any(), np.isfinite(radius).any()
    figure, axes = _stack(2 + has_residual + has_radius)
    _plot_steps(axes[0], history)
    _plot_converged(axes[1], history)
    epoch = [row["epoch"] for row in history]
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
    _whole_ticks(axes[-1], epoch)
    return figure


def residual_trace(trace: ArrayLike, tol: float) -> Figure:
    """Relative residual [steps, B], NaN after a sample stopped, and the share below `tol`.

    A finished sample keeps its last value, so every step shows the distribution over all samples.
    """
    trace = np.asarray(trace, np.float64)
    if trace.ndim != 2 or not np.isfinite(trace).any():
        raise ValueError(f"trace {trace.shape}: expected [steps, B] with at least one number")
    last = int(np.flatnonzero(np.isfinite(trace).any(axis=1))[-1]) + 1
    highest = trace[np.isfinite(trace)].max()  # stands in for an overflow, which has no place
    trace = _carry_forward(np.where(np.isposinf(trace), highest, trace)[:last])
    step = np.arange(1, last + 1)
    low, lower, median, upper, high = np.nanpercentile(trace, [5, 25, 50, 75, 95], axis=1)

    figure, (top, bottom) = _stack(2, ratios=(3, 1))
    top.fill_between(step, low, high, color=SKY, alpha=0.35, lw=0, label="5–95 % of samples")
    top.fill_between(step, lower, upper, color=BLUE, alpha=0.35, lw=0, label="25–75 %")
    top.plot(step, median, color=BLUE, linewidth=2, label="median")
    top.axhline(tol, color=VERMILION, linestyle="--", linewidth=1.2, label=f"tolerance {tol:g}")
    top.set_yscale("log")
    top.set_ylabel("relative residual ‖f(z) − z‖ / ‖f(z)‖")
    top.legend(frameon=False, loc="upper right")
    bottom.step(step, (trace <= tol).mean(axis=1), where="mid", color=BLUE, linewidth=2)
    _percent_axis(bottom, f"converged\n(of {trace.shape[1]:,})")
    bottom.set_xlabel("solver step")
    _whole_ticks(bottom, step)
    return figure


def gate_strength(
    gates: Mapping[str, ArrayLike],
    classes: ArrayLike | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """How much of the fused state each modality lets through: mean |gate| per sample.

    Gates are [N, …, d] or [N] per modality. `classes` [N] in 0 … C-1 with their `names` splits
    the distribution by class. Box: quartiles and median; whiskers: 5–95 %; dots: samples.
    """
    strength = {name: _per_sample(gate) for name, gate in gates.items()}
    total = {len(values) for values in strength.values()}
    if len(total) != 1:
        shapes = {name: np.shape(gate) for name, gate in gates.items()}
        raise ValueError(f"gates {shapes}: expected the same number of samples N for each")
    group = np.zeros(total.pop(), int) if classes is None else np.asarray(classes)
    samples = {values.shape for values in strength.values()}
    if samples != {group.shape}:
        raise ValueError(f"classes {group.shape} for gates of {samples} samples: expected one each")
    present = np.unique(group)
    width = max(4.5, 1.5 + 0.45 * len(strength) * len(present))
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    axes = figure.add_subplot()
    _tidy(axes)
    left = np.arange(len(present)) * (len(strength) + 1.0)  # where each class begins
    for i, (name, values) in enumerate(strength.items()):
        color = CYCLE[i % len(CYCLE)]
        _boxes(axes, [values[group == c] for c in present], left + i, color, name)
    if classes is None:
        axes.set_xticks(range(len(strength)), list(strength))
        axes.set_xlabel(f"modality ({len(group):,} samples)")
    else:
        labels = [f"{names[c] if names else c}\nn = {(group == c).sum():,}" for c in present]
        axes.set_xticks(left + (len(strength) - 1) / 2, labels)
        axes.tick_params(axis="x", rotation=90 if len(present) > 8 else 0)
        axes.set_xlabel("class")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_ylabel("mean |gate| of a sample")
    axes.set_ylim(bottom=0)
    return figure


def ablation(
    spreads: Mapping[str, Mapping[str, Mapping[str, float | None]]],
    reference: str = "DEQ",
) -> Figure:
    """Mean ± standard deviation of every variant, a panel per metric: {metric: {variant: {…}}}.

    A line down the panel marks the reference.
    """
    variants = list(next(iter(spreads.values())))
    size = (2.2 + 2.4 * len(spreads), 1.0 + 0.26 * len(variants))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(spreads), sharey=True, squeeze=False)[0]
    place = np.arange(len(variants))
    for axes, (metric, found) in zip(panels, spreads.items(), strict=True):
        mean, std = (
            np.array([found[name][key] for name in variants], float) for key in ("mean", "std")
        )
        axes.errorbar(mean, place, xerr=np.nan_to_num(std), fmt="o", color=BLUE, markersize=4)
        if reference in found:
            axes.axvline(mean[variants.index(reference)], color=GREY, linestyle="--", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{metric.replace('_', ' ')}, test")
    panels[0].set_yticks(place, variants)
    panels[0].invert_yaxis()
    return figure


def _stack(panels: int, ratios: Sequence[float] | None = None) -> tuple[Figure, np.ndarray]:
    """`panels` axes above one another that share the horizontal axis."""
    height = 1.0 + 1.55 * sum(ratios or [1] * panels)
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots(panels, sharex=True, height_ratios=ratios)
    for panel in axes:
        _tidy(panel)
    figure.align_ylabels(axes)
    return figure, axes


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _whole_ticks(axes: Axes, values: Sequence[int] | np.ndarray) -> None:
    axes.set_xlim(min(values) - 0.5, max(values) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _decades(values: np.ndarray) -> tuple[float, float]:
    """The whole powers of ten around the positive values."""
    powers = np.log10(values, where=values > 0, out=np.full_like(values, np.nan))
    powers = powers[np.isfinite(powers)] if np.isfinite(powers).any() else np.zeros(1)
    return 10.0 ** np.floor(powers.min()), 10.0 ** (np.floor(powers.max()) + 1)


def _marks(history: History) -> dict[str, Any]:
    """Points where epochs are few enough to be seen one by one."""
    return {"linewidth": 1.6, "marker": "o" if len(history) <= 30 else None, "markersize": 3}


def _column(history: History, *keys: str) -> np.ndarray:
    """row[key][key]… of every row as floats, NaN where a row lacks it."""
    values = []
    for row in history:
        value: Any = row
        for key in keys:
            value = (value or {}).get(key)
        values.append(np.nan if value is None else float(value))
    return np.array(values)


def _plot_converged(axes: Axes, history: History) -> None:
    share = _column(history, "solver", "converged")
    axes.plot([row["epoch"] for row in history], share, color=GREEN, **_marks(history))
    _percent_axis(axes, "samples\nconverged")


def _plot_steps(axes: Axes, history: History) -> None:
    epoch = [row["epoch"] for row in history]
    mean, most = _column(history, "solver", "mean_steps"), _column(history, "solver", "max_steps")
    axes.plot(epoch, mean, color=BLUE, label="mean", **_marks(history))
    if np.isfinite(most).any():
        axes.plot(epoch, most, color=GREY, linestyle="--", linewidth=1.2, label="slowest sample")
        _legend_beside(axes)
    axes.set_ylabel("solver steps")
    axes.set_ylim(bottom=0)


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylabel(label)


def _legend_beside(axes: Axes) -> None:
    """Right of the panel, where it hides no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _carry_forward(trace: np.ndarray) -> np.ndarray:
    """NaN → the last number above it in its column."""
    row = np.where(np.isnan(trace), 0, np.arange(len(trace))[:, None])
    return np.take_along_axis(trace, np.maximum.accumulate(row, axis=0), axis=0)


def _per_sample(gate: ArrayLike) -> np.ndarray:
    gate = np.abs(np.asarray(gate, np.float64))
    return gate.reshape(len(gate), -1).mean(axis=1)


def _boxes(axes: Axes, groups: list[np.ndarray], place: np.ndarray, color: str, name: str) -> None:
    spread = np.random.default_rng(0)  # sideways only, so that dots do not hide one another
    for values, x in zip(groups, place, strict=True):
        some = values if len(values) <= 300 else spread.choice(values, 300, replace=False)
        beside = x + spread.uniform(-0.36, 0.36, len(some))
        axes.plot(beside, some, ".", color=color, alpha=0.35, markersize=3, zorder=1, mew=0)
    parts = axes.boxplot(
        groups,
        positions=place,
        widths=0.4,
        whis=(5, 95),
        showfliers=False,
        patch_artist=True,
        manage_ticks=False,
        medianprops={"color": BLACK, "linewidth": 1.4},
        whiskerprops={"color": color},
        capprops={"color": color},
    )
    for box in parts["boxes"]:
        box.set(facecolor=to_rgba(color, 0.35), edgecolor=color)
    parts["boxes"][0].set_label(name)
