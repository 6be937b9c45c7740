"""The progress of a training run: how far, how long still, what goes wrong, how well it does.

A terminal shows it in one place, on one line or on more where that is too narrow. Anywhere else, in
a log file say, a line is printed now and then.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
from rich import get_console
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.common.text import defined, percent
from experiments.training.devices import is_first

QUIET_SECONDS = 10  # between two lines of a log, or a hundredth of the time so far


class Bar:
    """A bar over the epochs: time left, then what goes wrong, then the scores.

    Of several processes the first one alone shows it.

    Attributes:
      epochs: how many there are at most.
      monitor: the validation metric to show, if there is one.
      may_stop: whether training may end before all epochs are done.
    """

    def __init__(
        self,
        epochs: int,
        monitor: str | None = None,
        may_stop: bool = False,
        console: Console | None = None,
    ):
        self.epochs, self.monitor, self.may_stop = epochs, monitor, may_stop
        self.console = console or get_console()
        on_terminal = self.console.is_interactive and not self.console.is_jupyter
        live = Live(self, console=self.console, vertical_overflow="visible")
        self.live = live if on_terminal and is_first() else None
        self.compilation = Compilation()
        self.epoch: float = 0
        self.start: tuple[float, float] | None = None  # when and where training began here
        self.seconds_per_epoch: float | None = None
        self.doing, self.score, self.over = "compiling the evaluation …", "", False
        self.warnings: list[str] = []
        self.scores: list[str] = []
        self.bad_steps, self.warned = 0.0, False
        self.seen = time.monotonic()
        self.began = self.logged = self.seen
        self.log_from: float = 0  # the epoch from which a line is due

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self.compilation)
        if self.live:
            self.live.start()
        self._log()
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self.compilation)
        self.over, self.doing = True, ""
        if self.live:
            self.live.stop()
        self._log()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """After an evaluation."""
        train, solver = row["train"], row["solver"] or {}
        if self.monitor:  # what validation rows are still worth
            self.score = f"{self.monitor.replace('_', '-')} {row['validation'][self.monitor]:.3f}"
        self._show(row["epoch"], train, {"validation": solver, "training": train})
        self.bad_steps += train.get("bad_steps", 0)

    def part(self, epoch: float, means: Callable[[], dict[str, float]]) -> None:
        """Before the first step and after some more: fetching the means waits for the device."""
        if self.start is None:
            self.start, self.doing = (time.monotonic(), epoch), "compiling the training step …"
            self._log()
            return
        self.doing = ""
        if epoch % 1 and time.monotonic() >= self.seen + 1:  # a whole one is evaluated now
            train = means()
            self._show(epoch, train, {"training": train})

    def _show(
        self, epoch: float, train: Mapping[str, float], solves: Mapping[str, Mapping[str, float]]
    ) -> None:
        self.epoch, self.seen = epoch, time.monotonic()
        if self.start and epoch > self.start[1]:
            self.doing = ""
            spent = self.seen - self.start[0] - self.compilation.since(self.start[0])
            self.seconds_per_epoch = max(spent, 0) / (epoch - self.start[1])
        self.warnings = list(_warnings(train, solves, self.bad_steps))
        self.scores = [f"loss {train['loss']:.3f}"] if "loss" in train else []
        self.scores += [self.score] if self.score else []
        if steps := next((s["mean_steps"] for s in solves.values() if "mean_steps" in s), None):
            self.scores.append(f"{steps:.1f} solver steps")
        if self.seconds_per_epoch:
            self.scores.append(_pace(self.seconds_per_epoch))
        quiet = max(QUIET_SECONDS, (self.seen - self.began) / 100)
        due = self.seen >= self.logged + quiet or epoch >= self.log_from
        if self.start and epoch < self.epochs and (due or (self.warnings and not self.warned)):
            self.warned = self.warned or bool(self.warnings)
            self._log()

    # --- how it looks ----------------------------------------------------------------------------

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        count, clock, body = self._count(), self._clock(), self._body()
        room = options.max_width - len(count) - len(clock) - 2
        if room < 4:
            yield from _folded([Text(count), Text(clock), *body], options.max_width)
            return
        bar = ProgressBar(self.epochs, self.epoch, min(16, room), pulse=bool(self.doing))
        line = Table.grid(padding=(0, 1))
        whole = Text(", ").join(body)
        if len(whole) <= room - 16 - 2:
            line.add_row(count, bar, clock, Text(" ").append(whole))
            yield line
        else:
            line.add_row(count, bar, clock)
            yield line
            yield from _folded(body, options.max_width)

    def _log(self) -> None:
        """A line where there is no terminal."""
        if self.live or not is_first():
            return
        self.logged, self.log_from = time.monotonic(), self.epoch + self.epochs / 10
        line = ", ".join([self._count(), self._clock(), *map(str, self._body())])
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _count(self) -> str:
        at = self.epoch if isinstance(self.epoch, int) else f"{self.epoch:.2f}"
        return f"epoch {at}/{self.epochs}"

    def _clock(self) -> str:
        """Time left, which early stopping may cut short, and time spent."""
        now = time.monotonic()
        spent = _duration(now - self.began)
        if self.over or self.doing or self.seconds_per_epoch is None:
            return f"took {spent}" if self.over else ", ".join(filter(None, (spent, self.doing)))
        left = self.seconds_per_epoch * (self.epochs - self.epoch) - (now - self.seen)
        most = "at most " if self.may_stop else ""
        return f"{most}{_duration(max(left, 0))} left, {spent} so far"

    def _body(self) -> list[Text]:
        lead = ("warning: " * (not i) + warning for i, warning in enumerate(self.warnings))
        return [*(Text(part, "bold yellow") for part in lead), *map(Text, self.scores)]


def _folded(parts: Sequence[Text], width: int) -> list[Text]:
    """Lines of as many of the parts as there is room for."""
    lines: list[Text] = []
    for part in parts:
        if lines and len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] = Text(", ").join([lines[-1], part])
        else:
            lines.append(part)
    return lines


class Compilation:
    """How long JAX has been compiling, by the events that it reports."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def __call__(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.monotonic()
            start = end - duration_secs
            while self.spans and self.spans[-1][0] >= start:
                self.spans.pop()  # a part of this one
            self.spans.append((start, end))

    def since(self, start: float) -> float:
        return sum(max(0.0, end - max(start, begin)) for begin, end in self.spans)


def _warnings(
    train: Mapping[str, float], solves: Mapping[str, Mapping[str, float]], bad_steps: float
) -> Iterator[str]:
    lost = {name: 1 - s["converged"] for name, s in solves.items() if s.get("converged", 1) < 1}
    if lost:
        shares = ", ".join(f"{name} {percent(share)}" for name, share in lost.items())
        yield f"not converged: {shares}"
    if train.get("backward_converged", 1) < 1:
        yield f"backward failed: {percent(1 - train['backward_converged'])}"
    if bad := bad_steps + train.get("bad_steps", 0):
        yield f"{bad:.0f} bad step{'s' * (bad > 1)}"
    if not defined(train.get("loss", 0)):
        yield "the loss is not finite"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _pace(seconds: float) -> str:
    """Of an epoch, in the unit that gives it digits."""
    if seconds < 1:
        return f"{1 / seconds:.{0 if seconds < 0.01 else 1}f} epochs/s"
    return f"{seconds:.1f} s/epoch" if seconds < 100 else f"{seconds / 60:.1f} min/epoch"
