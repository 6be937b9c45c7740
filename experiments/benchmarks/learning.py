"""Why an equilibrium learns at another speed than its map applied a few times: what is measured.

    python -m experiments.benchmarks.learning vqa --variants equilibrium "its map once"
        --rates 3e-4 1e-3 3e-3 --easy-vqa --images 400 --features 32 --epochs 20

Every variant is trained with every rate and seed, without early stopping. After every epoch, on the
same first training rows in so many batches:

    gradient norm    of the loss that is trained, mean over the batches b
    signal           ‖ḡ‖² / E‖g_b‖², the share of a batch's gradient that all batches have in
                     common; ‖ḡ‖² less the noise that is left in the mean of the batches
    radius           spectral radius ρ of J = ∂f/∂z where the map was left, mean and largest row
    amplification    ‖(I − Jᵀ)⁻¹ g‖ / ‖g‖ of the rows, g the gradient of the loss in z*: what the
                     equilibrium makes of the gradient that one application would pass on as it is
    failed           share of the rows whose forward or backward solve failed

Options that are not the command's own go to the experiment. Writes `learning.json`, `learning.md`
and `learning.png` into --run-dir. Only training and validation rows are read.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from deq_fusion_jax.state import ravel
from experiments.benchmarks.iteration import VARIANTS
from experiments.common.cli import Parser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import versions, write_json, write_text
from experiments.common.lock import folder_alone
from experiments.common.text import markdown_table, number, percent, spread
from experiments.datasets import Split
from experiments.reporting import figures
from experiments.reporting.figures.style import Figure
from experiments.run import EXPERIMENTS, Job, experiment
from experiments.training.feed import Resident
from experiments.training.recipe import Recipe
from experiments.training.results import mean_std
from experiments.training.step import TrainState, gradient_of, init_state, solver_start
from experiments.training.task import Task, Variables, evaluate
from experiments.training.warm import Warm, solves_adjoint

BATCHES = 16  # M
Row = dict[str, float]


def parse_args(args: Sequence[str]) -> argparse.Namespace:
    """The command's own options, and `rest`, the experiment's."""
    parser = Parser("benchmarks.learning", __doc__.split("\n")[0], EXPERIMENTS)
    default = ["equilibrium", "its map once", "its map 3 times"]
    parser.add_argument("--variants", nargs="+", default=default, choices=list(VARIANTS))
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    options, rest = parser.own_and_rest(args)
    options.rest = rest
    return options


# --- what is measured --------------------------------------------------------------------------


def measure(task: Task, state: TrainState, rows: Split, batch_size: int) -> Row:
    """See above, on the first rows, in `BATCHES` batches or as many as there are."""
    batches = min(BATCHES, len(rows.labels) // batch_size)
    if batches < 2:
        raise InputError(
            f"--batch-size {batch_size}: expected at most half of the {len(rows.labels)} training "
            "rows, as the noise of gradients is measured between batches"
        )
    index = np.arange(batches * batch_size).reshape(batches, batch_size)
    gradients, seen = jax.device_get(_of_batches(task, state, rows, index))
    found = {"gradient norm": float(np.linalg.norm(gradients, axis=1).mean())}
    found["signal"] = signal_share(gradients)
    if "radius" in seen:
        found |= {"radius": float(seen["radius"].mean()), "max radius": float(seen["radius"].max())}
    if "amplification" in seen:
        found["amplification"] = float(np.median(seen["amplification"]))
        found["max amplification"] = float(seen["amplification"].max())
        found["failed"] = float(seen["failed"].mean())
    return found


def signal_share(gradients: np.ndarray) -> float:
    """(‖ḡ‖² − tr Σ / M) / (‖ḡ‖² − tr Σ / M + tr Σ) of gradients [M, P], at least 0.

    Both estimates are unbiased: Σ is their covariance, with M - 1 in its denominator.
    """
    noise = float(np.var(gradients, axis=0, ddof=1).sum())
    signal = max(float(np.sum(gradients.mean(axis=0) ** 2)) - noise / len(gradients), 0.0)
    return signal / (signal + noise) if signal + noise else float("nan")


@partial(jax.jit, static_argnames="task")
def _of_batches(task: Task, state: TrainState, rows: Split, index: jax.Array) -> Any:
    """Gradients [M, P], and what is seen of rows [M, B], in batches of these row numbers."""

    def of_batch(index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs, labels = jax.tree.map(lambda x: x[index], tuple(rows))
        start = solver_start(task, state, inputs, None)
        gradient = gradient_of(task, state, inputs, labels, start)
        rngs, seen = {"radius": jax.random.key(0)}, {}
        out: Any = task.model.apply(state.variables._asdict(), inputs, rngs=rngs)
        if out.fusion.spectral_radius is not None:
            seen["radius"] = out.fusion.spectral_radius
        if solves_adjoint(task.model):
            seen["amplification"] = amplification(task, state.variables, inputs, gradient.ends)
            failed = gradient.ends.adjoint0.failed > 0
            seen["failed"] = failed | ~out.fusion.stats.converged
        return ravel_pytree(gradient.params)[0], seen

    return jax.lax.map(of_batch, index)


def amplification(task: Task, variables: Variables, inputs: Any, ends: Warm) -> jax.Array:
    """‖u‖ / ‖g‖ per row [B]: u solves u = Jᵀ u + g, so g = u − Jᵀ u, with J at the solution.

    The map is the fusion's cell applied once, without dropout.
    """
    fusion: Any = getattr(task.model, "fusion", None)
    once = Recipe().shallow(task.model)

    def image(z: Any) -> Any:
        prediction: Any = once.apply(variables._asdict(), inputs, z0=z)
        return fusion.state(prediction.fusion)

    _, transposed = jax.vjp(image, ends.z0)
    u, passed = ravel(ends.adjoint0.u), ravel(transposed(ends.adjoint0.u)[0])
    return jnp.linalg.norm(u, axis=1) / jnp.linalg.norm(u - passed, axis=1)


def follow(job: Job, seed: int, epochs: int) -> list[Row]:
    """Trains and measures: a row an epoch, from epoch 0, the first weights, on.

    Beside what `measure` finds there is "validation", the score that would select the epoch.
    """
    task, optimiser, split = job.task, job.optimiser, job.dataset.train
    if not isinstance(split, Split):
        raise InputError("--stream: expected training rows in memory; leave it out")
    if job.schedule.shallow:
        raise InputError("--shallow-epochs: a map that changes is not followed; leave it out")
    assert job.dataset.validation is not None
    size = min(job.schedule.batch_size, len(split.labels))
    state, rows, found = init_state(task, optimiser, split.inputs, seed), Resident(split), []
    batches = len(split.labels) // size
    for epoch in range(epochs + 1):
        if epoch:
            first, end = (epoch - 1) * batches, epoch * batches
            [(_, state, _)] = rows.steps(task, optimiser, state, size, first, end)
        score = evaluate(task, state.learned, job.dataset.validation).metrics[task.monitor]
        found.append({"epoch": epoch, "validation": score, **measure(task, state, split, size)})
    return found


# --- what is written ---------------------------------------------------------------------------


def best_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{variant: the rate whose best validation scores are the highest in the mean over seeds}."""
    scores = best_scores(runs)
    return {name: max(of, key=lambda rate: fmean(of[rate])) for name, of in scores.items()}


