"""The options that every experiment has, and the run directory that they name."""

import contextlib
import dataclasses
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from deq_fusion_jax import Anderson, Implicit
from deq_fusion_jax.baselines import make_fusion
from experiments.common.errors import InputError
from experiments.common.files import config_to_dict, read_json, set_aside, versions, write_json
from experiments.common.lock import folder_alone, is_unused
from experiments.training.devices import Parallel, by_the_first


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """The options that every experiment has.

    Attributes:
      fusion: deq, weight_tied, concat, sum, gmu, lmf, attention; of positions, where the inputs
        have any, tokens, tokens_unrolled, cross_attention; or the name of one modality.
      seed: of the initial weights, the order of the rows, dropout and the validation rows.
      epochs: passes over the training rows, at most.
      run_dir: where to write; by default a new folder under runs/.
      resume: go on with the run in run_dir; where there is none, it begins.
      features: d, the width of the fusion.
      jacobian_weight: γ, weight of the Jacobian penalty (deq, weight_tied, tokens,
        tokens_unrolled).
      tol: relative residual at which the solver is done (the same four).
      max_steps: solver steps, at most (deq, tokens).
      unroll_steps: of weight_tied and tokens_unrolled; None: 10 and 1.
      warm_start: start the solves of a training row where its last ones ended; pays where a row's
        features hardly change between epochs, that is without dropout before the fusion (deq,
        tokens).
      dropout: rate in the encoders.
      learning_rate, weight_decay: of the optimiser.
      average: decay of the running mean of the weights that is evaluated; 0: the weights are.
      patience: evaluations without a better validation score before training stops.
      refit: train once more on the validation rows too, to the epoch that they selected.
      parallel: shard every batch over all devices of this process, or over those of all processes
        that a launcher such as SLURM has started.
      official_selection: report the epoch with the best TEST score as well, as the paper's code
        does; too good to be a result.
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ()  # options that are given without their names
    UNSAID: ClassVar[tuple[str, ...]] = ("resume", "run_dir")  # not in the command that repeats it

    fusion: str = "deq"
    seed: int = 0
    epochs: int = 100
    run_dir: Path | None = None
    resume: bool = False
    features: int = 512
    jacobian_weight: float = 0.1
    tol: float = 1e-3
    max_steps: int = 100
    unroll_steps: int | None = None
    warm_start: bool = False
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    average: float = 0.0
    patience: int = 15
    refit: bool = False
    parallel: Parallel = "none"
    official_selection: bool = False

    def __post_init__(self) -> None:
        eps = float(jnp.finfo(jnp.float32).eps)
        require(self.epochs is None or self.epochs >= 0, "epochs", self.epochs, "0 or more")
        require(self.features >= 1, "features", self.features, "1 or more")
        require(eps <= self.tol < 1, "tol", self.tol, f"from {eps:.1e}, float32's resolution, to 1")
        require(self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        unrolled = self.unroll_steps
        require(unrolled is None or unrolled >= 1, "unroll_steps", unrolled, "1 or more")
        weight = self.jacobian_weight
        require(0 <= weight < float("inf"), "jacobian_weight", weight, "0 or more")
        for name in ("dropout", "average"):  # None: a rule says
            rate = getattr(self, name)
            require(rate is None or 0 <= rate < 1, name, rate, "0 or more and less than 1")
        rate, decay = self.learning_rate, self.weight_decay
        require(0 < rate < float("inf"), "learning_rate", rate, "a number above 0")
        require(0 <= decay < float("inf"), "weight_decay", decay, "0 or more")
        usable = self.patience is None or self.patience >= 1
        require(usable, "patience", self.patience, "1 or more")


@dataclass(frozen=True, kw_only=True)
class PublishedConfig(CommonConfig):
    """The options of an experiment on published data.

    Attributes:
      data_dir: folder of the real data; None: the experiment says what it does then.
      cache_dir: where prepared data are kept; by default ~/.cache/deq_fusion_jax.
      download: fetch the data first.
    """

    data_dir: Path | None = None
    cache_dir: Path | None = None
    download: bool = False


def require(usable: bool, option: str, given: Any, expected: str) -> None:
    """Raises InputError unless `usable`."""
    if not usable:
        raise InputError(f"--{option.replace('_', '-')} {given}: expected {expected}")


def build_fusion(config: CommonConfig, modalities: Sequence[str]) -> nn.Module:
    """The fusion that the options describe."""
    name, options = config.fusion, dict[str, Any]()
    solved, unrolled = name in ("deq", "tokens"), name in ("weight_tied", "tokens_unrolled")
    if config.warm_start and not solved:
        raise InputError(f"--warm-start: --fusion {name} solves nothing; use deq or tokens")
    if config.unroll_steps and not unrolled:
        raise InputError(f"--unroll-steps: use --fusion weight_tied or tokens_unrolled, not {name}")
    if (solved or unrolled or "attention" in name) and config.features % 4:
        raise InputError(f"--features {config.features}: --fusion {name} needs a multiple of 4")
    if solved:
        options["solver"] = Anderson(tol=config.tol, max_steps=config.max_steps)
        # As the paper trains: with few steps. Every step reports the fraction that converged.
        options["gradient"] = Implicit(on_failure="keep")
    if unrolled:
        options["tol"] = config.tol
        if config.unroll_steps:
            options["steps"] = config.unroll_steps
    try:
        return make_fusion(name, config.features, modalities, **options)
    except ValueError as error:
        raise InputError(f"--fusion {config.fusion}: {error}") from error


FusionChange = Callable[[Any], nn.Module]  # what an ablation makes of the fusion of an experiment


def unchanged(fusion: nn.Module) -> nn.Module:
    return fusion


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
