"""`ablation.md`: what the variants score and cost, deeper unrolls, and modalities removed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.text import markdown_table, number, percent, spread
from experiments.models.variants import REFERENCE, VARIANTS
from experiments.reporting.run import SELECTION
from experiments.training.results import mean_std

Row = Mapping[str, Any]
Groups = Mapping[str, Sequence[Row]]

DEEP = 200  # steps that a weight-tied unroll is continued to after its training
COSTS = """\
Means over seeds and test rows: share converged to the tolerance, evaluations of the map or steps
of the unroll, spectral radius of its Jacobian where they ended. Milliseconds of a training step at
the end of training, and megabytes of its temporaries, of seed 0."""


def by_variant(rows: Sequence[Row]) -> Groups:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    return found


def spreads(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """{metric: {variant: {"mean", "std"}}} over the seeds."""
    return {
        metric: {
            name: mean_std([row["metrics"][metric] for row in group])
            for name, group in by_variant(rows).items()
        }
        for metric in rows[0]["metrics"]
    }


def ablation_table(rows: Sequence[Row], title: str, selection: str) -> str:
    """The whole page in Markdown; the scores were selected by `selection`, as in results.json."""
    groups, seeds = by_variant(rows), len({row["seed"] for row in rows})
    about = (
        f"{rows[0]['data']}, test scores, mean ± standard deviation (ddof = 1) over {seeds} seeds."
    )
    parts = [
        (f"{about}  \n{SELECTION[selection]}", scores(groups)),
        (COSTS, costs(groups)),
        (f"Weight-tied unrolls, continued to {DEEP} steps after their training.", deeper(groups)),
        ("A modality missing in every test row.", removed(groups)),
    ]
    lines = [f"# {title}"]
    for text, table in parts:
        if len(table) > 1:
            lines += ["", text, "", markdown_table(table)]
    return "\n".join(lines) + "\n"


def scores(groups: Groups) -> list[list[str]]:
    metrics = _metrics(groups)
    rows = [[name, *_spreads(group, metrics, "metrics")] for name, group in groups.items()]
    return [["variant", *metrics], *rows]


def costs(groups: Groups) -> list[list[str]]:
    def cells(group: Sequence[Row]) -> list[str]:
        converged, steps, radius = (
            statistics.fmean(row[key] for row in group)
            for key in ("converged", "steps", "spectral_radius")
        )
        cost = next(row["cost"] for row in group if row["cost"])
        figures = (steps, 1), (radius, 2), (cost["ms_per_step"], 1), (cost["temporaries_mb"], 1)
        return [percent(converged), *(number(value, digits) for value, digits in figures)]

    header = ["variant", "converged", "steps", "radius", "ms a step", "MB"]
    return [header, *([name, *cells(group)] for name, group in groups.items())]


def deeper(groups: Groups) -> list[list[str]]:
    metrics = _metrics(groups)
    table = [["trained as", *metrics, "converged"]]
    for name, group in groups.items():
        if all(row["deep"] for row in group):
            converged = statistics.fmean(row["deep"]["converged"] for row in group)
            deep = [row["deep"] for row in group]
            table.append([name, *_spreads(deep, metrics, "metrics"), percent(converged)])
    return table


def removed(groups: Groups) -> list[list[str]]:
    """The last metric with each of the modalities gone."""
    metric, table = _metrics(groups)[-1], [["trained as"]]
    for name in (REFERENCE.name, *(variant.name for variant in VARIANTS["missing"])):
        if group := groups.get(name):
            modalities = list(group[0]["without"])
            table[0] = [f"{metric}, trained as", "all there", *(f"no {m}" for m in modalities)]
            gone = [
                spread(mean_std([row["without"][modality][metric] for row in group]))
                for modality in modalities
            ]
            table.append([name, *_spreads(group, [metric], "metrics"), *gone])
    return table


def _metrics(groups: Groups) -> list[str]:
    return list(next(iter(groups.values()))[0]["metrics"])


def _spreads(rows: Sequence[Row], metrics: Sequence[str], key: str) -> list[str]:
    return [spread(mean_std([row[key][metric] for row in rows])) for metric in metrics]