def at_best_rates(
    runs: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, float, list[list[Row]]]]:
    """Every variant, its best rate, and the rows of its runs at that rate."""
    for name, rate in best_rates(runs).items():
        chosen = (run for run in runs if (run["variant"], run["rate"]) == (name, rate))
        yield name, rate, [run["rows"] for run in chosen]


def best_scores(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, list[float]]]:
    """{variant: {rate: best validation score of every seed}}."""
    scores: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        best = max(row["validation"] for row in run["rows"])
        scores.setdefault(run["variant"], {}).setdefault(run["rate"], []).append(best)
    return scores


def rates_table(runs: Sequence[Mapping[str, Any]]) -> str:
    scores = best_scores(runs)
    rates = sorted({run["rate"] for run in runs})
    lines = [["best validation score at rate", *(f"{rate:g}" for rate in rates)]]
    for name, found in scores.items():
        lines.append([name, *(spread(mean_std(found.get(rate, []))) for rate in rates)])
    return markdown_table(lines)


def course_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Every variant at its best rate: four epochs of its training, means over the seeds."""
    columns = ("gradient norm", "signal", "radius", "max radius", "amplification")
    lines = [["variant", "rate", "epoch", "validation", *columns, "max amplification", "failed"]]
    for name, rate, chosen in at_best_rates(runs):
        last = len(chosen[0]) - 1
        for epoch in sorted({0, last // 4, last // 2, last}):
            rows = [history[epoch] for history in chosen]

            def mean(key: str, rows: Sequence[Row] = rows) -> float | None:
                return mean_std([row.get(key) for row in rows])["mean"]

            numbers = [number(mean(key)) for key in ("validation", *columns, "max amplification")]
            lines.append([name, f"{rate:g}", str(epoch), *numbers, percent(mean("failed"))])
    return markdown_table(lines, width=200)


def picture(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Every variant at its best rate, means over the seeds, against epochs."""
    keys = ("amplification", "radius", "gradient norm", "signal", "validation")  # the last has all
    panels: dict[str, dict[str, np.ndarray]] = {key: {} for key in keys}
    epochs: list[float] = []
    for name, _, chosen in at_best_rates(runs):
        epochs = [row["epoch"] for row in chosen[0]]
        for key in keys:
            if all(key in row for row in chosen[0]):
                values = [[row[key] for row in history] for history in chosen]
                panels[key][name] = np.mean(values, axis=0)
    return figures.sweep(epochs, panels, "epoch", log=("gradient norm",))


