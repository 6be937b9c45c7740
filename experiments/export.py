"""A trained run as one file: its program and weights, for any number of rows, CPU, CUDA and TPU.

    python -m experiments.export RUN_DIR            (writes RUN_DIR/model.zip)

The file holds a program of `jax.export` and `about.json`. `python -m experiments.predict` runs it,
and so can anything that has JAX: none of the project's code is needed. Where `about.json` has
`prepare`, the program takes (x - mean) / deviation of every modality, computed in float64, as
float32; a value that is not known (NaN) is 0 there, unless its whole position is NaN.
"""

import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import tyro
from jax import export as jax_export

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import read_json, versions
from experiments.datasets.features import Recipe
from experiments.run import EXPERIMENTS, Job, experiment
from experiments.training.checkpoint import Checkpoints
from experiments.training.run_directory import options_of, saved_config
from experiments.training.task import Variables, evaluate
from experiments.training.train import selected

PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A trained run as one file.

    Attributes:
      run_dir: the directory of a finished run.
      out: where to write; by default model.zip in the run directory.
    """

    POSITIONAL: ClassVar = ("run_dir",)

    run_dir: tyro.conf.Positional[Path | None] = None
    out: Path | None = None


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.export")
    if config.run_dir is None:
        raise InputError("no run given; name the directory of a finished run")
    return config


def run_again(run_dir: Path) -> tuple[Job, Any]:
    """The job and options of a finished run, made anew by its own command."""
    saved = saved_config(run_dir)
    if saved is None or not (run_dir / "results.json").exists():
        raise InputError(f"{run_dir} holds no finished run; give the directory of one")
    if saved.get("experiment") not in EXPERIMENTS:
        raise InputError(f"{run_dir} holds a run of {saved.get('experiment')!r}, not of ours")
    chosen = experiment(saved["experiment"])
    config = chosen.parse_args(options_of(saved))
    if config.__dict__.get("data_sha256", "") != saved["config"].get("data_sha256", ""):
        raise InputError(f"the data have changed since {run_dir} was trained; bring them back")
    return chosen.job(config), config


def restored(job: Job, config: Any, run_dir: Path) -> Variables:
    """The variables that were tested, which have to give the test scores of results.json."""
    task = dataclasses.replace(job.task, warm_start=config.warm_start)
    what = task, job.optimiser, job.dataset.train.inputs, config.seed
    expected = read_json(run_dir / "results.json")["test"]
    for folder in ("refit", "checkpoints"):
        variables = selected(*what, Checkpoints(run_dir / folder))
        if variables:
            scores = evaluate(job.task, variables, job.dataset.test).metrics
            if all(np.isclose(scores[name], value) for name, value in expected.items()):
                return variables
    raise InputError(f"no checkpoint in {run_dir} gives the test scores of its results.json")


def program(job: Job, variables: Variables) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Inputs as those of the data set → {"prediction", and of a solver "converged", …} per row."""

    def predict(inputs: dict[str, Any]) -> dict[str, Any]:
        found: Any = job.task.model.apply(variables._asdict(), inputs, train=False)
        out = {"prediction": job.task.probabilities(found.logits)}
        if (stats := found.fusion.stats) is not None:
            out |= {"converged": stats.converged, "steps": stats.steps, "residual": stats.residual}
        return out

    return predict


def preparation(recipe: Recipe | None) -> dict[str, Any] | None:
    """What about.json says of how the program's inputs are made."""
    if recipe is None:
        return None
    return {
        name: {
            "mean": mean.tolist(),
            "deviation": deviation.tolist(),
            "columns": recipe.known[name].names,
            "words": recipe.known[name].words,
        }
        for name, (mean, deviation) in recipe.moments.items()
    }


def export(run_dir: Path, out: Path) -> None:
    """Writes the file."""
    job, config = run_again(run_dir)
    if not job.dataset.classes and np.ndim(job.dataset.test.labels) > 1:
        raise InputError(
            f"a run of {job.experiment} cannot be exported: its answers are no classes with names, "
            "which predictions could be told by"
        )
    variables = restored(job, config, run_dir)
    examples = job.dataset.test.inputs
    (rows,) = jax_export.symbolic_shape("rows")
    shapes = {
        name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in examples.items()
    }
    exported = jax_export.export(jax.jit(program(job, variables)), platforms=PLATFORMS)(shapes)
    about = {
        "experiment": job.experiment,
        "data": job.dataset.description,
        "classes": job.dataset.classes,
        "several": np.ndim(job.dataset.test.labels) == 2,
        "inputs": {name: [list(x.shape[1:]), str(x.dtype)] for name, x in examples.items()},
        "prepare": preparation(job.recipe),
        "solver": {"tol": config.tol} if config.fusion in ("deq", "weight_tied") else None,
        "versions": versions(),
    }
    partial = out.with_name(f".{out.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("about.json", json.dumps(about, indent=2))
        file.writestr("program.jax", exported.serialize())
    partial.replace(out)


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    assert config.run_dir is not None
    out = config.out or config.run_dir / "model.zip"
    export(config.run_dir, out)
    print(f"Model: {out}, {out.stat().st_size / 1e6:.1f} MB, for {', '.join(PLATFORMS)}")


if __name__ == "__main__":
    main()
