"""What one sees of a run: on terminals of several widths, and in a log file."""

import io
import time
import types

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments.training import progress
from experiments.training.progress import Bar

CALM = {"loss": 0.5, "converged": 1.0, "backward_converged": 1.0, "bad_steps": 0.0}
TROUBLE = {"loss": 0.5, "converged": 0.8, "backward_converged": 0.25, "bad_steps": 3.0}


def row(epoch, train=CALM, converged=1.0):
    solver = {"converged": converged, "mean_steps": 12.25}
    train = train if epoch else {}
    return {"epoch": epoch, "validation": {"macro_f1": 0.75}, "solver": solver, "train": train}


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, to be set."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


def compiled(seconds):
    """JAX reports, after tracing one within another, what it has compiled."""
    for part in (seconds / 2, seconds):
        jax.monitoring.record_event_duration_secs(
            "/jax/core/compile/backend_compile_duration", part
        )


class Shown:
    """A bar on a console, and what is on it."""

    def __init__(self, clock, width, epochs=40, terminal=True):
        self.clock, self.file = clock, io.StringIO()
        self.console = Console(
            width=width, file=self.file, force_terminal=terminal, color_system=None
        )
        self.bar = Bar(epochs, "macro_f1", may_stop=True, console=self.console)

    def run(self, epochs, train=CALM, converged=1.0):
        """3 s an epoch, after 20 s of compilation."""
        with self.bar:
            self.bar(row(0))
            self.bar.part(0.0, dict)
            self.clock.now += 20
            compiled(20)
            for epoch in epochs:
                self.clock.now += 3
                self.bar.part(float(epoch), dict)
                self.bar(row(epoch, train, converged))
            return self.lines()

    def lines(self):
        sheet = Console(width=self.console.width, file=io.StringIO(), color_system=None)
        sheet.print(self.bar)
        return [line.rstrip() for line in sheet.file.getvalue().splitlines()]


def test_it_says_what_is_compiled(clock):
    shown = Shown(clock, 80)
    with shown.bar:
        assert shown.lines() == ["epoch 0/40 ━━━━━━━━━━━━━━━━ 0:00, compiling the evaluation …"]
        shown.bar(row(0))
        shown.bar.part(0.0, dict)
        clock.now += 75
        head, scores = shown.lines()
        assert head == "epoch 0/40 ━━━━━━━━━━━━━━━━ 1:15, compiling the training step …"
        assert scores == "macro-f1 0.750, 12.2 solver steps"
        shown.bar.part(1.0, dict)
        assert "compiling" not in "".join(shown.lines())


def test_time_left_comes_first_and_leaves_compilation_out(clock):
    head, scores = Shown(clock, 80).run(range(1, 11))
    assert head == "epoch 10/40 ━━━━             at most 1:30 left, 0:50 so far"
    assert scores == "loss 0.500, macro-f1 0.750, 12.2 solver steps, 3.0 s/epoch"


def test_jax_says_how_long_it_compiles():
    """No longer than the clock says: what is traced within another trace is counted once."""
    with Bar(1, console=Console(file=io.StringIO())) as bar:
        began = time.monotonic()
        within = jax.jit(lambda x: x + 1)
        jax.jit(lambda x: within(within(2 * x)))(jnp.ones(3)).block_until_ready()
        assert 0 < bar.compilation.since(began) <= time.monotonic() - began
    spans = list(bar.compilation.spans)
    jax.jit(lambda x: 3 * x)(1.0)
    assert bar.compilation.spans == spans  # it listens no longer


def test_a_resumed_run_is_timed_from_where_it_goes_on(clock):
    shown = Shown(clock, 200)
    with shown.bar:
        for epoch in range(21):
            shown.bar(row(epoch))
        shown.bar.part(20.5, dict)
        clock.now += 10
        shown.bar(row(21))
        (line,) = shown.lines()
    assert "epoch 21/40" in line and "at most 6:20 left" in line and "20.0 s/epoch" in line


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_warnings_come_before_scores_and_nothing_is_cut(clock, width):
    lines = Shown(clock, width).run([1, 2], TROUBLE, 0.9)
    assert max(map(len, lines)) <= width
    text = " ".join(lines)
    places = [
        text.index(part)
        for part in (
            "epoch 2/40", "at most 1:54 left", "0:26 so far", "warning: not converged:",
            "validation 10.0", "training 20.0 %", "backward failed: 75.0 %", "6 bad steps",
            "loss 0.500", "macro-f1 0.750", "12.2 solver steps", "3.0 s/epoch",
        )
    ]  # fmt: skip
    assert places == sorted(places)
    assert len(lines) == {40: 7, 80: 4, 120: 3, 200: 2}[width]
    assert width == 40 or lines[1].startswith("warning: ")


@pytest.mark.parametrize(("seconds", "pace"), [(0.02, "50.0 epochs/s"), (300.0, "5.0 min/epoch")])
def test_the_rate_has_digits(clock, seconds, pace):
    shown = Shown(clock, 200)
    with shown.bar:
        shown.bar(row(0))
        shown.bar.part(0.0, dict)
        clock.now += seconds
        shown.bar(row(1))
        assert shown.lines()[0].endswith(pace)


def test_within_an_epoch_what_its_steps_saw_is_shown(clock):
    shown = Shown(clock, 80)
    with shown.bar:
        shown.bar(row(0))
        for epoch in (0.0, 0.25, 0.5):
            shown.bar.part(epoch, lambda: TROUBLE)
            clock.now += 5
        assert shown.lines()[0].startswith("epoch 0.50/40")
        assert shown.lines()[1].startswith("warning: not converged: training 20.0 %")


def test_a_log_file_gets_few_lines_and_the_last(clock):
    shown = Shown(clock, 80, epochs=4000, terminal=False)
    with shown.bar:
        shown.bar(row(0))
        shown.bar.part(0.0, dict)
        shown.bar.part(1.0, dict)
        for epoch in range(1, 3001):
            clock.now += 0.0625
            shown.bar(row(epoch, TROUBLE if epoch == 1234 else CALM))
    lines = shown.file.getvalue().splitlines()
    assert 10 <= len(lines) <= 30 and not any("\x1b" in line for line in lines)
    assert "compiling the evaluation" in lines[0] and "compiling the training step" in lines[1]
    (warned,) = (line for line in lines if "epoch 1234/4000" in line)
    assert "left, 1:17 so far, warning: not converged: training 20.0 %, backward" in warned
    assert lines[-1] == (
        "epoch 3000/4000, took 3:07, warning: 3 bad steps, loss 0.500, macro-f1 0.750, "
        "12.2 solver steps, 16.0 epochs/s"
    )


@pytest.mark.parametrize("how", [{"force_jupyter": True}, {"force_terminal": True}])
def test_a_notebook_and_a_dumb_terminal_get_lines(how, monkeypatch):
    """Neither can go back to what it has printed."""
    monkeypatch.setenv("TERM", "dumb")
    assert Bar(1, console=Console(file=io.StringIO(), **how)).live is None
    monkeypatch.setenv("TERM", "xterm")
    assert Bar(1, console=Console(file=io.StringIO(), force_terminal=True)).live