def page(title: str, runs: Sequence[Mapping[str, Any]]) -> str:
    """What learning.md says."""
    seeds = len({run["seed"] for run in runs})
    return (
        f"{title}: validation rows, seeds: {seeds}.\n\n{rates_table(runs)}\n\n"
        f"Every variant at its best rate, means over the seeds:\n\n{course_table(runs)}\n"
    )


def follow_all(options: argparse.Namespace, folder: Path) -> str:
    """Trains and measures everything, writes the folder, and returns the page."""
    module, runs = experiment(options.experiment), list[dict[str, Any]]()
    configs = {
        name: module.parse_args([*options.rest, *VARIANTS[name]]) for name in options.variants
    }
    for name, config in configs.items():
        for rate in options.rates:
            for seed in range(options.seeds):
                config = dataclasses.replace(config, learning_rate=rate, seed=seed)
                job: Job = module.job(config)
                rows = follow(job, seed, job.schedule.epochs)
                runs.append({"variant": name, "rate": rate, "seed": seed, "rows": rows})
                print(f"{name}, rate {rate:g}, seed {seed}: {rows[-1]}", flush=True)
                write_json(folder / "learning.json", {"runs": runs, "versions": versions()})
            jax.clear_caches()
    command = " ".join([options.experiment, *options.rest])
    text = page(f"{job.dataset.description}; {command}", runs)
    write_text(folder / "learning.md", text)
    picture(runs).save(folder / "learning.png")
    return text


@exit_cleanly()
def main() -> None:
    options = parse_args(sys.argv[1:])
    new = Path("runs/learning") / time.strftime("%Y%m%d-%H%M%S")
    with folder_alone(options.run_dir, new) as folder:
        print(follow_all(options, folder))


if __name__ == "__main__":
    main()
