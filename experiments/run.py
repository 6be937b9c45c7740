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

import contextlib
import dataclasses
import importlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax

from deq_fusion_jax import DEQFusion
from experiments.common.files import (
    append_text,
    config_to_dict,
    plain,
    set_aside,
    write_json,
    write_text,
)
from experiments.common.page import page
from experiments.common.stopping import StoppedError, StopRequest
from experiments.datasets import Dataset
from experiments.reporting import figures
from experiments.reporting.run import print_results, report_markdown
from experiments.training.checkpoint import Checkpoints
from experiments.training.config import CommonConfig, begin_run, command_line, opened_run
from experiments.training.devices import by_the_first, is_first, joined, log, mesh_of, shard_model
from experiments.training.metrics import Metrics, Results, per_class_f1
from experiments.training.progress import Bar
from experiments.training.schedule import Schedule
from experiments.training.task import Evaluation, Task, evaluate
from experiments.training.train import Fitted, fit, refit
from experiments.training.warm import free_bytes, needed_bytes

SAVE_SECONDS = 30  # between two checkpoints; what a crash may cost
OUTCOME = ("results.json", "report.md", "report.html")
EXPERIMENTS = ("mmimdb", "multiomics", "mosi", "features")
TRACED_SAMPLES = 256  # validation rows whose residuals are drawn step by step
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


def execute(experiment: str, job_of: Callable[[Config], Job], config: Config) -> Results:
    """Opens the run directory, makes the job, trains, evaluates the best epoch once on the test
    split, and writes the report.

    Nobody waits for data that are read for a run that is refused, and of one that never began
    nothing is left.
    """
    started = time.monotonic()
    with joined(config.parallel), opened_run(experiment, config) as run_dir:
        job = job_of(config)
        by_the_first(lambda: begin_run(run_dir, experiment, config))
        with mesh_of(config.parallel):
            if config.warm_start:
                task = with_warm_starts(job.task, job.dataset.train.inputs, free_bytes())
                job = job._replace(task=task)
            for note in job.notes:
                log(note)
            log(f"{experiment}: {config.fusion}, seed {config.seed}, {job.dataset.description}")
            outcome = learn(job, config, run_dir)
        results = results_of(job, config, outcome)
        if is_first():
            write_run(run_dir, job, config, outcome, results)
            print_results(results, run_dir)
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
    run_dir: Path, job: Job, config: CommonConfig, outcome: Outcome, results: Results
) -> None:
    """Writes results.json, the pictures and the report."""
    fitted, final = outcome.fitted, outcome.final
    write_json(run_dir / "results.json", results)
    drawn = draw(run_dir / "figures", job, fitted, outcome.on_test)
    text = report_markdown(
        results,
        config_to_dict(config),
        fitted.history,
        command=command_line(job.experiment, config),
        figures=drawn,
        notes=[*_notes(fitted, final, job, config), *job.notes],
    )
    write_text(run_dir / "report.md", text)
    write_text(run_dir / "report.html", page(text, run_dir))


def train(job: Job, config: CommonConfig, run_dir: Path) -> tuple[Fitted, Fitted]:
    """The training that selects the epoch, and the one that is tested: the same, or its refit."""
    task, optimiser, schedule, seed = job.task, job.optimiser, job.schedule, config.seed
    data, validation = job.dataset.stream or job.dataset.train, job.dataset.validation
    assert validation is not None
    test = job.dataset.test if config.official_selection else None
    with stopping(job, run_dir) as stop:
        saved = checkpoints(run_dir, "checkpoints", "metrics.jsonl", *OUTCOME)
        with Bar(schedule.epochs, task.monitor) as show:
            report = _recorder(run_dir / "metrics.jsonl", show, stop.begin)
            how = task, optimiser, data, validation, schedule, seed, saved, report
            watched = None if config.refit else test
            fitted = fit(*how, test=watched, stop=stop, progress=show.part)
        log(f"Training ended: {fitted.ending}.")
        if not config.refit:
            return fitted, fitted
        log(f"Again, on the validation rows too, to epoch {fitted.best_epoch}:")
        saved = checkpoints(run_dir, "refit", "refit.jsonl")
        with Bar(fitted.history[-1]["epoch"]) as show:
            report = _recorder(run_dir / "refit.jsonl", show, stop.begin)
            what = fitted, task, optimiser, job.dataset, schedule, seed, saved, report
            return fitted, refit(*what, test=test, stop=stop)


def checkpoints(run_dir: Path, folder: str, *written: str) -> Checkpoints:
    """Those of a training; where there are none, the files it has written before are kept aside."""
    found = Checkpoints(run_dir / folder, every=SAVE_SECONDS)
    before = [path for name in written if (path := run_dir / name).exists()]
    if before and is_first() and not found.steps():
        kept = ", ".join(f"{path.name} as {set_aside(path).name}" for path in before)
        log(f"Note: {found} holds no checkpoint, so training begins at epoch 0; kept: {kept}.")
    return found


