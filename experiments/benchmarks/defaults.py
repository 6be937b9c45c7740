"""Which one setting of `Anderson` is good everywhere?

    python -m experiments.benchmarks.defaults            (about 25 minutes on two cores)

Every setting of history, ridge and damping is tried on equations of many kinds: both stages of the
fusion at its two initialisations and after training, random tanh maps, rotations, linear maps with
slow modes, attention, graphs, and the adjoint equations of the fusion and the tanh maps. A sample
that misses the tolerance counts as `max_steps` evaluations. The ratio of a setting on an equation
is its mean number of evaluations to that of the setting that does best there; the setting whose
largest ratio is the smallest is the one to have. Of a kind of equations, the ratio is that of the
geometric means.

Writes `results.json` and `table.md` into the run directory and prints the table. "default" is
`Anderson()`; Picard and Broyden are there for orientation and do not count as the best.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from deq_fusion_jax import Anderson, Broyden, Picard
from deq_fusion_jax.gradients import LINEAR_RIDGE
from deq_fusion_jax.state import Map, PyTree
from experiments.benchmarks.equations import FAMILIES, Equation, equations
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
from experiments.common.text import markdown_table, number

ALLOWED = 1.15  # the ratio that a good setting stays below


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluations that settings of Anderson need on equations of many kinds.

    Attributes:
      families: the kinds of equations.
      tolerances: relative residuals to reach; the smallest is where the solves stop.
      histories: of the settings, every one with every ridge and damping.
      ridges: of the settings.
      dampings: of the settings.
      max_steps: the most evaluations, and what a sample counts that does not get there.
      best: how many settings the table has, beside the default.
      run_dir: where to write.
    """

    families: tuple[str, ...] = (
        "fusion", "trained", "tanh", "rotation", "slow", "attention", "graph", "adjoint",
    )  # fmt: skip
    tolerances: tuple[float, ...] = (1e-3, 1e-5)
    histories: tuple[int, ...] = (4, 6, 8, 10, 15)
    ridges: tuple[float, ...] = (1e-1, 1e-2, 1e-4, 1e-8)
    dampings: tuple[float, ...] = (1.0, 0.7)
    max_steps: int = 500
    best: int = 8
    run_dir: Path = Path("runs/defaults")


# --- measuring -------------------------------------------------------------------------------


def evaluations(trace: jax.Array, tolerances: Sequence[float]) -> jax.Array:
    """[tolerances, B] evaluations until the residual is there, 0 where it never is."""
    reached = trace <= jnp.array(tolerances)[:, None, None]
    return jnp.where(jnp.any(reached, axis=1), 1 + jnp.argmax(reached, axis=1), 0)


@partial(jax.jit, static_argnames=("make", "solver", "tolerances"))
def solve(
    make: Callable[..., Map],
    solver: Any,
    tolerances: tuple[float, ...],
    setting: dict[str, Any],
    z0: PyTree,
    args: PyTree,
) -> jax.Array:
    """The evaluations to every tolerance; the smallest is the solver's own."""
    solver = replace(solver, **setting)
    _, stats = solver.solve(make(*args), z0)
    return evaluations(stats.trace, tolerances)


def counts(equation: Equation, config: Config) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Every setting and its `evaluations`."""
    about: dict[str, Any] = {"tol": min(config.tolerances), "max_steps": config.max_steps}

    def measured(solver: Any, **setting: float) -> np.ndarray:
        where = (equation.z0, equation.args)
        return np.asarray(solve(equation.make, solver, config.tolerances, setting, *where))

    for other in (Picard, Broyden):
        yield {"solver": other.__name__}, measured(other(**about, trace=True))
    for history, ridge, damping in settings(config):
        solver = Anderson(history=history, **about, trace=True)
        used = min(ridge, LINEAR_RIDGE) if equation.linear else ridge
        setting = {"history": history, "ridge": ridge, "damping": damping}
        yield {"solver": "Anderson", **setting}, measured(solver, ridge=used, damping=damping)


def settings(config: Config) -> list[tuple[int, float, float]]:
    """(history, ridge, damping) of the grid, and of the default if it is not in it."""
    grid = list(product(config.histories, config.ridges, config.dampings))
    return list(dict.fromkeys([*grid, default()]))


def default() -> tuple[int, float, float]:
    solver = Anderson()
    return solver.history, solver.ridge, solver.damping


def measure(config: Config) -> list[dict[str, Any]]:
    """A row for each equation, tolerance and setting."""
    rows = []
    for family in config.families:
        for equation in track(equations(family), description=family):
            about = {"family": equation.family, "equation": equation.name}
            for setting, found in counts(equation, config):
                for tol, each in zip(config.tolerances, found, strict=True):
                    used = np.where(each > 0, each, config.max_steps)
                    numbers = {"mean": np.mean(used), "max": np.max(used)}
                    converged = np.mean(each > 0)
                    rows.append({**about, "tol": tol, **setting, **numbers, "converged": converged})
            jax.clear_caches()  # hundreds of programs take more memory maps than Linux allows
    return rows


# --- which is the best -----------------------------------------------------------------------


def scores(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each setting's ratios to the best of Anderson's on every equation; best setting first."""
    problem = {id(row): (row["equation"], row["tol"]) for row in rows}
    best: dict[Any, float] = {}
    for row in rows:
        if row["solver"] == "Anderson":
            where = problem[id(row)]
            best[where] = min(row["mean"], best.get(where, np.inf))
    ratios: dict[str, dict[Any, float]] = {}
    for row in rows:
        where = problem[id(row)]
        ratios.setdefault(label(row), {})[where] = row["mean"] / best[where]
    found = [
        {
            "setting": setting,
            "worst": max(each.values()),
            "where": "{} at {:g}".format(*max(each, key=each.__getitem__)),
            "mean": float(np.exp(np.mean(np.log(list(each.values()))))),
            "within": float(np.mean([ratio <= ALLOWED for ratio in each.values()])),
        }
        for setting, each in ratios.items()
    ]
    return sorted(found, key=lambda one: one["worst"])


