"""Reading .csv files from outside: what separates their cells, and what stands in numbers.

Commas, semicolons, tabs, bars or spaces; UTF-8, or UTF-16 with its mark; quoted cells; a decimal
comma where commas separate nothing. Lines at the top that begin with # are comments; the last of
them is the header if it has as many cells as the others, three or more, and there is none else.
What cannot be told is refused, here or, if only the other files can tell, in ``files``.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Frame, is_number, is_unknown
from experiments.datasets.header import has_header

SUFFIXES = (".csv", ".tsv", ".txt")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
WIDE = 50  # columns, from which a table is of numbers
TRIED = 200  # lines that show what separates the cells
_CUT = re.compile(r"[,;\t|]")
_COMMA = re.compile(r"[+-]?(\d+,\d*|,\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)

Line = tuple[int, list[str]]  # its number in the file, and its cells


class Sheet(NamedTuple):
    """The cells of a file as text.

    Attributes:
      source: the file.
      lines: all of the same number of cells.
      header: whether the first line holds names; None: this file alone does not tell.
      commas: what they do: separate cells, or stand in numbers as "decimal"; "": nothing.
      notes: what was guessed.
    """

    source: str
    lines: list[Line]
    header: bool | None
    commas: str
    notes: list[str]

    def frame(self) -> Frame:
        """Its columns, once it is known whether there is a header."""
        head, body = (self.lines[0][1], self.lines[1:]) if self.header else (None, self.lines)
        if not body:
            raise InputError(f"{self.source} holds no line of numbers")
        if head and len(set(head)) < len(head):
            name = next(name for i, name in enumerate(head) if name in head[:i])
            raise InputError(f"{self.source}: two columns are called {name!r}; rename one")
        numbers, cells = zip(*body, strict=True)
        wide = len(cells[0]) > WIDE
        columns = [
            _numbers(c) if wide and i else np.array(c)
            for i, c in enumerate(zip(*cells, strict=True))
        ]
        return Frame(self.source, tuple(head) if head else None, columns, None, numbers)


def _numbers(cells: tuple[str, ...]) -> np.ndarray:
    """Numbers right away, if they are plain ones: text takes long, and much memory."""
    try:
        return np.array(cells if "_" in "".join(cells) else [float(cell) for cell in cells])
    except ValueError:
        return np.array(cells)


def read_sheet(path: Path) -> Sheet:
    """Reads a .csv file.

    Raises:
      InputError: in one line, what is wrong in which line.
    """
    text, notes = _text(path), list[str]()
    try:
        separator = _separator(path, text)
        lines = list(_parsed(text, separator))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a .csv file: {error}") from error
    if separator != ",":
        notes.append(f"cells are separated by {SEPARATORS.get(separator, 'spaces')}")
    lines = _without_comments(lines, notes)
    lines = _of_one_width(path, lines, notes)
    commas = "separator" if separator == "," else ""
    whole = (separator == "," and '"' not in text) or "," not in text  # no cell has a comma
    if not whole and _has_decimal_commas(path, lines, separator):
        commas = "decimal"
        notes.append("the decimal sign is a comma")
        lines = [(number, [_with_point(cell) for cell in cells]) for number, cells in lines]
    return Sheet(str(path), lines, has_header([cells for _, cells in lines]), commas, notes)


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read as a .csv file: {error.strerror}") from error
    wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeError as error:
        line = data[: getattr(error, "start", 0)].count(b"\n") + 1
        raise InputError(
            f"{path} cannot be read as a .csv file: line {line} is not "
            f"{'UTF-16' if wide else 'UTF-8, perhaps Latin-1'}; save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(f"{path} cannot be read as a .csv file: null bytes; save it as UTF-8")
    return text


# --- cells -----------------------------------------------------------------------------------


def _parsed(text: str, separator: str) -> Iterator[Line]:
    lines: Iterator[str] = io.StringIO(text, newline="")
    if separator == " ":
        lines = (" ".join(line.split()) for line in lines)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=separator != " ", strict=True)
    spaces = " " in text
    for cells in reader:
        yield reader.line_num, [cell.strip() for cell in cells] if spaces else cells


def _separator(path: Path, text: str) -> str:
    """What makes lines of equally many cells, of which the fewest look as if cut wrongly."""
    found: dict[str, int] = {}
    for separator in (*SEPARATORS, " "):
        try:
            lines = [cells for _, cells in islice(_parsed(text, separator), TRIED) if any(cells)]
        except csv.Error:
            continue
        lines = [cells for i, cells in enumerate(lines) if i == 0 or cells[0][:1] != "#"]
        body = lines[1:] or lines
        if len({len(cells) for cells in body}) != 1 or len(body[0]) == 1:
            continue
        if separator == " " and (found or not _are_numbers(body)):
            continue
        found[separator] = sum(_badly_cut(cell, separator) for cells in lines for cell in cells)
    best = [separator for separator, bad in found.items() if bad == min(found.values())]
    if len(best) > 1:
        names = " or ".join(SEPARATORS[separator] for separator in best)
        raise InputError(f"{path}: cells may be separated by {names}; write it with commas")
    if best:
        return best[0]
    return max(SEPARATORS, key=text.split("\n", 1)[0].count)


def _badly_cut(cell: str, separator: str) -> bool:
    if not _CUT.search(cell):
        return False
    return not is_number(cell) and (separator == "," or not _COMMA.fullmatch(cell))


def _are_numbers(lines: Sequence[Sequence[str]]) -> bool:
    cells = (cell for line in lines for cell in line[1:])
    return all(is_number(cell) or is_unknown(cell) or _COMMA.fullmatch(cell) for cell in cells)


def _without_comments(lines: list[Line], notes: list[str]) -> list[Line]:
    """The last line of those with a # at the top is the header, if it is one and no other is."""
    top = 0
    while top < len(lines) and lines[top][1][:1] and _is_comment(lines[top][1][0]):
        top += 1
    rest = [line for line in lines[top:] if line[1]]
    if not top or not rest:
        return lines
    number, cells = lines[top - 1]
    header = len(rest[0][1]) == len(cells) > 2 and has_header([cells for _, cells in rest]) is False
    if top > header:
        notes.append("lines with a # at the top are comments")
    return [(number, [cells[0].lstrip("# "), *cells[1:]]), *lines[top:]] if header else lines[top:]


