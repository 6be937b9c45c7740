"""Several runs to read: fusions over seeds in one table, and any runs side by side."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.common.text import markdown_table, number, percent, spread
from experiments.reporting.run import SELECTION, about, flat
from experiments.training.results import Results, compare_floors, compare_rows

BESIDE = 3  # runs whose options stand side by side
WRITTEN = ("run_dir", "resume")  # options that say where, not what
HASH = re.compile(r"[0-9a-f]{32,}")


def comparison_table(rows: Sequence[Results]) -> str:
    """`compare_rows` in Markdown: the test scores, then what they cost."""
    groups = compare_rows(rows)
    metrics = list(dict.fromkeys(name for group in groups for name in group["test"]))
    lines = [f"# {rows[0]['experiment']}: fusions compared, {about(rows[0])}", ""]
    lines += ["Test scores, mean ± standard deviation (ddof = 1) over n seeds.  "]
    lines += [SELECTION[rows[0]["selection"]], ""]
    lines += [_spreads([*groups, *compare_floors(rows)], "test", metrics), ""]
    for part, selection in (("last_epoch", "last"), ("best_on_test", "test")):
        if any(group[part] for group in groups):
            lines += [SELECTION[selection], "", _spreads(groups, part, metrics), ""]
    costs = [
        (
            g["fusion"],
            *(g["solver"].get(name, {}).get("mean") for name in ("converged", "mean_steps")),
            g["parameters"]["mean"],
            g["seconds"]["mean"],
        )
        for g in groups
    ]
    lines += ["Means over the seeds; – where a fusion has no solver.", ""]
    lines.append(_cost_table("fusion", costs))
    if len({tuple(sorted(g["seeds"])) for g in groups}) > 1:
        lines += ["", "The fusions were not run with the same seeds: compare with care."]
    return "\n".join(lines) + "\n"


def _spreads(groups: Sequence[Mapping[str, Any]], part: str, metrics: Sequence[str]) -> str:
    rows = [[g["fusion"], str(g["n"]), *(spread(g[part].get(m)) for m in metrics)] for g in groups]
    return markdown_table([["fusion", "n", *metrics], *rows])


class Run(NamedTuple):
    """A finished run, as its directory has it.

    Attributes:
      name: of its directory.
      config: the options, as in config.json.
      command: the command line that repeats it.
      results: results.json.
      history: the rows of metrics.jsonl.
    """

    name: str
    config: Mapping[str, Any]
    command: str
    results: Results
    history: Sequence[Mapping[str, Any]]


def side_by_side(runs: Sequence[Run], figures: Mapping[str, str] | None = None) -> str:
    """The page in Markdown: scores, cost, what differs in the options, classes, figures, commands.

    `figures` are {"figures/x.png": caption}.
    """
    runs = [run._replace(name=_short(run.name)) for run in runs]
    lines = [f"# {len(runs)} run{'s' * (len(runs) > 1)} side by side", ""]
    if any(run.results["data"] == "sample" for run in runs):
        lines += ["Scores on sample (synthetic) data show that the code runs, nothing more.", ""]
    what = [["run", "experiment", "data", "fusion", "seed"]]
    for name, *_, r, _ in runs:
        what.append([name, r["experiment"], about(r), r["fusion"], str(r["seed"])])
    lines += [markdown_table(what, left=4), ""]
    for selection in dict.fromkeys(run.results["selection"] for run in runs):
        chosen = [run for run in runs if run.results["selection"] == selection]
        metrics = dict.fromkeys(name for run in chosen for name in run.results["test"])
        scores = [[r.name, *(number(r.results["test"].get(m)) for m in metrics)] for r in chosen]
        lines += ["## Test scores", "", SELECTION[selection], ""]
        lines += [markdown_table([["run", *metrics], *scores]), ""]
    costs = []
    for name, *_, r, _ in runs:
        solver = [(r["solver"] or {}).get(key) for key in ("converged", "mean_steps")]
        costs.append((name, *solver, r["parameters"], r["seconds"]))
    lines += ["## Solver and cost", "", _cost_table("run", costs), ""]
    differences = _differences(runs)
    if len(differences) > 1 and len(differences[0]) > 1:
        lines += ["## Options that differ", "", markdown_table(differences), ""]
    if len(classes := _classes(runs)) > 1:
        lines += ["## F1 of the classes, test", "", markdown_table(classes), ""]
    for path, caption in (figures or {}).items():
        lines += [f"![{caption}]({path})", ""]
    lines += ["## Commands", ""]
    for run in runs:
        lines += [f"{run.name}:", "", "```", run.command, "```", ""]
    return "\n".join(lines)


def _cost_table(head: str, rows: Iterable[tuple]) -> str:
    """(name, share converged, mean steps, parameters, seconds) of each row."""
    lines = [[head, "converged", "mean steps", "parameters", "seconds"]]
    for name, converged, steps, size, seconds in rows:
        cost = [percent(converged), number(steps, 1), number(size, 0), number(seconds, 1)]
        lines.append([name, *cost])
    return markdown_table(lines)


def _differences(runs: Sequence[Run]) -> list[list[str]]:
    """Every option that is not the same in all of them, less where they were written.

    A row an option; a row a run where there are many, as everywhere else on the page.
    """
    options = [dict(flat(run.config)) for run in runs]
    names = dict.fromkeys(name for found in options for name in found)
    values = {name: [found.get(name, "–") for found in options] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    rows = [[name, *map(_short, values[name])] for name in differ if name not in WRITTEN]
    if len(runs) <= BESIDE:
        return [["option", *(run.name for run in runs)], *rows]
    return [list(line) for line in zip(["run", *(run.name for run in runs)], *rows, strict=True)]


def _short(value: str) -> str:
    """With twelve characters of a hash, which tell it from others."""
    return HASH.sub(lambda found: found[0][:12], value)


def _classes(runs: Sequence[Run]) -> list[list[str]]:
    """F1 of every class that a run knows, the largest in the first run that has it first."""
    found = [run.results["classes"] or {} for run in runs]
    names = dict.fromkeys(name for classes in found for name in classes)
    rows = [[n, *(number(classes.get(n, {}).get("f1")) for classes in found)] for n in names]
    return [["class", *(run.name for run in runs)], *rows]
