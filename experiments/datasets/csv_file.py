"""Reading .csv files from outside: with or without a header, empty cells and pandas' row numbers.

A first line with a word in it is a header, and left out. Under a header that begins with an empty
cell the first column numbers the rows, as pandas writes it, and is left out as well.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.numbers import to_float32

UNKNOWN = ("", "NA")


def read_numbers(path: Path) -> np.ndarray:
    """[N, d] float32; NaN where a cell is empty or NA."""
    rows: list[np.ndarray] = []
    for i, (line, cells) in enumerate(_lines(path)):
        wrong = next((cell for cell in cells if _number(cell) is None), None)
        if wrong is None:
            rows.append(to_float32(np.array([_number(cell) for cell in cells], np.float64)))
        elif i:
            raise InputError(f"{path}, line {line}: {wrong!r} is not a number")
    if not rows:
        raise InputError(f"{path} holds no line of numbers")
    return np.stack(rows)


def read_labels(path: Path) -> np.ndarray:
    """[N, C]: integers if all cells are, floats if they are numbers, else words.

    Words are returned with their header, if there is one: it cannot be told apart here.
    """
    lines = [cells for _, cells in _lines(path)]
    for rows in (lines, lines[1:]):
        for dtype in (np.int64, np.float64):
            with suppress(ValueError, OverflowError):
                return np.array(rows, dtype)
    return np.array(lines)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of every line that is not blank, without pandas' row numbers."""
    width = first = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                if not cells:
                    continue
                width = width or len(cells)
                if len(cells) != width:
                    raise InputError(
                        f"{path}, line {reader.line_num}: {len(cells)} cells; expected {width}, as "
                        "in the first line"
                    )
                cells = [cell.strip() for cell in cells]
                if reader.line_num == 1 and _heads_row_numbers(cells):
                    first = 1
                else:
                    yield reader.line_num, cells[first:]
    except (OSError, UnicodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a .csv file: {error}") from error


def _heads_row_numbers(cells: Sequence[str]) -> bool:
    names = cells[1:]
    words = any(_number(name) is None for name in names)
    return (
        cells[0] == "" and bool(names) and (words or names == [str(i) for i in range(len(names))])
    )


def _number(cell: str) -> float | None:
    if cell in UNKNOWN:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None
