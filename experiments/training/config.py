"""The options that every experiment has, and the fusion that they describe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp

from deq_fusion_jax import Anderson, Implicit
from deq_fusion_jax.baselines import make_fusion
from experiments.common.errors import InputError
from experiments.training.devices import Parallel
from experiments.training.recipe import Recipe

SOLVED = ("deq", "tokens")  # the fusions with a solver


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The options that every fusion has.

    Attributes:
      fusion: deq, weight_tied, concat, sum, gmu, lmf, attention; of positions, where the inputs
        have any, tokens, tokens_unrolled, cross_attention; or the name of one modality.
      seed: of the initial weights, the order of the rows, dropout and the validation rows.
      epochs: passes over the training rows, at most.
      run_dir: where to write; by default a new folder under runs/.
      resume: go on with the run in run_dir; where there is none, it begins.
      features: d, the width of the fusion.
      dropout: rate in the encoders.
      learning_rate, weight_decay: of AdamW.
      clip: gradients are clipped to this global norm; 0: they are not.
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
    dropout: float = 0.3
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 0.0
    average: float = 0.0
    patience: int = 15
    refit: bool = False
    parallel: Parallel = "none"
    official_selection: bool = False

    def __post_init__(self) -> None:
        require(self.epochs is None or self.epochs >= 0, "epochs", self.epochs, "0 or more")
        require(self.features >= 1, "features", self.features, "1 or more")
        for name in ("dropout", "average"):  # None: a rule says
            rate = getattr(self, name)
            require(rate is None or 0 <= rate < 1, name, rate, "0 or more and less than 1")
        rate, decay = self.learning_rate, self.weight_decay
        require(0 < rate < float("inf"), "learning_rate", rate, "a number above 0")
        require(0 <= decay < float("inf"), "weight_decay", decay, "0 or more")
        require(0 <= self.clip < float("inf"), "clip", self.clip, "0 or more")
        usable = self.patience is None or self.patience >= 1
        require(usable, "patience", self.patience, "1 or more")


@dataclass(frozen=True, kw_only=True)
class CommonConfig(RunConfig):
    """The options that every experiment has.

    Beside those of every fusion they say how a fusion that is iterated is solved, and trained to
    stay solvable. They are for deq and tokens, and where so said for weight_tied and
    tokens_unrolled, too.

    Attributes:
      tol: relative residual at which the solver is done (and the unrolled ones count as converged).
      max_steps: solver steps, at most.
      unroll_steps: of weight_tied and tokens_unrolled; None: 10 and 1.
      warm_start: start the solves of a training row where its last ones ended; pays where a row's
        features hardly change between epochs, that is without dropout before the fusion.
      jacobian_weight: γ, weight of the Jacobian penalty (of all four).
      shallow_epochs: epochs at the beginning in which the cell is applied shallow_steps times, in
        place of the solve; none of them is selected.
      shallow_steps: how often.
      warmup: steps, from the first with a solve, over which the fusion's learning rate and γ rise
        and the tolerance tightens.
      jacobian_start: γ at their beginning, over γ.
      tol_start: the tolerance at their beginning; None: tol.
      fusion_rate: the fusion's learning rate over learning_rate (of any fusion).
      on_failure: what a row whose forward or backward solve failed adds to the gradients of the
        fusion and of what is before it: keep, what follows from the best iterates, or zero,
        nothing.
    """

    tol: float = 1e-3
    max_steps: int = 100
    unroll_steps: int | None = None
    warm_start: bool = False
    jacobian_weight: float = 0.1
    shallow_epochs: int = 0
    shallow_steps: int = 1
    warmup: int = 0
    jacobian_start: float = 1.0
    tol_start: float | None = None
    fusion_rate: float = 1.0
    on_failure: Literal["keep", "zero"] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        eps = float(jnp.finfo(jnp.float32).eps)
        for name in ("tol", "tol_start"):
            tol = getattr(self, name)
            usable = tol is None or eps <= tol < 1
            require(usable, name, tol, f"from {eps:.1e}, float32's resolution, to 1")
        for name, least in (("shallow_epochs", 0), ("warmup", 0), ("max_steps", 1)):
            require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        left = not self.epochs or self.shallow_epochs < self.epochs
        require(left, "shallow_epochs", self.shallow_epochs, "fewer than --epochs")
        for name in ("shallow_steps", "unroll_steps"):
            steps = getattr(self, name)
            require(steps is None or steps >= 1, name, steps, "1 or more")
        for name in ("jacobian_weight", "jacobian_start", "fusion_rate"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), name, value, "0 or more")
        risen = self.warmup or (self.tol_start is None and self.jacobian_start == 1)
        needs = "1 or more with --tol-start or --jacobian-start, which it is the way from"
        require(bool(risen), "warmup", self.warmup, needs)

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            self.fusion_rate, self.shallow_steps, self.warmup, self.jacobian_start, self.tol_start
        )

    @property
    def shallow(self) -> int:
        """Epochs without a solve: none of a fusion that solves nothing in any."""
        return self.shallow_epochs if self.fusion in SOLVED else 0


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
    solved, unrolled = name in SOLVED, name in ("weight_tied", "tokens_unrolled")
    if config.warm_start and not solved:
        raise InputError(f"--warm-start: --fusion {name} solves nothing; use deq or tokens")
    if config.unroll_steps and not unrolled:
        raise InputError(f"--unroll-steps: use --fusion weight_tied or tokens_unrolled, not {name}")
    if (solved or unrolled or "attention" in name) and config.features % 4:
        raise InputError(f"--features {config.features}: --fusion {name} needs a multiple of 4")
    if solved:
        options["solver"] = Anderson(tol=config.tol, max_steps=config.max_steps)
        options["gradient"] = Implicit(on_failure=config.on_failure)
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
