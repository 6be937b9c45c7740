"""What a floating-point type costs the fusion layer in accuracy, and what it gains in time.

    python -m experiments.benchmarks.types            (about a minute on two cores)

Forward and backward of `DEQFusion` as it is by default, on one set of parameters and inputs, drawn
in float64 and rounded to what is measured: float64 throughout, float32 throughout, and the maps in
bfloat16, over a state in float32 and over one in bfloat16. Residuals and mixing are in float32 at
least, whatever the state is. All stop at one tolerance first, then each near its resolution.
What they found is compared with float64 at tolerance 1e-14.

Writes `types.json` and `types.md` into the folder `--out`, and prints the table.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from deq_fusion_jax import Adjoint, Anderson, DEQFusion, FusionCell, FusionState, SolveStats
from deq_fusion_jax.injection import Injection, Modalities
from deq_fusion_jax.state import PyTree
from experiments.benchmarks.contenders import compiled
from experiments.benchmarks.problem import Shape, norm
from experiments.benchmarks.tables import called
from experiments.benchmarks.timing import Contender, interleaved
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
from experiments.common.text import markdown_table, number, percent

EXACT = 1e-14  # tolerance of the reference
MAX_STEPS = 100
COARSEST = float(jnp.finfo(jnp.bfloat16).eps)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Accuracy and speed of the fusion layer in float64, float32 and bfloat16.

    Attributes:
      shape: batch, channels and modalities of the layer.
      tol: the relative residual at which all types stop, before each goes as far as it can.
      rounds: how often everything is timed.
      seed: of parameters and inputs.
      out: the folder to write into.
    """

    shape: Shape = (128, 256, 2)
    tol: float = 1e-2
    rounds: int = 15
    seed: int = 0
    out: Path = Path("runs/types")


# --- the types -------------------------------------------------------------------------------


class WideStateCell(FusionCell):
    """The maps in `dtype` over a state in float32: rounded on the way in, widened on the way out.

    With `dtype` alone the state has that type as well. This cell needs a z0 in float32.
    """

    def step_modalities(self, z: Modalities, injection: Injection) -> Modalities:
        return _cast(super().step_modalities(_cast(z, self.dtype), injection), jnp.float32)

    def step_fused(self, fused: jax.Array, held: jax.Array, injection: Injection) -> jax.Array:
        return super().step_fused(fused.astype(self.dtype), held, injection).astype(jnp.float32)


class Precision(NamedTuple):
    """Which type is used where.

    Attributes:
      given: of the parameters and inputs.
      state: of z, in which f returns.
      tolerances: to stop at beside the common one, the last near what the types resolve.
      maps: `dtype` of the layer; None computes in the type of what is given.
      cell: `cell_type` of the layer.
    """

    name: str
    given: Any
    state: Any
    tolerances: tuple[float, ...]
    maps: Any = None
    cell: type[FusionCell] = FusionCell


FLOAT64 = Precision("float64", np.float64, np.float64, (1e-4, 1e-12))
FLOAT32 = Precision("float32", np.float32, np.float32, (1e-4, 1e-6))
WIDE_STATE = Precision(
    "bfloat16, float32 state", np.float32, np.float32, (4e-3,), jnp.bfloat16, WideStateCell
)
BFLOAT16 = Precision("bfloat16", np.float32, jnp.bfloat16, (8e-3,), jnp.bfloat16)
PRECISIONS = (FLOAT64, FLOAT32, WIDE_STATE, BFLOAT16)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


# --- the problem and its solutions -----------------------------------------------------------


class Problem(NamedTuple):
    """z_f* and the gradient of ⟨c, z_f*⟩ for a layer of default initialisation, in float64."""

    params: PyTree
    inputs: Any  # {modality: [B, d]} from N(0, 1)
    c: np.ndarray  # [B, d] from N(0, 1)


