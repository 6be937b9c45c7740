"""One run of an experiment, from data to report, and the directory it leaves behind.

```
runs/mmimdb/20260102-030405-deq-seed0/
  config.json     experiment, configuration, versions
  metrics.jsonl   one line an evaluation
  results.json    the outcome
  report.md       the same to read, with figures/*.png; report.html: all in one file
  checkpoints/    what --resume goes on from
  refit.jsonl     the same two of a second training on the validation rows too, with --refit
  refit/
```
"""

import contextlib
import dataclasses
import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.common.files import config_to_dict, plain, write_json, write_text
from experiments.common.page import page
from experiments.common.stopping import Sigterm, StoppedError
from experiments.datasets import Dataset
from experiments.reporting.pictures import confusion_of, draw
from experiments.reporting.run import print_results, report_markdown
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import CommonConfig, command_line, open_run
from experiments.training.devices import is_first, log, mesh_of, shard_model
from experiments.training.metrics import Metrics, Results, most_confused, per_class_f1
from experiments.training.progress import Bar
from experiments.training.schedule import Schedule
from experiments.training.task import Evaluation, Task, evaluate
from experiments.training.train import Fitted, fit, refit
from experiments.training.warm import free_bytes, needed_bytes

SAVE_SECONDS = 30  # between two checkpoints; what a crash may cost
EXPERIMENTS = ("mmimdb", "multiomics", "mosi", "features")


def experiment(name: str) -> Any:
    """The module of one of EXPERIMENTS, for commands over them: `parse_args`, `job`, `run`."""
    return importlib.import_module(f"experiments.{name}")


class Job(NamedTuple):
    """What an experiment hands over to be run.

    Attributes:
      experiment: its name, as in `python -m experiments.NAME`.
      dataset: with its validation split.
      task, optimiser, schedule: what to learn, and how.
      floors: further rows of the table: {name: test metrics}.
      notes: sentences for the terminal and the report.
      prepare: from the inputs as the data have them to those of `dataset`; traceable.
    """

    experiment: str
    dataset: Dataset
    task: Task
    optimiser: optax.GradientTransformation
    schedule: Schedule
    floors: Mapping[str, Metrics] = {}
    notes: Sequence[str] = ()
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict


def execute(job: Job, config: CommonConfig) -> Results:
    """Trains, evaluates the best epoch once on the test split, and writes the run directory."""
    started = time.monotonic()
    with mesh_of(config.parallel):
        run_dir = open_run(job.experiment, config)
        if config.warm_start:
            task = with_warm_starts(job.task, job.dataset.train.inputs, free_bytes())
            job = job._replace(task=task)
        for note in job.notes:
            log(note)
        log(f"{job.experiment}: {config.fusion}, seed {config.seed}, {job.dataset.description}")
        outcome = learn(job, config, run_dir)
    results = results_of(job, config, outcome)
    if is_first():
        notes = [*_notes(outcome, job, config), *job.notes]
        write_run(run_dir, job, config, outcome, results, notes)
        print_results(results, run_dir, outcome.fitted.history, notes)
        print(f"Done in {time.monotonic() - started:.0f} s.")
    return results


class Outcome(NamedTuple):
    """What training came to.

    Attributes:
      fitted: the training that selects the epoch.
      final: the one that is tested, the same or its refit.
      on_validation, on_test: of the selected epoch.
      last_epoch: the test rows after the last epoch.
    """

    fitted: Fitted
    final: Fitted
    on_validation: Evaluation
    on_test: Evaluation
    last_epoch: Evaluation


def learn(job: Job, config: CommonConfig, run_dir: Path) -> Outcome:
    """Trains, and evaluates the selected epoch; within the mesh, if there is one."""
    job = job._replace(task=dataclasses.replace(job.task, model=shard_model(job.task.model)))
    fitted, final = train(job, config, run_dir)
    log("Evaluating the selected epoch, then drawing the report …")
    assert job.dataset.validation is not None
    on_validation = evaluate(job.task, fitted.best, job.dataset.validation)
    on_test = evaluate(job.task, final.best, job.dataset.test)
    last_epoch = evaluate(job.task, final.last.learned, job.dataset.test)
    return Outcome(fitted, final, on_validation, on_test, last_epoch)


def results_of(job: Job, config: CommonConfig, outcome: Outcome) -> Results:
    """What results.json holds."""
    fitted, final, on_validation, on_test, last_epoch = outcome
    labels, names = job.dataset.test.labels, job.dataset.classes
    ends = [fitted.history[-1], *([final.history[-1]] if final is not fitted else ())]
    return Results(
        experiment=job.experiment,
        dataset=job.dataset.description,
        data=job.dataset.data,
        fusion=config.fusion,
        seed=config.seed,
        selection="refit" if config.refit else "validation",
        test=on_test.metrics,
        validation=on_validation.metrics,
        last_epoch=last_epoch.metrics,
        best_on_test=best_on_test(final.history, job.task.monitor),
        classes=per_class_f1(labels, on_test.probabilities, names) if names else None,
        floors=job.floors,
        solver=_solver_summary(on_test),
        parameters=sum(x.size for x in jax.tree.leaves(fitted.best.params)),
        seconds=sum(row["seconds"] for row in ends),
    )