def _is_comment(cell: str) -> bool:
    return cell.startswith("#") and not is_unknown(cell)


def _of_one_width(path: Path, lines: list[Line], notes: list[str]) -> list[Line]:
    """Without blank lines, separators that end every line, and lines of another width."""
    while lines and not lines[-1][1]:
        lines = lines[:-1]
    full = [(number, cells) for number, cells in lines if cells]
    if not full:
        raise InputError(f"{path} holds no line of numbers")
    body = full[1:] or full
    if all(len(cells) > 1 and cells[-1] == "" for _, cells in body):
        head = full[0][1]
        if head[-1] == "" or len(head) == len(body[0][1]) - 1:
            notes.append("the separator at the end of every line is left out")
            width = len(body[0][1]) - 1
            full = [(n, cells[:width] if len(cells) == width + 1 else cells) for n, cells in full]
    width = len(full[0][1])
    for number, cells in full:
        if len(cells) != width:
            raise InputError(
                f"{path}, line {number}: {len(cells)} cells; expected {width}, as in the first line"
            )
    if width == 1 and len(full) < len(lines):
        number = next(number for number, cells in lines if not cells)
        raise InputError(f"{path}, line {number} is blank; write NaN where nothing is known")
    return full


def _has_decimal_commas(path: Path, lines: list[Line], separator: str) -> bool:
    cells = [cell for _, line in lines for cell in line]
    comma = next((cell for cell in cells if _COMMA.fullmatch(cell)), None)
    point = next((cell for cell in cells if "." in cell and is_number(cell)), None)
    if comma and (point or separator == ","):
        beside = f"and {point!r}" if point else "between commas"
        raise InputError(f"{path} holds {comma!r} {beside}; write it with a decimal point")
    return comma is not None


def refuse_two_commas(sheets: Iterable[Sheet]) -> None:
    """Raises InputError if commas separate two whole numbers a line that may be one with a comma.

    So they may where another file has decimal commas, or a number would begin with a zero.
    """
    sheets = list(sheets)
    decimal = any(sheet.commas == "decimal" for sheet in sheets)
    for sheet in sheets:
        rows = [cells for _, cells in sheet.lines]
        if sheet.header or sheet.commas != "separator" or len(rows[0]) != 2:
            continue
        if any(not cell.removeprefix("-").isdigit() for cells in rows for cell in cells):
            continue
        if decimal or any(one == "-0" or re.fullmatch("0.+", two) for one, two in rows):
            raise InputError(
                f"{sheet.source}: {','.join(rows[0])} may be one number or two; write it with a "
                "decimal point, or separate numbers by semicolons"
            )


def _with_point(cell: str) -> str:
    return cell.replace(",", ".") if _COMMA.fullmatch(cell) else cell