class Solution(NamedTuple):
    """What a contender found, in numpy.

    Attributes:
      fused: z_f [B, d] in the type of the state.
      stats: of the forward solve.
      gradient: by (parameters, inputs).
      adjoint: how the backward solve ended.
    """

    fused: np.ndarray
    stats: SolveStats
    gradient: tuple[PyTree, PyTree]
    adjoint: Adjoint


def make_problem(shape: Shape, seed: int) -> Problem:
    """The parameters have digits that float32 has not, so that it rounds them as all else."""
    batch, features, modalities = shape
    draw = np.random.default_rng(seed)
    inputs = {f"modality{i}": draw.normal(size=(batch, features)) for i in range(modalities)}
    start = jax.jit(DEQFusion(features).init)(jax.random.key(seed), _cast(inputs, np.float32))
    params = jax.tree.map(
        lambda x: x * (1 + 2.0**-25 * draw.uniform(-1, 1, x.shape)),
        _cast(jax.device_get(start["params"]), np.float64),
    )
    return Problem(params, inputs, draw.normal(size=(batch, features)))


def contender(problem: Problem, precision: Precision, tol: float) -> Contender:
    """Value and gradient in this precision; its step returns what `solution` reads."""
    params, inputs, c = _cast(problem, precision.given)
    solver = Anderson(tol=tol, max_steps=MAX_STEPS)
    layer = DEQFusion(c.shape[1], solver=solver, dtype=precision.maps, cell_type=precision.cell)

    def loss(params: PyTree, inputs: PyTree, adjoint0: Adjoint) -> tuple[jax.Array, Any]:
        z0 = jax.tree.map(jnp.zeros_like, adjoint0.u)
        out: Any = layer.apply({"params": params}, inputs, z0=z0, adjoint0=adjoint0)
        return jnp.sum(out.fused.astype(c.dtype) * c), (out.fused, out.stats)

    x64, exact_products = precision.given is np.float64, jax.default_matmul_precision("highest")
    with jax.enable_x64(x64), exact_products:
        function = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        start = Adjoint.zeros(_cast(FusionState(inputs, c), precision.state))
        return compiled(_name(precision, tol), function, params, inputs, start)


def _name(precision: Precision, tol: float) -> str:
    return f"{precision.name}, tolerance {tol}"


def solution(found: Contender) -> Solution:
    (_, (fused, stats)), (*gradient, adjoint) = jax.device_get(found.step())
    return Solution(fused, stats, tuple(gradient), adjoint)


def reference(problem: Problem) -> Solution:
    """The answer in float64 at tolerance `EXACT`.

    Raises:
      InputError: there is none, as samples of this problem do not converge.
    """
    exact = solution(contender(problem, FLOAT64, EXACT))
    if failed := np.sum(~_converged(exact)):
        raise InputError(
            f"{failed} samples find no equilibrium in float64 to compare with; choose another "
            "--seed, or more channels"
        )
    return exact


def _converged(found: Solution) -> np.ndarray:
    """Which samples [B] have reached the tolerance, forward and backward."""
    return np.asarray(found.stats.converged & (found.adjoint.failed == 0))


# --- measuring -------------------------------------------------------------------------------


def errors(found: Solution, exact: Solution) -> dict[str, float]:
    """‖z_f − z_f*‖ / ‖z_f*‖ over the samples, and ‖g − g*‖ / ‖g*‖ of parameters and inputs."""
    difference = found.fused.astype(np.float64) - exact.fused
    each = np.linalg.norm(difference, axis=1) / np.linalg.norm(exact.fused, axis=1)
    subtract = partial(jax.tree.map, lambda a, b: a.astype(np.float64) - b)
    params, inputs = (
        norm(subtract(got, want)) / norm(want)
        for got, want in zip(found.gradient, exact.gradient, strict=True)
    )
    return {
        "median_error": float(np.median(each)),
        "largest_error": float(np.max(each)),
        "parameter_gradient_error": params,
        "input_gradient_error": inputs,
    }


