"""What a fusion does with its modalities: gates, and equilibria in the plane."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from numpy.typing import ArrayLike

from experiments.reporting.figures.style import (
    BLACK,
    CYCLE,
    MARKERS,
    Figure,
    legend_beside,
    row,
    tidy,
)


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
    tidy(axes)
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


def planes(
    panels: Mapping[str, tuple[ArrayLike, ArrayLike]],
    names: Sequence[str] | None = None,
    marks: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Points [N, 2] coloured and marked by their class [N] in 0 … C-1: {title: (points, class)}.

    `marks` are {name: point [2]}, written into every panel.
    """
    figure, axes = row(len(panels), width=2.5, height=2.9)
    present = np.unique(np.concatenate([np.ravel(group) for _, group in panels.values()]))
    for panel, (title, (points, group)) in zip(axes, panels.items(), strict=True):
        for c in present:
            style = {"color": CYCLE[c % len(CYCLE)], "marker": MARKERS[c % len(MARKERS)]}
            x, y = np.asarray(points)[np.asarray(group) == c].T
            label = names[c] if names else f"class {c}"
            panel.plot(x, y, linestyle="", markersize=3.5, alpha=0.6, mew=0, label=label, **style)
        for name, point in (marks or {}).items():
            panel.annotate(
                name, point, ha="center", va="center", weight="bold",
                bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": BLACK},
            )  # fmt: skip
        panel.set_title(title, fontsize=10)
        panel.set(xticks=[], yticks=[], xlabel="1st direction")
        panel.grid(False)
    axes[0].set_ylabel("2nd direction")
    legend_beside(axes[-1])
    return figure


def _per_sample(gate: ArrayLike) -> np.ndarray:
    gate = np.abs(np.asarray(gate, np.float64))
    return gate.reshape(len(gate), -1).mean(axis=1)


def _boxes(axes: Axes, groups: list[np.ndarray], place: np.ndarray, color: str, name: str) -> None:
    spread = np.random.default_rng(0)  # sideways only, so that dots do not hide one another
    for values, x in zip(groups, place, strict=True):
        some = values if len(values) <= 300 else spread.choice(values, 300, replace=False)
        beside = x + spread.uniform(-0.36, 0.36, len(some))
        axes.plot(beside, some, ".", color=color, alpha=0.5, markersize=5, zorder=1, mew=0)
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
