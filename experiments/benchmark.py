"""What do forward and backward of the fusion layer cost, beside other libraries?

    python -m experiments.benchmark            (about half an hour on two cores)
    python -m experiments.benchmark --quick    (a few minutes)

Five parts. `layer`: our two schedules, jaxopt, optimistix, torchdeq, the unrolled iteration and
the floor, on the same weights, inputs and map, and what each of them reached. `training`: a step of
training on the shapes of ROSMAP and MM-IMDB, ours with and without warm starts, and torchdeq.
`profile`: where the time of a solver's step goes. `depth`: memory and time against the number of
steps. `scaling`: cost against batch, channels, modalities, tolerance.
Contenders are interleaved: every round times each of them once, in rotating order.

Writes `benchmark.json`, `benchmark.md`, `figures/` and `summary.md`, the tables without their
details, into the run directory and prints the tables.
PyTorch, torchdeq and optimistix come with the extra `bench`; their rows are left out without it.
"""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import jax
from rich.progress import Progress

from experiments.benchmarks.contenders import floor, jax_contenders, ours, unrolled
from experiments.benchmarks.figures import figures
from experiments.benchmarks.problem import EPSILON, Problem, Shape, make_problem, norm, reaches
from experiments.benchmarks.profile import profiled
from experiments.benchmarks.tables import fits, tables
from experiments.benchmarks.timing import Contender, timings
from experiments.benchmarks.training import LESSONS, Lesson, our_learner, taught
from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import (
    config_to_dict,
    make_folder,
    processor,
    versions,
    write_json,
    write_text,
)
from experiments.reporting.terminal import show

