"""One run of an experiment, from data to report, and the directory it leaves behind.

```
runs/mmimdb/20260102-030405-deq-seed0/
  config.json     experiment, configuration, versions
  running.json    while it runs: host, process, start and command; see `experiments.common.lock`
  metrics.jsonl   one line an evaluation
  results.json    the outcome
  report.md       the same to read, with figures/*.png; report.html: all in one file
  checkpoints/    what --resume goes on from
  refit.jsonl     the same two of a second training on the validation rows too, with --refit
  refit/
```

Nothing in it is thrown away: a file that a training begun anew would overwrite is renamed, to
metrics.1.jsonl or results.1.json.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from experiments.common.files import (
    config_to_dict,
    write_json,
    write_text,
)
from experiments.common.page import page
from experiments.datasets import Dataset
from experiments.datasets.features import Recipe
from experiments.reporting.pictures import confusion_of, draw
from experiments.reporting.run import beaten_by, print_results, report_markdown
from experiments.training.config import CommonConfig
from experiments.training.devices import by_the_first, is_first, joined, log, mesh_of, shard_model
from experiments.training.folds import Folds, select
from experiments.training.metrics import Metrics, most_confused, per_class_f1
from experiments.training.progress import Bar
from experiments.training.recording import checkpoints, recorder, stopping
from experiments.training.results import Results, Selection
from experiments.training.run_directory import begin_run, command_line, opened_run
from experiments.training.schedule import Schedule
from experiments.training.task import Evaluation, Task, Variables, evaluate
from experiments.training.train import Fitted, refit
from experiments.training.warm import free_bytes, needed_bytes

OUTCOME = ("results.json", "report.md", "report.html")
EXPERIMENTS = ("mmimdb", "multiomics", "mosi", "vqa", "relations", "features")
Floors = tuple[Mapping[str, Metrics], Sequence[str]]
Config = TypeVar("Config", bound=CommonConfig)


def experiment(name: str) -> Any:
    """The module of one of EXPERIMENTS, for commands over them: `parse_args`, `job`, `run`."""
    return importlib.import_module(f"experiments.{name}")


class Job(NamedTuple):
    """What an experiment hands over to be run.

    Attributes:
      experiment: its name, as in `python -m experiments.NAME`.
      dataset: with its validation split.
      task, optimiser, schedule: what to learn, and how.
      folds: of the training and validation rows together, for a cross-validation that selects the
        epoch; then all of these rows are trained on. Empty: the validation rows select it.
      floors: further rows of the table, {name: test metrics}, and notes on them, made in so many
        seconds at most.
      notes: sentences for the terminal and the report.
      recipe: how inputs as the data have them become those of `dataset`; None: they are those.
      start: makes the weights to begin with; None: random ones.
      examples: what was predicted for some test rows, as a table for the report.
    """

    experiment: str
    dataset: Dataset
    task: Task
    optimiser: optax.GradientTransformation
    schedule: Schedule
    folds: Folds = ()
    floors: Callable[[float], Floors] = lambda seconds: ({}, ())
    notes: Sequence[str] = ()
    recipe: Recipe | None = None
    start: Callable[[], Variables] | None = None
    examples: Callable[[Evaluation], Sequence[Sequence[str]]] = lambda on_test: ()


def execute(experiment: str, job_of: Callable[[Config], Job], config: Config) -> Results:
    """Opens the run directory, makes the job, trains, evaluates the best epoch once on the test
    split, and writes the report.

    Nobody waits for data that are read for a run that is refused, and of one that never began
    nothing is left.
    """
    started = time.monotonic()
    with joined(config.parallel), opened_run(experiment, config) as run_dir:
        job = job_of(config)
        start = job.start and job.start()
        by_the_first(lambda: begin_run(run_dir, experiment, config, job.schedule._asdict()))
        with mesh_of(config.parallel):
            if config.warm_start:
                task = with_warm_starts(job.task, job.dataset.train.inputs, free_bytes())
                job = job._replace(task=task)
            for note in job.notes:
                log(note)
            log(f"{experiment}: {config.fusion}, seed {config.seed}, {job.dataset.description}")
            outcome = learn(job, config, run_dir, start)
        floors, of_floors = job.floors(outcome.seconds) if is_first() else ({}, ())
        results = results_of(job, config, outcome, floors)
        if is_first():
            rows, monitor = len(job.dataset.test.labels), job.task.monitor
            beaten = beaten_by(results["test"], floors, monitor, rows)
            notes = [*beaten, *_notes(outcome, job), *job.notes, *of_floors]
            write_run(run_dir, job, config, outcome, results, notes)
            print_results(results, run_dir, outcome.fitted.history, notes)
            print(f"Done in {time.monotonic() - started:.0f} s.")
    return results


class Outcome(NamedTuple):
    """What training came to.

    Attributes:
      fitted: the training that selects the epoch.
      final: the one that is tested, the same or its refit.
      on_test: of the selected epoch.
      last_epoch: the test rows after the last epoch.
    """

    fitted: Fitted
    final: Fitted
    on_test: Evaluation
    last_epoch: Evaluation

    @property
    def selected(self) -> Mapping[str, Any]:
        """The row of the history that was selected."""
        rows = self.fitted.history
        return next(row for row in rows if row["epoch"] == self.fitted.best_epoch)

    @property
    def seconds(self) -> float:
        """That training took."""
        both = (self.fitted,) if self.final is self.fitted else (self.fitted, self.final)
        return sum(training.history[-1]["seconds"] for training in both)


def learn(job: Job, config: CommonConfig, run_dir: Path, start: Variables | None = None) -> Outcome:
    """Trains, and evaluates the selected epoch; within the mesh, if there is one."""
    job = job._replace(task=dataclasses.replace(job.task, model=shard_model(job.task.model)))
    fitted, final = train(job, config, run_dir, start)
    log("Evaluating the selected epoch, then drawing the report …")
    on_test = evaluate(job.task, final.best, job.dataset.test)
    last_epoch = evaluate(job.task, final.last.learned, job.dataset.test)
    return Outcome(fitted, final, on_test, last_epoch)


def results_of(
    job: Job, config: CommonConfig, outcome: Outcome, floors: Mapping[str, Metrics]
) -> Results:
    """What results.json holds."""
    fitted, final, on_test, last_epoch = outcome
    labels, names = job.dataset.test.labels, job.dataset.classes
    refitted: Selection = "refit" if final is not fitted else "validation"
    return Results(
        experiment=job.experiment,
        dataset=job.dataset.description,
        data=job.dataset.data,
        fusion=config.fusion,
        seed=config.seed,
        selection="cross-validation" if job.folds else refitted,
        test=on_test.metrics,
        validation=outcome.selected["validation"],
        last_epoch=last_epoch.metrics,
        best_on_test=best_on_test(final.history, job.task.monitor),
        classes=per_class_f1(labels, on_test.probabilities, names) if names else None,
        floors=floors,
        solver=_solver_summary(on_test, job.task.parts(labels)),
        parameters=sum(x.size for x in jax.tree.leaves(final.best.params)),
        seconds=outcome.seconds,
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
    shown = outcome.fitted._replace(best=outcome.final.best)
    drawn = draw(run_dir / "figures", job.task, job.dataset, shown, outcome.on_test)
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
        examples=job.examples(outcome.on_test),
    )
    write_text(run_dir / "report.md", text)
    write_text(run_dir / "report.html", page(text, run_dir))


def train(
    job: Job, config: CommonConfig, run_dir: Path, start: Variables | None = None
) -> tuple[Fitted, Fitted]:
    """The training that selects the epoch, and the one that is tested: the same, or its refit."""
    task, optimiser, schedule, seed = job.task, job.optimiser, job.schedule, config.seed
    test = job.dataset.test if config.official_selection else None
    begun: dict[str, Any] = {"start": start} if start else {}
    with stopping(schedule, bool(job.dataset.stream), run_dir) as stop:
        saved = checkpoints(run_dir, "checkpoints", "metrics.jsonl", *OUTCOME)
        may_stop = schedule.patience is not None
        with Bar(schedule.epochs, task.monitor, may_stop) as show:
            report = recorder(run_dir / "metrics.jsonl", show, stop.begin)
            how = task, optimiser, job.dataset, job.folds, schedule, seed, saved, report
            watched = None if config.refit else test
            fitted = select(*how, test=watched, stop=stop, progress=show.part, **begun)
        log(f"Training ended: {fitted.ending}.")
        if not (config.refit or job.folds):
            return fitted, fitted
        log(f"Again, on the validation rows too, to epoch {fitted.best_epoch}:")
        saved = checkpoints(run_dir, "refit", "refit.jsonl")
        with Bar(fitted.history[-1]["epoch"]) as show:
            report = recorder(run_dir / "refit.jsonl", show, stop.begin)
            what = fitted, task, optimiser, job.dataset, schedule, seed, saved, report
            return fitted, refit(*what, test=test, stop=stop, progress=show.part, **begun)


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


def _solver_summary(result: Evaluation, parts: Mapping[str, np.ndarray]) -> Metrics | None:
    """Of all rows, and of parts of them, {name: [N] bool}."""
    stats = result.stats
    if stats is None:
        return None
    found = {
        "converged": float(stats.converged.mean()),
        "mean_steps": float(stats.steps.mean()),
        "residual": float(stats.residual.max()),
    }
    for name, rows in parts.items():
        found[f"converged, {name}"] = float(stats.converged[rows].mean())
        found[f"mean_steps, {name}"] = float(stats.steps[rows].mean())
    return found


def _notes(outcome: Outcome, job: Job) -> Iterator[str]:
    if not np.isfinite(outcome.selected["validation_loss"]):
        how = "a smaller --learning-rate may help"
        yield f"Warning: The training broke down: no epoch has a finite validation loss; {how}."
    fitted, refitted = outcome.fitted, outcome.final is not outcome.fitted
    yield f"The best epoch by validation {job.task.monitor} is {fitted.best_epoch}."
    yield f"Training ended after epoch {fitted.history[-1]['epoch']}: {fitted.ending}."
    if refitted:
        yield "The test scores are of a second training, on the validation rows too, to that epoch."
