"""What each part of DEQ fusion is worth: the paper's ablation, and what its reviewers asked for.

    python -m experiments.ablation multiomics --seeds 5 --dataset rosmap --data-dir DIR

Every variant differs from the experiment's own DEQ fusion in the one thing that its name says, and
is trained with the same seeds. The folder of the run holds `ablation.json`, one row a variant and
seed, `ablation.md` and `ablation.png`; with the same `--run-dir` a run that was stopped goes on.
"""

import argparse
import dataclasses
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import Progress

from deq_fusion_jax.baselines import WeightTied
from experiments.common.cli import Parser
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import config_to_dict, read_json, versions, write_json, write_text
from experiments.common.lock import folder_alone
from experiments.common.stopping import StoppedError, StopRequest
from experiments.models.variants import REFERENCE, VARIANTS, Variant
from experiments.reporting import figures
from experiments.reporting.ablation import DEEP, ablation_table, spreads
from experiments.reporting.terminal import show
from experiments.run import Job, experiment
from experiments.training.config import CommonConfig, require
from experiments.training.feed import run_epochs
from experiments.training.folds import select
from experiments.training.task import Task, Variables, evaluate
from experiments.training.train import Fitted, refit

EXPERIMENTS = ("multiomics", "features")


# --- one variant and seed ----------------------------------------------------------------------


