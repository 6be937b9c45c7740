"""The progress of a training run, on one line of the terminal."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from experiments.training.devices import is_first


class Bar:
    """A bar over the epochs: rate, loss, validation score, share converged and mean steps.

    Of several processes the first one alone shows it.
    """

    def __init__(self, epochs: int, monitor: str | None = None):
        self.monitor, self.epochs = monitor, epochs
        columns = (
            SpinnerColumn(),
            TextColumn("epoch {task.fields[at]}/{task.total}"),
            BarColumn(bar_width=16),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Progress(*columns, disable=not is_first())
        self.shown = time.monotonic()

    def __enter__(self) -> Self:
        self.bar.start()
        self.task = self.bar.add_task("compiling …", total=self.epochs, at=0)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """After an evaluation."""
        parts = []
        if row["seconds"]:
            parts.append(f"{row['epoch'] / row['seconds']:.2f} epoch/s")
            parts.append(f"loss {row['loss']:.3f}")
        if self.monitor:  # what validation rows are still worth
            name, score = self.monitor.replace("_", "-"), row["validation"][self.monitor]
            parts.append(f"{name} {score:.3f}")
        if row["solver"]:
            parts.append(f"converged {row['solver']['converged']:.1%}")
            parts.append(f"{row['solver']['mean_steps']:.1f} steps")
        self._show(row["epoch"], [*parts, *self._troubles(row["train"])])

    def part(self, epoch: float, means: Callable[[], dict[str, float]]) -> None:
        """Within an epoch, once a second: fetching the means waits for the device."""
        if time.monotonic() < self.shown + 1:
            return
        seen = means()
        parts = [f"loss {seen['loss']:.3f}"]
        if "converged" in seen:
            parts.append(f"converged {seen['converged']:.1%}")
            parts.append(f"{seen['mean_steps']:.1f} steps")
        self._show(epoch, [*parts, *self._troubles(seen)])

    def _troubles(self, seen: Mapping[str, float]) -> list[str]:
        troubles = []
        if seen.get("backward_converged", 1) < 1:
            troubles.append(f"backward {seen['backward_converged']:.1%}")
        if seen.get("bad_steps"):
            troubles.append(f"{seen['bad_steps']:.0f} bad steps")
        return troubles

    def _show(self, epoch: float | int, parts: list[str]) -> None:
        self.shown = time.monotonic()
        at = epoch if isinstance(epoch, int) else f"{epoch:.2f}"
        self.bar.update(self.task, completed=epoch, at=at, description=", ".join(parts))