def by_family(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each kind of equations, the geometric mean of a setting to that of Anderson's best."""
    logs: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        logs.setdefault(row["family"], {}).setdefault(label(row), []).append(np.log(row["mean"]))
    means = {
        family: {setting: float(np.exp(np.mean(x))) for setting, x in each.items()}
        for family, each in logs.items()
    }
    best = {f: min(x for s, x in each.items() if "history" in s) for f, each in means.items()}
    return {f: {s: x / best[f] for s, x in each.items()} for f, each in means.items()}


def label(row: dict[str, Any]) -> str:
    if row["solver"] != "Anderson":
        return row["solver"]
    setting = (row["history"], row["ridge"], row["damping"])
    mark = ", default" if setting == default() else ""
    return "history {}, ridge {:g}, damping {:g}".format(*setting) + mark


def table(results: dict[str, Any]) -> str:
    """The best settings over all equations, and what they need on each, in Markdown."""
    config, found = results["config"], results["scores"]
    shown = [
        one
        for i, one in enumerate(found)
        if i < config["best"] or "default" in one["setting"] or "history" not in one["setting"]
    ]
    kinds = results["families"]
    lines = [["setting", *kinds, "all", f"within {ALLOWED:g}", "largest"]]
    for one in shown:
        setting = one["setting"]
        ratios = [*(each[setting] for each in kinds.values()), one["mean"]]
        cells = [number(ratio, 2) for ratio in ratios]
        lines.append([setting, *cells, f"{one['within']:.0%}", number(one["worst"], 2)])
    worst = [f"- {one['setting']}: {one['where']}" for one in shown]
    text = f"""\
# Settings of Anderson on equations of many kinds

Mean evaluations on an equation by those of the setting that does best there; a sample that misses
the tolerance counts as {config["max_steps"]}. Of a kind, the geometric mean over its equations, by
that of the setting with the smallest; of all, the geometric mean; the share of equations where a
setting is within {ALLOWED:g}; the largest ratio. Below: where, and mean (largest) evaluations.
"""
    tables = [markdown_table(lines, width=160), "\n".join(worst), *details(results, shown)]
    return "\n\n".join([text.strip(), *tables])


def details(results: dict[str, Any], shown: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One table a tolerance."""
    cells: dict[tuple[Any, ...], str] = {}
    for row in results["rows"]:
        text = f"{number(row['mean'], 1)} ({row['max']})"
        cells[row["tol"], row["equation"], label(row)] = text
    for tol in results["config"]["tolerances"]:
        equations = dict.fromkeys(name for at, name, _ in cells if at == tol)
        lines = [["equation", *(f"{i}" for i in range(1, len(shown) + 1))]]
        lines += [
            [name, *(cells[tol, name, one["setting"]] for one in shown)] for name in equations
        ]
        names = "; ".join(f"{i}: {one['setting']}" for i, one in enumerate(shown, 1))
        yield f"## Tolerance {tol:g}\n\n{names}\n\n{markdown_table(lines, width=200)}"


# --- the command -----------------------------------------------------------------------------


def parse_args(args: Sequence[str]) -> Config:
    """The options.

    Raises:
      InputError: one of them cannot be used.
    """
    config = parse(Config(), args, "python -m experiments.benchmarks.defaults")
    for family in config.families:
        if family not in FAMILIES:
            raise InputError(f"--families {family}: expected some of {', '.join(FAMILIES)}")
    if min(config.tolerances, default=0) <= float(jnp.finfo(jnp.float32).eps):
        raise InputError("--tolerances: expected some, above the resolution of float32, 1.2e-07")
    if min(config.histories, default=2) < 2 or not all(r >= 0 for r in config.ridges):
        raise InputError("expected --histories of at least 2 and --ridges of at least 0")
    if not all(0 < damping <= 1 for damping in config.dampings):
        raise InputError("--dampings: expected values in (0, 1]")
    if config.max_steps < 1:
        raise InputError(f"--max-steps {config.max_steps}: at least 1 is needed")
    return config


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    make_folder(config.run_dir, "--run-dir")
    start = time.monotonic()
    rows = measure(config)
    results = {
        "config": config_to_dict(config),
        "machine": {"processor": processor(), **versions()},
        "seconds": time.monotonic() - start,
        "scores": scores(rows),
        "families": by_family(rows),
        "rows": rows,
    }
    write_json(config.run_dir / "results.json", results)
    write_text(config.run_dir / "table.md", table(results))
    print(table(results))
    print(f"Done in {results['seconds']:.0f} s; written to {config.run_dir}.")


if __name__ == "__main__":
    main()