def write_run(
    run_dir: Path,
    job: Job,
    config: CommonConfig,
    outcome: Outcome,
    results: Results,
    notes: Sequence[str],
) -> None:
    """Writes results.json, the pictures and the report."""
    write_json(run_dir / "results.json", results)
    drawn = draw(run_dir / "figures", job.task, job.dataset, outcome.fitted, outcome.on_test)
    counts = confusion_of(job.dataset, outcome.on_test)
    confused = [] if counts is None else most_confused(counts, job.dataset.classes)
    text = report_markdown(
        results,
        config_to_dict(config),
        outcome.fitted.history,
        command=command_line(job.experiment, config),
        figures=drawn,
        notes=notes,
        confused=confused,
    )
    write_text(run_dir / "report.md", text)
    write_text(run_dir / "report.html", page(text, run_dir))


def train(job: Job, config: CommonConfig, run_dir: Path) -> tuple[Fitted, Fitted]:
    """The training that selects the epoch, and the one that is tested: the same, or its refit."""
    task, optimiser, schedule, seed = job.task, job.optimiser, job.schedule, config.seed
    data, validation = job.dataset.stream or job.dataset.train, job.dataset.validation
    assert validation is not None
    test = job.dataset.test if config.official_selection else None
    saved = Checkpoints(run_dir / "checkpoints", every=SAVE_SECONDS)
    may_stop = schedule.patience is not None
    with Bar(schedule.epochs, task.monitor, may_stop) as show, stopping(run_dir) as stop:
        report = _recorder(run_dir / "metrics.jsonl", show)
        how = task, optimiser, data, validation, schedule, seed, saved, report
        watched = None if config.refit else test
        fitted = fit(*how, test=watched, stop=stop, progress=show.part)
    log(f"Training ended: {fitted.ending}.")
    if not config.refit:
        return fitted, fitted
    log(f"Again, on the validation rows too, to epoch {fitted.best_epoch}:")
    saved = Checkpoints(run_dir / "refit", every=SAVE_SECONDS)
    with Bar(fitted.history[-1]["epoch"]) as show, stopping(run_dir) as stop:
        report = _recorder(run_dir / "refit.jsonl", show)
        what = fitted, task, optimiser, job.dataset, schedule, seed, saved, report
        final = refit(*what, test=test, stop=stop, progress=show.part)
    return fitted, final


@contextlib.contextmanager
def stopping(run_dir: Path) -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came; says how to go on with a run that it stopped."""
    with Sigterm() as came:
        try:
            yield came
        except StoppedError as stopped:
            how = f"the same command with --resume --run-dir {run_dir} goes on"
            raise StoppedError(f"SIGTERM came; {stopped}, and {how}") from None


def _recorder(path: Path, show: Bar) -> Callable[..., None]:
    """What writes a row of the history to a file and shows it."""
    mode = "w"  # a resumed run hands its old rows over again

    def report(row: dict[str, Any]) -> None:
        nonlocal mode
        if is_first():
            with path.open(mode, encoding="utf-8") as file:
                file.write(json.dumps(plain(row)) + "\n")
        mode = "a"
        show(row)

    return report


def best_on_test(history: Sequence[Mapping[str, Any]], monitor: str) -> Metrics | None:
    """The best of the test scores in the history; None where nobody asked for them."""
    seen = [row["test"] for row in history if "test" in row]
    defined = [scores for scores in seen if np.isfinite(scores[monitor])]
    return max(defined, key=lambda scores: scores[monitor], default=None)


def with_warm_starts(task: Task, inputs: dict[str, np.ndarray], free: int | None) -> Task:
    """The task with warm starts, if half the free bytes of the device hold them; says which."""
    needed = needed_bytes(task.model, inputs)
    fits = free is None or needed <= free / 2
    cost = f"{needed / 2**20:.1f} MiB for {len(next(iter(inputs.values())))} rows"
    room = "" if free is None else f", {free / 2**20:.0f} MiB are free"
    log(f"Warm starts are {'on' if fits else 'off'}: {cost}{room}.")
    return dataclasses.replace(task, warm_start=fits)


def _solver_summary(result: Evaluation) -> Metrics | None:
    if result.stats is None:
        return None
    return {
        "converged": float(result.stats.converged.mean()),
        "mean_steps": float(result.stats.steps.mean()),
        "residual": float(result.stats.residual.max()),
    }


def _notes(outcome: Outcome, job: Job, config: CommonConfig) -> list[str]:
    fitted, refitted = outcome.fitted, outcome.final is not outcome.fitted
    notes = [f"The best epoch by validation {job.task.monitor} is {fitted.best_epoch}."]
    notes.append(f"Training ended after epoch {fitted.history[-1]['epoch']}: {fitted.ending}.")
    if refitted:
        notes.append(
            "The test scores are of a second training, on the validation rows too, to that epoch."
        )
    elif config.refit:
        text = "The training on all rows broke down; the test scores are of the first one."
        notes.append(f"Warning: {text}")
    return notes
