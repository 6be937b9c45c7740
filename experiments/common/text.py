"""Numbers and tables as text, in Markdown. An undefined number (None, NaN) is "–"."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import TypeGuard

from rich.cells import cell_len


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


def note(text: str) -> str:
    """Something to know, without its full stop, as a command prints it: within 80 columns."""
    return textwrap.fill(
        f"Note: {text}.",
        80,
        subsequent_indent=" " * 6,
        break_long_words=False,  # paths stay one word
        break_on_hyphens=False,
    )


def markdown_table(lines: Sequence[Sequence[str]], left: int = 1, width: int | None = None) -> str:
    """Aligned columns, header first, the first `left` flush left; cut at a `width`, if given."""
    pieces = []
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    for cells in blocks(escaped, width):
        widths = [max(3, *map(cell_len, column)) for column in zip(*cells, strict=True)]
        rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
        padded = (_padded(line, widths, left) for line in (cells[0], rule, *cells[1:]))
        pieces.append("\n".join(f"| {' | '.join(line)} |" for line in padded))
    return "\n\n".join(pieces)


def _padded(line: Sequence[str], widths: Sequence[int], left: int) -> Iterator[str]:
    """As a terminal shows them, where a Chinese character takes two places."""
    for i, (cell, width) in enumerate(zip(line, widths, strict=True)):
        pad = " " * (width - cell_len(cell))
        yield cell + pad if i < left else pad + cell


def blocks(lines: Sequence[Sequence[str]], width: int | None) -> Iterator[list[list[str]]]:
    """A table cut by columns into pieces within `width`, each led by the first column."""
    first, *columns = zip(*lines, strict=True)
    block = [first]
    room = math.inf if width is None else width
    for column in columns:
        wide = sum(max(map(cell_len, c)) + 3 for c in (*block, column))
        if len(block) > 1 and wide >= room:
            yield [list(line) for line in zip(*block, strict=True)]
            block = [first]
        block.append(column)
    yield [list(line) for line in zip(*block, strict=True)]
