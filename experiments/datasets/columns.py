"""Columns of a table: numbers, words for what is not known, ids of the rows, words with a meaning.

The first column names the rows if its header is empty, as pandas writes an index; if it holds words
that are unique; or whole numbers that are, under a name such as id, patient_id or sample. Ids are
text: 001 is not 1. A column of two words becomes 0 and 1, in alphabetical order; one of up to
``MOST_WORDS`` a column of zeros and ones for each. What else is no number is refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError

UNKNOWN = ("", "na", "n/a", "#n/a", "nan", "<na>", "null", "none", "?", "-")  # in any case
MOST_WORDS = 10
TOGETHER = (
    "{} is the same in several rows, and used as a feature; if those belong together call it groups"
)
Note = tuple[str, str]  # of which file, what
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf", re.IGNORECASE | re.ASCII)
_ID = re.compile(r"(?i:(.*[\W_])?(ids?|uuid|barcode))|.*[a-z]I[Dd]")
_PERSON = r"(sample|case|subject|patient|participant|donor|person|user|speaker)s?"
_PERHAPS_ID = re.compile(
    rf"(?i:row([\W_]?names?)?|index|idx|names?|key|unnamed: 0.*|{_PERSON}([\W_]?name)?)"
)
_GROUP = re.compile(
    rf"(?i:({_PERSON}|groups?|family|batch|site|plate|cent(er|re)|hospital)([\W_]?(id|name|no))?)"
)


class Frame(NamedTuple):
    """N rows of columns, as a file has them.

    Attributes:
      source: where they are from, for complaints.
      names: of the columns; None: they have none.
      columns: [N] each, text or numbers.
      ids: [N] text; None: the rows have none.
      lines: [N] where the rows are in the file; None: that is no text.
    """

    source: str
    names: tuple[str, ...] | None
    columns: Sequence[np.ndarray]
    ids: np.ndarray | None = None
    lines: Sequence[int] | None = None

    def name(self, column: int) -> str:
        return self.names[column] if self.names else f"column {column + 1}"

    def place(self, row: int) -> str:
        where = f"row {row}" if self.lines is None else f"line {self.lines[row]}"
        return f"{self.source}, {where}"

    def take(self, columns: Sequence[int] | None) -> "Frame":
        """Some of the columns; None: all of them."""
        if columns is None:
            return self
        names = self.names and tuple(self.names[i] for i in columns)
        return self._replace(names=names, columns=[self.columns[i] for i in columns])


class Part(NamedTuple):
    """What a file has under one key.

    Attributes:
      values: [N, …] numbers, or text.
      ids: [N] text; None: the rows have none.
      names: of the columns, before words became numbers; None: they have none.
      words: {name of a column that held words: those}.
    """

    values: np.ndarray
    ids: np.ndarray | None = None
    names: tuple[str, ...] | None = None
    words: Mapping[str, Sequence[str]] = {}


class Known(NamedTuple):
    """What a trained model knows of the columns of a modality: their names, and words in them."""

    names: tuple[str, ...] | None
    words: Mapping[str, Sequence[str]]


def is_number(cell: str) -> bool:
    return _NUMBER.fullmatch(cell) is not None


def is_unknown(cell: str) -> bool:
    return cell.lower() in UNKNOWN


def is_id_name(name: str) -> bool:
    """Whether a column of this name may hold ids."""
    return bool(_ID.fullmatch(name) or _PERHAPS_ID.fullmatch(name))


def is_group_name(name: str) -> bool:
    """Whether rows of the same value in a column of this name may belong together."""
    return _GROUP.fullmatch(name) is not None


def numbers(cells: np.ndarray) -> np.ndarray | None:
    """[N] float64, NaN where a cell is a word for unknown; None: there are other words."""
    if cells.dtype.kind != "U":
        return cells
    try:
        if "_" not in "".join(cells):  # Python takes 1_2 for a number
            return cells.astype(np.float64)
    except ValueError:
        pass
    unknown = are_unknown(cells)
    if not all(map(is_number, cells[~unknown])):
        return None
    return np.where(unknown, "nan", cells).astype(np.float64)


def are_unknown(cells: np.ndarray) -> np.ndarray:
    """[N] bool, which cells of text are words for unknown."""
    return np.isin(np.char.lower(cells), UNKNOWN)


def _booleans(cells: np.ndarray) -> np.ndarray | None:
    """`numbers`, with False and True as 0 and 1."""
    low = np.char.lower(cells) if cells.dtype.kind == "U" else cells
    if cells.dtype.kind != "U" or not np.isin(low, ("true", "false", *UNKNOWN)).all():
        return numbers(cells)
    return np.where(np.isin(low, UNKNOWN), np.nan, low == "true")


def take_ids(frame: Frame, features: Sequence[str] | None = None) -> tuple[Frame, str]:
    """The frame with the ids of its rows apart from its columns, and what held them.

    Of columns that a trained model knows as `features` none holds ids.

    Raises:
      InputError: an id is there twice, or missing.
    """
    start = what = None
    if frame.names and frame.names[0] == "" and len(frame.columns) > 1:
        start, what = 0, "the first column, which has no name"
    second = 0 if start is None else 1
    name = frame.name(second) if second + 1 < len(frame.columns) else ""
    if name and name not in (features or ()) and _holds_ids(frame, second):
        start, what = second, f"the column {frame.name(second)}" if frame.names else "column 1"
    if start is None or what is None:
        return frame, ""
    ids = _text(frame.columns[start])
    if (row := first(are_unknown(ids))) is not None:
        raise InputError(f"{frame.place(row)} has no id in {what}")
    refuse_twice(ids, frame.source)
    return frame.take(range(start + 1, len(frame.columns)))._replace(ids=ids), what


def refuse_twice(ids: np.ndarray, source: str) -> None:
    found, count = np.unique(ids, return_counts=True)
    if (count > 1).any():
        raise InputError(
            f"{source}: the id {str(found[count.argmax()])!r} is in {count.max()} rows; an id "
            "names one row (columns of what rows have in common may be called groups)"
        )


def _holds_ids(frame: Frame, column: int) -> bool:
    name, cells = frame.name(column), _text(frame.columns[column])
    if are_unknown(cells).all():
        return False
    distinct, rows = len(np.unique(cells)), len(cells)
    if numbers(frame.columns[column]) is None:
        return distinct == rows or distinct > max(MOST_WORDS, rows // 2)
    if not is_id_name(name) or not all(map(str.isdigit, cells)):
        return False
    return distinct > rows // 2 or _ID.fullmatch(name) is not None


def _text(cells: np.ndarray) -> np.ndarray:
    whole = (
        cells.dtype.kind == "f" and (cells == np.round(cells)).all() and abs(cells).max() < 2**53
    )
    return (cells.astype(np.int64) if whole else cells).astype(str)


def encode(
    frame: Frame, words: Mapping[str, Sequence[str]] | None = None
) -> tuple[Part, list[str]]:
    """The columns as numbers [N, d], and what was guessed; `words` are those of a trained model.

    Raises:
      InputError: a cell is no number, or a column has too many words, or others than `words`.
    """
    found: dict[str, Sequence[str]] = {}
    columns: list[np.ndarray] = []
    names: list[str] = []
    notes = list(_unknown_words(frame))
    for i, cells in enumerate(frame.columns):
        name = frame.name(i)
        value = None if words and name in words else _booleans(cells)
        if value is not None:
            columns.append(value)
            names.append(name)
            continue
        if words is not None and name not in words:
            raise InputError(_no_number(frame, i))
        found[name] = words[name] if words else _vocabulary(frame, i)
        columns += (shown := _one_hot(frame, i, found[name]))
        names += [""] * len(shown)
        notes.append(_said(name, found[name]))
        if is_group_name(name):
            notes.append(TOGETHER.format(name))
    values = np.stack(columns, axis=1)
    notes += suspicious(values, names)
    return Part(values, frame.ids, frame.names, found), notes


def _unknown_words(frame: Frame) -> Iterator[str]:
    count: dict[str, int] = {}
    for cells in frame.columns:
        if cells.dtype.kind == "U":
            unknown = cells[are_unknown(cells)]
            for word, times in zip(*np.unique(unknown, return_counts=True), strict=True):
                count[str(word)] = count.get(str(word), 0) + int(times)
    said = [
        f"{word!r} ({times})" for word, times in count.items() if word.lower() not in ("", "nan")
    ]
    if said:
        yield f"read as not known: {', '.join(said)}"


def _vocabulary(frame: Frame, column: int) -> list[str]:
    """The words of a column that is nothing but words, a few of them."""
    cells = frame.columns[column]
    known = cells[~are_unknown(cells)]
    if any(map(is_number, known)):
        raise InputError(_no_number(frame, column))
    words = [str(word) for word in np.unique(known)]
    if len(words) == 1:
        raise InputError(
            f"{frame.source}: {frame.name(column)} holds only the word {words[0]!r}; leave it out"
        )
    if len(words) > MOST_WORDS:
        raise InputError(
            f"{_no_number(frame, column)}; {frame.name(column)} holds {len(words)} words, and up "
            f"to {MOST_WORDS} are read: make numbers of them, or ids of the rows, in the first "
            "column, or leave them out"
        )
    return words


def _no_number(frame: Frame, column: int) -> str:
    bad = [not (is_number(cell) or is_unknown(cell)) for cell in frame.columns[column]]
    row = int(np.argmax(bad))
    return f"{frame.place(row)}: {str(frame.columns[column][row])!r} is not a number"


def _one_hot(frame: Frame, column: int, words: Sequence[str]) -> list[np.ndarray]:
    cells = frame.columns[column].astype(str)
    unknown = are_unknown(cells)
    if (row := first(~unknown & ~np.isin(cells, words))) is not None:
        raise InputError(
            f"{frame.place(row)}: {frame.name(column)} is {str(cells[row])!r}; expected one of "
            f"{', '.join(words)}"
        )
    shown = words[1:] if len(words) == 2 else words
    return [np.where(unknown, np.nan, cells == word) for word in shown]


def _said(name: str, words: Sequence[str]) -> str:
    if len(words) == 2:
        return f"{name} becomes 0 for {words[0]!r} and 1 for {words[1]!r}"
    return f"{name} becomes a column of zeros and ones for each of {', '.join(words)}"


def suspicious(values: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Columns of [N, d] that may be no features: ids, and what rows have in common."""
    named = np.array([is_id_name(name) or is_group_name(name) for name in names])
    rises = (values[1:] > values[:-1]).all(axis=0)
    for i in np.flatnonzero(rises | named).tolist() if len(values) > 2 else []:
        x, name = values[:, i], names[i]
        distinct = len(np.unique(x)) if (x == np.round(x)).all() else 0
        if name and distinct == len(x):
            yield (
                f"{name} is another whole number in every row, and used as a feature; if it names "
                "the rows make it the first column and call it id, or leave it out"
            )
        elif distinct and is_group_name(name):
            yield TOGETHER.format(name)


def first(bad: np.ndarray) -> int | None:
    """The first row in which there is any."""
    return int(np.argwhere(bad)[0, 0]) if bad.any() else None


def in_order(
    names: tuple[str, ...] | None, wanted: tuple[str, ...] | None, path: Path, notes: list[Note]
) -> Sequence[int] | None:
    """Where the columns of a model are, by their names where both have some; None: as they are."""
    if not names or not wanted or names == wanted:
        return None
    if lacking := [name for name in wanted if name not in names]:
        raise InputError(f"{path} has no column {lacking[0]!r}, which the model reads")
    if more := [name for name in names if name not in wanted]:
        notes.append((path.name, f"columns that the model does not read: {', '.join(more)}"))
    return [names.index(name) for name in wanted]