Row = dict[str, Any]
Case = Callable[[], list[Row]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Forward and backward of the fusion layer, timed side by side with other libraries.

    Attributes:
      part: what to measure.
      shapes: batch, channels and modalities of the layers of the parts "layer" and "profile".
      tolerances: relative residuals at which the contenders of "layer" stop.
      rounds: how often everything is timed.
      quick: only the smallest shape, at most 3 rounds, and the beginning of every range.
      seed: of weights and inputs. With 0, plain iteration settles for all samples of the shapes
        above; with most others a sample or two of the narrowest never does.
      run_dir: where to write.
    """

    part: tuple[str, ...] = ("layer", "training", "profile", "depth", "scaling")
    shapes: tuple[Shape, ...] = ((64, 64, 2), (128, 256, 2), (128, 512, 2), (32, 500, 3))
    tolerances: tuple[float, ...] = (1e-3, 1e-5)
    rounds: int = 15
    quick: bool = False
    seed: int = 0
    run_dir: Path = Path("runs/benchmark")


# --- measuring -------------------------------------------------------------------------------


def measure(
    problem: Problem, tol: float, contenders: list[Contender], rounds: int, exact: bool = True
) -> list[Row]:
    """A row for each contender; `exact` compares its gradient with the reference."""
    times = timings(contenders, rounds)
    return [{**times[c.name], **described(problem, tol, c, exact)} for c in contenders]


def described(problem: Problem, tol: float, contender: Contender, exact: bool) -> Row:
    """What a contender did and reached, its time aside."""
    row: Row = {"contender": contender.name, "shape": problem.shape, "tolerance": tol}
    names = ("forward", "backward", "temporaries", "compile_seconds", "settings")
    row |= {name: getattr(contender, name) for name in names}
    if contender.read is None:
        return row
    z, gradient = contender.read(contender.step())
    row["sample_residual"], row["residual"] = problem.residuals(z)
    row["reached"] = reaches(row["residual"], tol) and math.isfinite(norm(gradient))
    if exact:
        row["gradient_error"] = problem.gradient_error(gradient)
    return row


# --- the parts -------------------------------------------------------------------------------


def layer(config: Config) -> list[Case]:
    """Every contender on every shape, at every tolerance."""

    def case(shape: Shape, tol: float) -> list[Row]:
        problem = make_problem(shape, config.seed)
        contenders = jax_contenders(problem, tol)
        if not missing("torch", "torchdeq"):
            from experiments.benchmarks.contenders_torch import torch_contenders

            contenders += torch_contenders(problem, tol)
        evaluations = (contenders[0].forward or 0) + (contenders[0].backward or 0)
        contenders.append(floor(problem, evaluations))
        return measure(problem, tol, contenders, config.rounds)

    return [partial(case, shape, tol) for shape in config.shapes for tol in config.tolerances]


def training(config: Config) -> list[Case]:
    """Epoch after epoch of the same rows, with their features dropped at random and without."""
    tol = 1e-3

    def case(lesson: Lesson) -> list[Row]:
        schedules = product(("joint", "staged"), (False, True))
        learners = [our_learner(lesson, tol, config.seed, *options) for options in schedules]
        if not missing("torch", "torchdeq"):
            from experiments.benchmarks.contenders_torch import torch_learner

            learners.append(torch_learner(lesson, tol, config.seed))
        return taught(lesson, learners, config.rounds)

    small = (("a small layer", 32, (16, 64, 2)),)
    return [
        partial(case, Lesson(*lesson, dropout))
        for lesson in (small if config.quick else LESSONS)
        for dropout in (0.0, 0.3)
    ]


def profile(config: Config) -> list[Case]:
    """What a step of the solver consists of, on every shape."""

    def case(shape: Shape) -> list[Row]:
        return profiled(make_problem(shape, config.seed), config.rounds)

    return [partial(case, shape) for shape in config.shapes]


def depth(config: Config) -> list[Case]:
    """Ours, unrolled, and unrolled with checkpoints, against the number of steps."""
    shape = config.shapes[0] if config.quick else (128, 256, 2)
    tol = 1.01 * EPSILON  # out of reach, so that all steps are taken

    def case(steps: int) -> list[Row]:
        problem = make_problem(shape, config.seed)
        contenders = [
            ours(problem, tol, "joint", max_steps=steps),
            unrolled(problem, steps),
            unrolled(problem, steps, checkpoint=True),
        ]
        rows = measure(problem, tol, contenders, config.rounds, exact=False)
        return [{"steps": steps, **row} for row in rows]

    return [partial(case, steps) for steps in beginning(config, [10, 20, 50, 100, 200])]


def scaling(config: Config) -> list[Case]:
    """Our two schedules, as one quantity grows and the others stay."""
    tol = 1e-3

    def case(axis: str, value: float, shape: Shape, tol: float) -> list[Row]:
        problem = make_problem(shape, config.seed)
        contenders = [ours(problem, tol, schedule) for schedule in ("joint", "staged")]
        rows = measure(problem, tol, contenders, config.rounds, exact=False)
        return [{"axis": axis, "value": value, **row} for row in rows]

    batches = beginning(config, [2**k for k in range(4, 13)])
    widths = beginning(config, [2**k for k in range(6, 12)])
    counts = beginning(config, [2, 4, 8])
    tolerances = beginning(config, [10.0**-k for k in range(1, 7)])
    return [
        *(partial(case, "batch", n, (n, 64, 2), tol) for n in batches),
        *(partial(case, "channels", d, (32, d, 2), tol) for d in widths),
        *(partial(case, "modalities", m, (32, 128, m), tol) for m in counts),
        *(partial(case, "tolerance", tol, (64, 256, 2), tol) for tol in tolerances),
    ]


def beginning(config: Config, values: list[Any]) -> list[Any]:
    return values[:2] if config.quick else values


PARTS: dict[str, Callable[[Config], list[Case]]] = {
    "layer": layer,
    "training": training,
    "profile": profile,
    "depth": depth,
    "scaling": scaling,
}


# --- the command -----------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> Config:
    """The options; `quick` has taken effect in them.

    Raises:
      InputError: one of them cannot be used.
    """
    config = parse(Config(), args, "python -m experiments.benchmark")
    if unknown := [part for part in config.part if part not in PARTS]:
        raise InputError(f"--part {' '.join(unknown)}: choose from {', '.join(PARTS)}")
    if config.rounds < 1:
        raise InputError(f"--rounds {config.rounds}: at least 1 is needed")
    for batch, channels, modalities in config.shapes:
        if min(batch, modalities) < 1 or channels < 8 or channels % 4:
            raise InputError(
                f"--shapes {batch} {channels} {modalities}: expected batch, channels and "
                "modalities, the channels a multiple of 4 from 8, the others at least 1"
            )
    if wrong := [tol for tol in config.tolerances if not EPSILON <= tol < 1]:
        raise InputError(f"--tolerances {wrong[0]}: expected from {EPSILON:.1e} to less than 1")
    if config.quick:
        smallest = min(config.shapes, key=math.prod)
        return replace(config, rounds=min(config.rounds, 3), shapes=(smallest,))
    return config


def missing(*packages: str) -> list[str]:
    return [package for package in packages if find_spec(package) is None]


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    cores = os.cpu_count()
    about = {"processor": processor(), "threads": f"{cores} for JAX; PyTorch's with its settings"}
    peers = ("torch", "torchdeq", "optimistix", "lineax")
    found = {package: metadata.version(package) for package in peers if not missing(package)}
    return {**about, **versions(), **found}


def run(config: Config) -> dict[str, Any]:
    """Measures the parts and writes the run directory; what `benchmark.json` holds."""
    make_folder(config.run_dir, "--run-dir")
    results: dict[str, Any] = {"config": config_to_dict(config), "machine": machine()}
    results["missing"] = missing("torch", "torchdeq", "optimistix")
    # On a GPU float32 products would otherwise be rounded to 10 bits.
    with jax.default_matmul_precision("highest"), Progress() as progress:
        for part in config.part:
            cases = progress.track(PARTS[part](config), description=part)
            results[part] = [row for case in cases for row in case()]
            results["fits"] = fits(results.get("scaling", []))
            write(config.run_dir, results)  # a part that was measured is not lost with the next
    return results


def write(run_dir: Path, results: dict[str, Any]) -> None:
    """The files of a run directory, of the parts that there are so far."""
    drawn = figures(results)
    (run_dir / "figures").mkdir(exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(run_dir / "figures" / f"{name}.png", dpi=150)
    pictures = [f"\n![{name}](figures/{name}.png)\n" for name in drawn]
    write_json(run_dir / "benchmark.json", results)
    write_text(run_dir / "benchmark.md", tables(results) + "".join(pictures))
    # Its headings go under one of README's.
    write_text(run_dir / "summary.md", tables(results, details=False).replace("\n#", "\n##"))


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    results = run(config)
    show(tables(results))
    print(f"Written to {config.run_dir}.")


if __name__ == "__main__":
    main()