def trained(
    module: Any, base: CommonConfig, variant: Variant, seed: int, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Trains a variant, looks at the test rows, and measures; a row of `ablation.json`."""
    config = dataclasses.replace(base, seed=seed, **variant.config)
    job: Job = module.job(config, variant.fusion)
    what, test = (job.task, job.optimiser), job.dataset.test
    fitted = select(*what, job.dataset, job.folds, job.schedule, seed, stop=stop)
    if config.refit or job.folds:
        fitted = refit(fitted, *what, job.dataset, job.schedule, seed, stop=stop)
    result = evaluate(job.task, fitted.best, test)
    assert result.stats is not None
    removed = {}
    for name, x in test.inputs.items():
        without = test._replace(inputs=test.inputs | {name: np.full_like(x, np.nan)})
        removed[name] = evaluate(job.task, fitted.best, without).metrics
    return {
        "data": job.dataset.description,
        "variant": variant.name,
        "seed": seed,
        "metrics": result.metrics,
        "epoch": fitted.best_epoch,
        "converged": float(result.stats.converged.mean()),
        "steps": float(result.stats.steps.mean()),
        "spectral_radius": spectral_radius(job.task, fitted.best, test.inputs),
        "without": removed,
        "deep": deepened(job, fitted.best),
        "cost": cost(job, fitted) if seed == 0 else None,
    }


def spectral_radius(task: Task, variables: Variables, inputs: Mapping[str, Any]) -> float:
    """Of the whole map at the state that the solver returns; mean over the rows."""
    rngs = {"radius": jax.random.key(0)}
    prediction: Any = jax.jit(task.model.apply)(variables._asdict(), inputs, rngs=rngs)
    return float(prediction.fusion.spectral_radius.mean())


def deepened(job: Job, variables: Variables) -> dict[str, Any] | None:
    """A weight-tied unroll continued to DEEP steps: its scores, and the share that converges."""
    model: Any = job.task.model
    if not isinstance(model.fusion, WeightTied):
        return None
    deep = model.clone(fusion=model.fusion.clone(steps=DEEP))
    result = evaluate(dataclasses.replace(job.task, model=deep), variables, job.dataset.test)
    assert result.stats is not None
    return {"metrics": result.metrics, "converged": float(result.stats.converged.mean())}


def cost(job: Job, fitted: Fitted, steps: int = 10, rounds: int = 3) -> dict[str, float]:
    """Milliseconds a training step at the end of training, and megabytes of temporaries."""
    train, size = jax.device_put(job.dataset.train), job.schedule.batch_size
    size = min(size, len(train.labels))
    epochs = -(-steps // (len(train.labels) // size))
    arguments = (job.task, job.optimiser, fitted.last, train, size, epochs)
    compiled: Any = run_epochs.lower(*arguments).compile()
    seconds = []
    for _ in range(rounds):
        state = jax.tree.map(lambda x: x.copy(), fitted.last)  # the step takes it over
        start = time.perf_counter()
        jax.block_until_ready(compiled(state, train))
        seconds.append(time.perf_counter() - start)
    done = epochs * (len(train.labels) // size)
    memory = compiled.memory_analysis().temp_size_in_bytes
    return {"ms_per_step": 1e3 * statistics.median(seconds) / done, "temporaries_mb": memory / 1e6}


# --- all of them -------------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The ablation's own options, and the rest, which are the experiment's."""
    description = "Trains variants of an experiment's DEQ fusion and prints one table."
    parser = Parser("ablation", description, EXPERIMENTS)
    parser.add_argument("--parts", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    return parser.own_and_rest(args)


def run(options: argparse.Namespace, rest: list[str]) -> str:
    """Trains what is missing, writes the folder, and returns the table."""
    module = experiment(options.experiment)
    base: CommonConfig = module.parse_args(rest)
    require(base.parallel == "none", "parallel", base.parallel, "none, as one device is measured")
    new = Path("runs/ablation") / time.strftime("%Y%m%d-%H%M%S")
    with folder_alone(options.run_dir, new) as folder:
        rows = train_all(options, base, folder)
        title = f"{options.experiment}: variants of DEQ fusion"
        table = ablation_table(rows, title, "refit" if base.refit else "validation")
        write_text(folder / "ablation.md", table)
        figures.ablation(spreads(rows), REFERENCE.name).savefig(folder / "ablation.png", dpi=150)
    print(f"Folder: {folder}")
    return table


def train_all(
    options: argparse.Namespace, base: CommonConfig, folder: Path
) -> list[dict[str, Any]]:
    """The rows of ablation.json; trains what is missing, and writes it with every one.

    Raises:
      StoppedError: Ctrl-C or SIGTERM came.
    """
    module = experiment(options.experiment)
    settings = {"experiment": options.experiment, "config": config_to_dict(base)}
    rows = finished(folder / "ablation.json", settings)
    done = {(row["variant"], row["seed"]) for row in rows}
    variants = [REFERENCE, *(v for part in options.parts for v in VARIANTS[part])]
    trainings = [(variant, seed) for variant in variants for seed in range(options.seeds)]
    answer = "after this epoch, and what is trained is saved; once more ends at once"
    with Progress() as progress, StopRequest(answer) as stop:
        bar = progress.add_task("", total=len(trainings))
        stop.begin()
        for variant, seed in trainings:
            progress.update(bar, description=f"{variant.name}, seed {seed}")
            if (variant.name, seed) not in done:
                try:
                    rows.append(trained(module, base, variant, seed, stop))
                except StoppedError as stopped:
                    saved = f"{len(rows)} of {len(trainings)} trainings are saved"
                    how = f"the same command with --run-dir {shlex.quote(str(folder))}"
                    raise StoppedError(saved, how, stop.number or stopped.number) from None
                settings["versions"] = versions()
                write_json(folder / "ablation.json", {**settings, "rows": rows})
            progress.advance(bar)
            if seed == options.seeds - 1:
                jax.clear_caches()  # the compiled programs of all variants are more than fit
    return rows


def finished(path: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run that was stopped.

    Raises:
      InputError: they were made with other options, or cannot be read.
    """
    if not path.exists():
        return []
    try:
        saved = read_json(path)
        same = all(saved[name] == value for name, value in settings.items())
        rows = saved["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give another --run-dir") from error
    if not same:
        raise InputError(f"{path} was made with other options; give another --run-dir")
    return rows


@exit_cleanly()
def main() -> None:
    options, rest = parse_args(sys.argv[1:])
    show(run(options, rest))


if __name__ == "__main__":
    main()
