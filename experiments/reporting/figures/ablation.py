"""The bars of an ablation."""

from collections.abc import Mapping

import numpy as np

from experiments.reporting.figures.style import BLUE, GREY, Figure


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