def described(found: Solution, exact: Solution) -> dict[str, Any]:
    """What a contender reached and how, its time aside; means over the samples."""
    return {
        "state": str(found.fused.dtype),
        **errors(found, exact),
        "converged": np.mean(_converged(found)),
        "steps": np.mean(found.stats.steps),
        "backward_steps": np.mean(found.adjoint.steps),
    }


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for each type and tolerance."""
    problem = make_problem(config.shape, config.seed)
    exact = reference(problem)
    cases = [(precision, config.tol) for precision in PRECISIONS]
    cases += [(precision, tol) for precision in PRECISIONS for tol in precision.tolerances]
    cases = list(dict.fromkeys(cases))
    contenders = [contender(problem, *case) for case in track(cases, "compiling")]
    seconds = interleaved(contenders, config.rounds)
    base = seconds[_name(FLOAT32, config.tol)]
    return [
        {
            "type": precision.name,
            "tolerance": tol,
            **described(solution(one), exact),
            "seconds": (times := seconds[one.name]),
            "median": median(times),
            "ratio": median(a / b for a, b in zip(times, base, strict=True)),
        }
        for (precision, tol), one in zip(cases, contenders, strict=True)
    ]


def table(results: Mapping[str, Any]) -> str:
    """What `types.json` holds, in Markdown."""
    config, machine = results["config"], results["machine"]
    text = f"""\
# Types

Forward and backward of one layer, {called(config["shape"])}, by jax {machine["jax"]} on
{machine["device"]}, {machine["processor"]}.
bfloat16: of maps and state, or of the maps alone. z_f and worst: ‖z_f − z_f*‖ / ‖z_f*‖ of the
median sample and of the worst. gradient and inputs: relative error over all parameters and over all
inputs. z_f* and its gradient: float64 at tolerance {results["exact"]:g}. converged: samples whose
forward and backward solve reached the tolerance. f / vjp: mean evaluations. ms: median of
{config["rounds"]} rounds, interleaved. ratio: to {FLOAT32.name} at tolerance {config["tol"]:g}.
"""
    header = ["type", "tol", "z_f", "worst", "gradient", "inputs"]
    lines = [[*header, "converged", "f / vjp", "ms", "ratio"], *map(_line, results["rows"])]
    return f"{text}\n{markdown_table(lines, width=120)}\n"


ERRORS = ("median_error", "largest_error", "parameter_gradient_error", "input_gradient_error")


def _line(row: Mapping[str, Any]) -> list[str]:
    return [
        row["type"],
        f"{row['tolerance']:g}",
        *(number(row[name], 1, "e") for name in ERRORS),
        percent(row["converged"]),
        "/".join(number(row[name], 1) for name in ("steps", "backward_steps")),
        number(1e3 * row["median"], 1),
        number(row["ratio"], 2),
    ]


# --- the command -----------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> Config:
    """The options.

    Raises:
      InputError: one of them cannot be used.
    """
    config = parse(Config(), args, "python -m experiments.benchmarks.types")
    batch, channels, modalities = config.shape
    if min(batch, modalities) < 1 or channels < 8 or channels % 4:
        raise InputError(
            f"--shape {batch} {channels} {modalities}: expected batch, channels and modalities, "
            "the channels a multiple of 4 from 8, the others at least 1"
        )
    if not COARSEST <= config.tol < 1:
        raise InputError(
            f"--tol {config.tol:g}: expected from {COARSEST:.1e}, the resolution of bfloat16, to "
            "less than 1"
        )
    if config.rounds < 1:
        raise InputError(f"--rounds {config.rounds}: at least 1 is needed")
    return config


def run(config: Config) -> dict[str, Any]:
    """Measures, and writes into `out`; what `types.json` holds."""
    make_folder(config.out, "--out")
    machine = {"processor": processor(), **versions()}
    about = {"config": config_to_dict(config), "machine": machine, "exact": EXACT}
    results = {**about, "rows": measure(config)}
    write_json(config.out / "types.json", results)
    write_text(config.out / "types.md", table(results))
    return results


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    print(table(run(config)))
    print(f"Written to {config.out}.")


if __name__ == "__main__":
    main()
