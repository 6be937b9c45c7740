"""The figure of `experiments.benchmark_long`."""

from collections.abc import Mapping
from typing import Any

from experiments.figures.style import BLUE, Figure, stack, whole_ticks


def long_run(found: Mapping[str, Any]) -> Figure:
    """Memory, and the time of a step, by tenths of the run."""
    figure, (memory, time) = stack(2)
    tenths = list(range(1, len(found["parts"]) + 1))
    megabytes = [(part["memory"] or float("nan")) / 1e6 for part in found["parts"]]
    ms = [1e3 * part["seconds_per_epoch"] / found["batches"] for part in found["parts"]]
    for panel, values, label in ((memory, megabytes, "memory, MB"), (time, ms, "ms a step")):
        panel.plot(tenths, values, "o-", color=BLUE)
        panel.set_ylim(0, 1.15 * max(values))
        panel.set_ylabel(label)
    whole_ticks(time, tenths)
    time.set_xlabel(f"tenth of the {found['steps']:,} steps")
    return figure
