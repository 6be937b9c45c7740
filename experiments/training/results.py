"""What results.json holds, and rows of it compared: every number's spread over seeds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from experiments.common.errors import InputError
from experiments.common.text import defined
from experiments.training.metrics import Metrics

COMMON = ("experiment", "dataset", "data", "selection")  # what the rows of a comparison share


Selection = Literal["validation", "refit", "cross-validation", "test", "last"]


class Results(TypedDict):
    """`results.json`: the outcome of one run."""

    experiment: str
    dataset: str
    data: Literal["sample", "real"]
    fusion: str
    seed: int
    selection: Selection
    test: Metrics
    validation: Metrics
    last_epoch: Metrics  # on test
    best_on_test: Metrics | None  # of the epoch with the best TEST score, where it was asked for
    classes: Mapping[str, Metrics] | None  # "f1" and "support" of each on test; None: no classes
    floors: Mapping[str, Metrics]  # test scores of simpler models: what a fusion has to beat
    # converged (fraction), mean_steps, residual; of parts of the rows as "mean_steps, PART"; None:
    # nothing is solved
    solver: Metrics | None
    parameters: int
    seconds: float


def compare_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per fusion, over seeds: every number becomes {"mean", "std"}, std with ddof = 1.

    std is None for a single seed; both are None where a seed's number is undefined.
    """
    if not rows:
        raise InputError("no results to compare: expected one results.json row or more")
    for key in COMMON:
        values = sorted({str(row[key]) for row in rows})
        if len(values) > 1:
            raise InputError(f"rows with {key} {' and '.join(values)} cannot be compared; pick one")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["fusion"], []).append(row)
    return [_over_seeds(fusion, group) for fusion, group in groups.items()]


def compare_floors(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The floors of the rows in the same form; those of a seed are the same for all its fusions."""
    seeds = {row["seed"]: row.get("floors") or {} for row in rows}
    return [
        {
            "fusion": name,
            "n": len(found),
            "test": {metric: mean_std([s[metric] for s in found]) for metric in found[0]},
        }
        for name in dict.fromkeys(name for floors in seeds.values() for name in floors)
        if (found := [floors[name] for floors in seeds.values() if name in floors])
    ]


def _over_seeds(fusion: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    seeds = [row["seed"] for row in rows]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"fusion {fusion} has a seed twice in {seeds}; give each seed once")
    out = {key: rows[0][key] for key in COMMON} | {"fusion": fusion, "n": len(rows), "seeds": seeds}
    for part in ("test", "validation", "last_epoch", "best_on_test", "solver"):
        found = [row.get(part) or {} for row in rows]
        names = dict.fromkeys(name for numbers in found for name in numbers)
        out[part] = {name: mean_std([numbers.get(name) for numbers in found]) for name in names}
    return out | {key: mean_std([row[key] for row in rows]) for key in ("parameters", "seconds")}


def mean_std(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation (ddof = 1); None where they are not defined."""
    numbers = [value for value in values if defined(value)]
    if not numbers or len(numbers) < len(values):
        return {"mean": None, "std": None}
    std = statistics.stdev(numbers) if len(numbers) > 1 else None
    return {"mean": statistics.fmean(numbers), "std": std}
