"""How contenders are timed: in turns, round after round, so that all meet the same noise."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.benchmarks.problem import Outcome


@dataclass(frozen=True)
class Contender:
    """One forward and backward, ready to be timed.

    Attributes:
      step: does it, and returns when it is done.
      read: turns what `step` returned into an `Outcome`; None for the floor, which finds nothing.
      forward, backward: evaluations of f and of its vector–Jacobian product, where known.
      temporaries: bytes that the compiled program needs beside its arguments and results.
      compile_seconds: of tracing and compiling it.
      settings: what was chosen for this problem.
    """

    name: str
    step: Callable[..., Any]
    read: Callable[[Any], Outcome] | None = None
    forward: int | None = None
    backward: int | None = None
    temporaries: int | None = None
    compile_seconds: float | None = None
    settings: str = ""


def timed(contender: Contender) -> float:
    """Seconds of one step, begun when the threads of another library have gone to sleep."""
    time.sleep(0.01)
    start = time.perf_counter()
    contender.step()
    return time.perf_counter() - start


def timings(
    contenders: Sequence[Contender], rounds: int, parts: int = 1
) -> dict[str, dict[str, Any]]:
    """By name: seconds of every round, each a `parts`-th of a step, their median, and the ratio.

    The ratio is the median over the rounds of a contender's time by that of the fastest of ours.
    """
    seconds = {
        name: [took / parts for took in times]
        for name, times in interleaved(contenders, rounds).items()
    }
    fastest = min((times for name, times in seconds.items() if name.startswith("ours")), key=median)
    return {
        name: {
            "seconds": times,
            "median": median(times),
            "ratio": median(a / b for a, b in zip(times, fastest, strict=True)),
        }
        for name, times in seconds.items()
    }


def interleaved(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds by contender and round, after a round to warm up."""
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(-1, rounds):
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            took = timed(contender)
            if turn >= 0:
                seconds[contender.name].append(took)
    return seconds
