"""Numbers and tables as text, in Markdown. An undefined number (None, NaN) is "–"."""

import math
from collections.abc import Iterator, Mapping
from numbers import Integral
from typing import TypeGuard


def defined(value: float | None) -> TypeGuard[float]:
    """Whether there is a number: not None, not NaN, not infinite."""
    return value is not None and math.isfinite(value)


def spread(value: Mapping[str, float | None] | None) -> str:
    mean, std = (value or {}).get("mean"), (value or {}).get("std")
    return number(mean) if std is None else f"{number(mean)} ± {number(std)}"


def number(value: float | None, digits: int = 3, form: str = "f") -> str:
    if not defined(value):
        return "–"
    return f"{value:,}" if isinstance(value, Integral) else f"{value:,.{digits}{form}}"


def percent(fraction: float | None) -> str:
    """Rounded towards 50 %, so that 99.96 % never reads 100.0 %."""
    if not defined(fraction):
        return "–"
    tenths = round(1000 * fraction, 6)
    return f"{(math.floor(tenths) if fraction > 0.5 else math.ceil(tenths)) / 10:.1f} %"


def markdown_table(lines: list[list[str]], left: int = 1, width: int = 80) -> str:
    """Aligned columns, header first, the first `left` of them flush left; cut at `width`."""
    pieces = []
    for cells in blocks([[cell.replace("|", r"\|") for cell in line] for line in lines], width):
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        align = ["<"] * left + [">"] * (len(widths) - left)
        form = "| " + " | ".join(f"{{:{a}{w}}}" for a, w in zip(align, widths, strict=True)) + " |"
        pieces.append("\n".join(form.format(*line) for line in (cells[0], rule, *cells[1:])))
    return "\n\n".join(pieces)


def blocks(lines: list[list[str]], width: int) -> Iterator[list[list[str]]]:
    """A table cut by columns into pieces within `width`, each led by the first column."""
    first, *columns = zip(*lines, strict=True)
    block = [first]
    for column in columns:
        if len(block) > 1 and sum(max(map(len, c)) + 3 for c in (*block, column)) >= width:
            yield [list(line) for line in zip(*block, strict=True)]
            block = [first]
        block.append(column)
    yield [list(line) for line in zip(*block, strict=True)]