@contextlib.contextmanager
def stopping(job: Job, run_dir: Path) -> Iterator[StopRequest]:
    """Whether Ctrl-C or SIGTERM came; says how to go on with a run that it stopped."""
    every = job.schedule.evaluate_every
    epochs = "this epoch" if every == 1 else f"at most {every} epochs"
    when = "this step" if job.dataset.stream else epochs
    answer = f"saving after {when}; once more ends at once, without saving"
    with StopRequest(answer) as asked:
        try:
            yield asked
        except StoppedError as stopped:
            how = f"the same command with --resume --run-dir {shlex.quote(str(run_dir))}"
            number = asked.number or stopped.number
            raise StoppedError(stopped.saved, how, number) from None


def _recorder(path: Path, show: Bar, begin: Callable[[], None]) -> Callable[..., None]:
    """What writes a row of the history to a file and shows it; before the first one it calls begin.

    A resumed run hands its old rows over again. They stand in the file already; what follows them
    there is of epochs that are trained again.
    """
    lines = path.read_bytes().splitlines(keepends=True) if is_first() and path.exists() else []
    old, same = iter(lines), ""

    def report(row: dict[str, Any]) -> None:
        nonlocal old, same
        begin()
        if is_first():
            line, before = json.dumps(plain(row)) + "\n", next(old, None)
            if before == line.encode():
                same += line
            elif before is None:
                append_text(path, line)
            else:
                write_text(path, same + line)
                old = iter(())
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


def draw(folder: Path, job: Job, fitted: Fitted, on_test: Evaluation) -> dict[str, str]:
    """Writes the pictures of a run; returns {path relative to the run directory: caption}."""
    scores = [{**row, "solver": None} for row in fitted.history]  # the solver has its own
    pictures = {"learning_curve": (figures.learning_curve(scores), "Training, by epoch")}
    if on_test.stats is not None:
        pictures["solver_health"] = (
            figures.solver_health(fitted.history),
            "The solver on the validation rows, from before the first step to the last epoch",
        )
    trace = residuals_by_step(job, fitted)
    if trace is not None:
        pictures["residuals"] = (
            figures.residual_traces(*trace),
            "Relative residual against solver step",
        )
    if on_test.gates:
        pictures["gates"] = (
            figures.gate_strength(on_test.gates),
            "Gate strength per modality, test rows",
        )
    for name, (figure, _) in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
    return {f"figures/{name}.png": caption for name, (_, caption) in pictures.items()}


def residuals_by_step(job: Job, fitted: Fitted) -> tuple[dict[str, np.ndarray], float] | None:
    """Residuals [max_steps, B] of some validation rows and the tolerance; None if not DEQ."""
    fusion = getattr(job.task.model, "fusion", None)
    if not isinstance(fusion, DEQFusion) or not dataclasses.is_dataclass(fusion.solver):
        return None
    solver = dataclasses.replace(fusion.solver, trace=True)
    model = job.task.model.clone(fusion=fusion.clone(solver=solver))
    validation = job.dataset.validation
    assert validation is not None
    inputs = {name: x[:TRACED_SAMPLES] for name, x in validation.inputs.items()}
    variables = jax.device_get(fitted.best._asdict())  # off the mesh
    prediction: Any = jax.jit(model.apply)(variables, inputs)
    trace = np.asarray(prediction.fusion.stats.trace)
    return {f"{trace.shape[1]:,} validation rows": trace}, solver.tol


def _solver_summary(result: Evaluation) -> Metrics | None:
    if result.stats is None:
        return None
    return {
        "converged": float(result.stats.converged.mean()),
        "mean_steps": float(result.stats.steps.mean()),
        "residual": float(result.stats.residual.max()),
    }


def _notes(fitted: Fitted, final: Fitted, job: Job, config: CommonConfig) -> list[str]:
    notes = [f"The best epoch by validation {job.task.monitor} is {fitted.best_epoch}."]
    last, bad = fitted.history[-1], sum(row["train"].get("bad_steps", 0) for row in fitted.history)
    notes.append(f"Training ended after epoch {last['epoch']}: {fitted.ending}.")
    if bad:
        what = "had no finite gradient, or inputs out of all range, and changed nothing"
        notes.append(f"{bad:.0f} steps {what}.")
    if final is not fitted:
        notes.append(
            "The test scores are of a second training, on the validation rows too, to that epoch."
        )
    elif config.refit:
        notes.append("The training on all rows broke down; the test scores are of the first one.")
    return notes
