"""What the figures have in common: colours, panels, axes."""

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib import figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

# Okabe and Ito's colours, told apart by colour-blind readers; the styles serve print in grey.
BLACK, ORANGE, SKY, GREEN, BLUE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#999999"
CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
STYLES = ("-", "--", "-.", ":")
PAGE_DPI = 192  # two dots to a pixel of a page, as sharp screens have
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Figure(figure.Figure):
    """One that a notebook shows, with a text in its place, where it is the last value of a cell."""

    def _repr_png_(self) -> tuple[bytes, dict[str, str]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=80)
        return buffer.getvalue(), {"alt": self.alternative_text()}

    def save(self, path: Path) -> None:
        """As PNG for a page. What the font lacks, of Chinese names say, is a box without a word."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.savefig(path, format="png", dpi=PAGE_DPI)

    def alternative_text(self) -> str:
        """For who does not see the picture: what its panels, axes, curves and marks are called."""
        panels = [axes for axes in self.axes if axes.axison]
        number = "Panel" if len(panels) == 1 else f"{len(panels)} panels"
        called = {
            number: [axes.get_title() for axes in panels],
            "Vertical axis": [axes.get_ylabel() for axes in panels],
            "Horizontal axis": [self.get_supxlabel(), *(axes.get_xlabel() for axes in panels)],
            "Drawn": [name for axes in panels for name in axes.get_legend_handles_labels()[1]],
            "Marked": [text.get_text() for axes in panels for text in axes.texts],
        }
        sentences = ((kind, _distinct(names)) for kind, names in called.items())
        return " ".join(f"{kind}: {'; '.join(names)}." for kind, names in sentences if names)


def _distinct(names: Iterable[str]) -> list[str]:
    """Each name once, on one line and without the marks of TeX, which would be read out."""
    plain = (" ".join(name.replace("$", "").split()) for name in names)
    return [name for name in dict.fromkeys(plain) if name]


def stack(panels: int, ratios: Sequence[float] | None = None) -> tuple[Figure, np.ndarray]:
    """`panels` axes above one another that share the horizontal axis."""
    height = 1.0 + 1.55 * sum(ratios or [1] * panels)
    picture = Figure(figsize=(6.4, height), layout="constrained")
    axes = picture.subplots(panels, sharex=True, height_ratios=ratios)
    for panel in axes:
        tidy(panel)
    picture.align_ylabels(axes)
    return picture, axes


def row(panels: int, width: float = 3.2, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """`panels` axes side by side, each of its own."""
    picture = Figure(figsize=(1.2 + width * panels, height), layout="constrained")
    axes = picture.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        tidy(panel)
    return picture, axes


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def whole_ticks(axes: Axes, values: Sequence[int] | np.ndarray) -> None:
    axes.set_xlim(min(values) - 0.5, max(values) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def percent_axis(axes: Axes, label: str) -> None:
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set_ylabel(label)


def legend_beside(axes: Axes) -> None:
    """Right of the panel, where it hides no line."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
