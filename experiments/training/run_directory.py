"""The run directory: who may use it, what it says of its run, and whether that run is done."""

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.common.errors import InputError
from experiments.common.files import config_to_dict, read_json, set_aside, versions, write_json
from experiments.common.lock import folder_alone, is_unused
from experiments.training.config import CommonConfig
from experiments.training.devices import by_the_first


@contextlib.contextmanager
def opened_run(experiment: str, config: CommonConfig) -> Iterator[Path]:
    """The run directory, for this run alone: a new one, or with `resume` the one to go on with.

    Nothing in it is changed before `begin_run`. Of several processes the first one alone opens it,
    and all of them end where it may not.

    Raises:
      InputError: another process has the directory; it holds another experiment, another
        configuration, or a run that was not to be resumed.
    """
    if config.run_dir is None:
        if config.resume:
            raise InputError("--resume needs --run-dir, the directory of the run to go on with")
        if config.parallel == "processes":
            raise InputError("--parallel processes needs --run-dir, on a disk that all of them see")
    with contextlib.ExitStack() as opened:
        mine = by_the_first(lambda: opened.enter_context(_looked_at(experiment, config)))
        yield mine or config.run_dir.expanduser()  # type: ignore[union-attr]


@contextlib.contextmanager
def _looked_at(experiment: str, config: CommonConfig) -> Iterator[Path]:
    """The run directory, locked, if this run may use it."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.fusion}-seed{config.seed}"
    with folder_alone(config.run_dir, Path("runs") / experiment / name) as run_dir:
        saved = saved_config(run_dir)
        if saved is not None:
            check_same_run(run_dir, saved, experiment, config)
        elif not is_unused(run_dir):
            raise InputError(f"--run-dir {run_dir} is not empty and holds no run; give a new one")
        elif config.resume:
            print(f"Note: there is nothing to resume in {run_dir}; a new run begins.")
        yield run_dir


def begin_run(
    run_dir: Path, experiment: str, config: CommonConfig, schedule: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json; the schedule is what options come to, or a rule where they do not say.

    The results of a shorter training are kept, as results.1.json.
    """
    for partial in run_dir.glob(".*.partial"):  # of a write that was killed
        partial.unlink()
    saved, results = saved_config(run_dir), run_dir / "results.json"
    if saved and is_shorter(saved["config"].get("epochs"), config.epochs) and results.exists():
        set_aside(results)
    settings = {
        "experiment": experiment,
        "command": command_line(experiment, config),
        "config": config_to_dict(config),
        "schedule": schedule,
        "versions": versions(),
    }
    write_json(run_dir / "config.json", settings)
    (run_dir / "figures").mkdir(exist_ok=True)


def saved_config(run_dir: Path) -> dict[str, Any] | None:
    """What config.json of a run directory says; None where there is none."""
    path = run_dir / "config.json"
    if not path.exists():
        return None
    try:
        saved = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give another --run-dir") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
        raise InputError(f"{path} does not describe a run; give another --run-dir")
    return saved


def check_same_run(run_dir: Path, saved: dict, experiment: str, config: CommonConfig) -> None:
    """A run is resumed with the options it began with; only `epochs` may grow."""
    if saved.get("experiment") != experiment:
        raise InputError(
            f"{run_dir} holds a run of experiment {saved.get('experiment')!r}, not {experiment!r}; "
            "give another --run-dir"
        )
    if not config.resume:
        raise InputError(f"{run_dir} holds a run already; add --resume to go on with it")
    free = ("resume", "run_dir", "epochs", "cache_dir", "parallel")
    now = config_to_dict(config)
    for name in sorted((now.keys() | saved["config"].keys()) - set(free)):
        before, after = saved["config"].get(name), now.get(name)
        if before != after:
            raise InputError(
                f"{run_dir} was run with {name} = {before}, not {after}; resume it with the same "
                "options or give another --run-dir"
            )
    if is_shorter(config.epochs, saved["config"].get("epochs")):
        raise InputError(
            f"--epochs {config.epochs}: {run_dir} was run with {saved['config']['epochs']}, which "
            "may only grow"
        )


def finished(experiment: str, config: CommonConfig, run_dir: Path) -> Any:
    """What results.json holds of a run that is there already and was as long; None: there is none.

    Raises:
      InputError: what is there was run with other options.
    """
    saved, results = saved_config(run_dir), run_dir / "results.json"
    if saved is None:
        return None
    check_same_run(run_dir, saved, experiment, config)
    if saved["config"].get("epochs") != config.epochs or not results.exists():
        return None
    try:
        return read_json(results)
    except ValueError as error:
        raise InputError(f"{results} cannot be read ({error}); remove it to run again") from error


def is_shorter(epochs: int | None, others: int | None) -> bool:
    """Whether these are fewer epochs; None: as many as a rule says, which nobody knows here."""
    return epochs is not None and others is not None and epochs < others


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def options_of(saved: Mapping[str, Any]) -> list[str]:
    """The options in the command line that config.json has."""
    return shlex.split(saved["command"])[3:]


def command_line(experiment: str, config: CommonConfig) -> str:
    """The command line that repeats the run."""
    named: list[str] = []
    unnamed: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is False and field.default is True:
            named.append(f"--no-{field.name.replace('_', '-')}")
        if field.name in config.UNSAID or value is None or value is False:
            continue
        words = () if value is True else map(str, value if isinstance(value, tuple) else (value,))
        if field.name in config.POSITIONAL:
            unnamed += words
        else:
            named += [f"--{field.name.replace('_', '-')}", *words]
    return shlex.join(["python", "-m", f"experiments.{experiment}", *unnamed, *named])
