"""How `experiments.benchmarks.peers` writes down what it measured."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from experiments.benchmarks.peers_contenders import OPTIONAL
from experiments.common.text import markdown_table, number

Row = dict[str, Any]
NEAR = ("value_near", "gradient_near")
PIP = "`pip install optimistix banax`; banax needs Python 3.12"


def table(results: Row) -> str:
    """What `results.json` holds, in Markdown."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {machine[name]}" for name in ("jax", "jaxopt", *OPTIONAL))
    absent = [name for name in OPTIONAL if machine[name] == "not installed"]
    note = f"\nNote: not installed: {', '.join(absent)}; {PIP}.\n" if absent else ""
    first = [one for one in results["rows"] if one["contender"] == "ours"]
    cases, without = len(first), sum(one["gradient"] is None for one in first)
    return f"""\
# The problems of other libraries' tests

{packages}, python {machine["python"]}; {machine["device"]}, {machine["processor"]}.
{note}
Of {cases} solves, {without} of them without arguments: how many say that they converged; of these,
how many have a value and a gradient as near as is allowed (below); how many took fewer evaluations
of f than ours, or more.

{markdown_table(list(summary_lines(results)))}

Problems. κ: ‖(I − J)⁻¹‖ at z*. value: κ tol (1 + ‖z*‖) / max |z*|, the error that is allowed, as a
residual at the tolerance may have it. gradient: what follows from that and from an adjoint u as
near, relative to the largest, ‖∂g/∂z‖ κ tol (1 + ‖z*‖) + ‖∂f/∂θ‖ κ tol (1 + ‖u‖) with g = uᵀ ∂f/∂θ.

{markdown_table(list(problem_lines(results)), left=2, width=120)}

Values: max |z − z*| / max |z*|, with z* from float64, and evaluations of f where the solver tells.
Where z* is 0 the error is absolute. In float32 where nothing else is said. \\* It does not say that
it converged.

{markdown_table(list(lines(results, value_cell)), width=200)}

Gradients of Σ (z + z²) by the arguments, likewise; – where there are none. \\* The solve does not
say that it converged; ours then has a gradient of 0.

{markdown_table(list(lines(results, gradient_cell)), width=200)}
"""


def problem_lines(results: Row) -> Iterator[list[str]]:
    yield ["problem", "tests of", "numbers", "tolerance", "most steps", "κ", "value", "gradient"]
    for one in results["problems"]:
        shown = [number(one["numbers"]), f"{one['tol']:g}", number(one["max_steps"])]
        shown += [
            number(one[name], 1, "e") for name in ("condition", "allowed", "allowed_gradient")
        ]
        yield [one["problem"], one["source"], *shown]


def summary_lines(results: Row) -> Iterator[list[str]]:
    yield ["", "converged", "values", "gradients", "fewer", "more"]
    by_contender: dict[str, list[Row]] = {}
    for one in results["rows"]:
        by_contender.setdefault(one["contender"], []).append(one)
    base = [effort(one) for one in by_contender["ours"]]
    for contender, rows in by_contender.items():
        counts = [sum(one[name] for one in rows) for name in ("converged", *NEAR)]
        beside = list(zip(map(effort, rows), base, strict=True))
        counts += [sum(a < b for a, b in beside), sum(a > b for a, b in beside)]
        told = any(one["evaluations"] is not None for one in rows)
        yield [contender, *map(str, counts[: None if told else 3]), *([] if told else ["–", "–"])]


def effort(one: Row) -> float:
    """Evaluations; a solve that does not say that it converged has no end."""
    return (one["evaluations"] or 0) if one["converged"] else math.inf


def lines(results: Row, cell: Callable[[Row], str]) -> Iterator[list[str]]:
    """A line for each problem and type, a column for each contender."""
    cells: dict[tuple[str, str], list[str]] = {}
    for one in results["rows"]:
        cells.setdefault((one["problem"], one["type"]), []).append(cell(one))
    yield ["problem", *dict.fromkeys(one["contender"] for one in results["rows"])]
    for (problem, dtype), line in cells.items():
        yield [problem if dtype == "float32" else f"{problem}, {dtype}", *line]


def value_cell(one: Row) -> str:
    counted = "" if one["evaluations"] is None else f" ({number(int(one['evaluations']))})"
    return shown(one["value"]) + counted + mark(one)


def gradient_cell(one: Row) -> str:
    return shown(one["gradient"]) + mark(one)


def shown(found: float | str | None) -> str:
    return found if isinstance(found, str) else number(found, 1, "e")


def mark(one: Row) -> str:
    return "" if one["converged"] else " *"
