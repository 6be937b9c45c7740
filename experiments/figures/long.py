"""The figure of `experiments.benchmark_long`."""

from collections.abc import Mapping
from typing import Any

from experiments.figures.style import BLUE, ORANGE, Figure, stack, whole_ticks


def long_run(found: Mapping[str, Any]) -> Figure:
    """Memory, and the time of a step, by tenths of the run."""
    figure, (memory, time) = stack(2)
    tenths = list(range(1, len(found["parts"]) + 1))
    for kind, color in (("resident", ORANGE), ("in_use", BLUE)):
        megabytes = [(part[kind] or float("nan")) / 1e6 for part in found["parts"]]
        memory.plot(tenths, megabytes, "o-", color=color, label=kind.replace("_", " "))
    ms = [1e3 * part["seconds_per_epoch"] / found["batches"] for part in found["parts"]]
    time.plot(tenths, ms, "o-", color=BLUE)
    for panel, label in ((memory, "memory, MB"), (time, "ms a step")):
        panel.set_ylim(0, 1.15 * panel.dataLim.y1)
        panel.set_ylabel(label)
    memory.legend()
    whole_ticks(time, tenths)
    time.set_xlabel(f"tenth of the {found['steps']:,} steps")
    return figure
