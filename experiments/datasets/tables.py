"""Tables, of .csv and .parquet files, seen together: headers, ids, and what each of them holds.

Whether a first line is a header, and a first column ids, some files tell only beside the others.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import (
    Frame,
    Known,
    Note,
    Part,
    encode,
    in_order,
    numbers,
    take_ids,
)
from experiments.datasets.csv_file import Sheet, refuse_two_commas

BESIDE = ("groups", "split")  # what labels.csv may hold as columns


def read_tables(
    sheets: Mapping[Path, Sheet],
    frames: Mapping[Path, Frame],
    parts: Sequence[Part],
    labels: str,
    known: Mapping[str, Known] | None,
    notes: list[Note],
) -> Iterator[dict[str, Part]]:
    """What every table holds by key; `parts` are those of the other files. Adds to the notes.

    Raises:
      InputError: a first line may be a header or not, or a table holds what it should not.
    """
    refuse_two_commas(sheets.values())
    for path, frame in _settled(sheets, frames, parts, known, notes).items():
        yield _of_frame(path, frame, labels, known, notes)


def _settled(
    sheets: Mapping[Path, Sheet],
    frames: Mapping[Path, Frame],
    parts: Sequence[Part],
    known: Mapping[str, Known] | None,
    notes: list[Note],
) -> dict[Path, Frame]:
    """All tables with their ids; of some only the others tell whether they have a header."""
    found = {path: _with_ids(path, frame, known, notes) for path, frame in frames.items()}

    def add(path: Path, header: bool) -> None:
        sheet = sheets[path]._replace(header=header)
        notes.append((path.name, "the first line is a header" if header else "there is no header"))
        notes.extend((path.name, what) for what in sheet.notes)
        found[path] = _with_ids(path, sheet.frame(), known, notes)

    for path, sheet in sheets.items():
        if sheet.header is not None:
            add(path, sheet.header)
    _share_ids(found, parts, known, notes)
    open_ = {path: sheet for path, sheet in sheets.items() if sheet.header is None}
    others = [*parts, *(Part(frame.columns[0], frame.ids) for frame in found.values())]
    for path, header in _headers(open_, others, known).items():
        add(path, header)
    _share_ids(found, parts, known, notes)
    return found


def _with_ids(
    path: Path, frame: Frame, known: Mapping[str, Known] | None, notes: list[Note]
) -> Frame:
    frame, what = take_ids(frame, known[path.stem].names if known and path.stem in known else None)
    if what:
        notes.append((path.name, f"rows are joined by the ids in {what}"))
    return frame


def _share_ids(
    frames: dict[Path, Frame],
    parts: Sequence[Part],
    known: Mapping[str, Known] | None,
    notes: list[Note],
) -> None:
    """Takes as ids whole numbers, another in every row, that are first in all files.

    If they do no more than count, they may be ranks: then all files have the same header there.
    """
    first = {path: _whole_numbers(frame) for path, frame in frames.items() if frame.ids is None}
    names = {(frames[path].names or (None,))[0] for path in first}
    ids = _ids([*parts, *(Part(f.columns[0], f.ids) for f in frames.values())])
    others = bool(ids)
    features = {name for model in (known or {}).values() for name in model.names or ()}
    if (
        names & features
        or any(part.ids is None for part in parts)
        or (not others and len(first) < 2)
    ):
        return
    ids = ids or set.intersection(*first.values())
    counts = ids <= set(map(str, range(len(ids) + 1)))
    if counts and (others or len(names) > 1):
        return
    if not all(2 * len(cells & ids) >= len(cells) > 0 for cells in first.values()):
        return
    for path in first:
        frame = frames[path]
        frames[path] = frame.take(range(1, len(frame.columns)))._replace(
            ids=frame.columns[0].astype(str)
        )
        what = "rows are joined by whole numbers that all files have in the first column"
        notes.append((path.name, what))


def _ids(parts: Iterable[Part]) -> set[str]:
    return {one for part in parts if part.ids is not None for one in part.ids}


def _whole_numbers(frame: Frame) -> set[str]:
    """Those of the first column, if there is another and they are unique."""
    cells = frame.columns[0].astype(str)
    unique = set(cells) if len(frame.columns) > 1 and all(map(str.isdigit, cells)) else set()
    return unique if len(unique) == len(cells) else set()


def _headers(
    sheets: Mapping[Path, Sheet], others: Sequence[Part], known: Mapping[str, Known] | None
) -> dict[Path, bool]:
    """Whether the first lines are headers, by the ids or the number of rows of the others."""
    found: dict[Path, bool] = {}
    ids = _ids(others)
    for path, sheet in sheets.items():
        head, *rest = [cells for _, cells in sheet.lines]
        if known is not None:
            names = known[path.stem].names if path.stem in known else None
            found[path] = set(names or ("",)) <= set(head)
        elif ids and 2 * sum(cells[0] in ids for cells in rest) >= len(rest):
            found[path] = head[0] not in ids
        elif _may_have_ids(sheet):
            raise _unclear(path, head)
    left = {path: len(sheet.lines) for path, sheet in sheets.items() if path not in found}
    rows = {len(part.values) for part in others}
    for lines in left.values():
        rows = rows & {lines, lines - 1} if rows else {lines, lines - 1}
    if left and len(rows) > 1:
        path = next(iter(left))
        raise _unclear(path, sheets[path].lines[0][1])
    return found | {path: lines - 1 in rows for path, lines in left.items()}


def _may_have_ids(sheet: Sheet) -> bool:
    frames = [sheet._replace(header=header).frame() for header in (False, True)]
    try:
        return any(take_ids(frame)[0].ids is not None for frame in frames)
    except InputError:  # an id is missing, or there twice
        return True


def _unclear(path: Path, head: Sequence[str]) -> InputError:
    return InputError(
        f"{path}: the first line, {', '.join(head)}, may be a header or not; give the columns names"
    )


def _of_frame(
    path: Path,
    frame: Frame,
    labels: str,
    known: Mapping[str, Known] | None,
    notes: list[Note],
) -> dict[str, Part]:
    """What a table holds: a modality, or the labels and what stands beside them."""
    key = path.stem
    if key in BESIDE:
        if len(frame.columns) > 1:
            raise InputError(f"{path} has {len(frame.columns)} columns; expected one")
        return {key: _plain(frame)}
    if key == "labels":
        return _of_labels(path, frame, labels)
    model = None if known is None else known.get(key)
    if model is not None:
        frame = frame.take(in_order(frame.names, model.names, path, notes))
    part, said = encode(frame, None if model is None else model.words)
    notes += [(path.name, what) for what in said]
    return {key: part}


def _of_labels(path: Path, frame: Frame, labels: str) -> dict[str, Part]:
    names = list(frame.names or ())
    beside = {name.lower(): i for i, name in enumerate(names) if name.lower() in BESIDE}
    if labels and labels not in names:
        raise InputError(f"{path} has no column {labels}, only {', '.join(names) or 'no names'}")
    chosen = (
        [names.index(labels)]
        if labels
        else [i for i in range(len(frame.columns)) if i not in beside.values()]
    )
    if not chosen:
        raise InputError(f"{path} has no column of labels, only {', '.join(names)}")
    if len(chosen) > 1 and names and not _are_members(frame.take(chosen)):
        called = ", ".join(names[i] for i in chosen)
        raise InputError(f"{path} has columns {called}; say which to learn, --labels COLUMN")
    picked = {"labels": chosen, **{key: [i] for key, i in beside.items()}}
    return {key: _plain(frame.take(rows)) for key, rows in picked.items()}


def _are_members(frame: Frame) -> bool:
    """Whether there is nothing but zeros and ones."""
    return all(x is not None and np.isin(x, (0, 1)).all() for x in map(numbers, frame.columns))


def _plain(frame: Frame) -> Part:
    """Integers, floats or words, [N] of one column and [N, C] of several."""
    found = [numbers(cells) for cells in frame.columns]
    if any(x is None for x in found):
        values = np.stack([cells.astype(str) for cells in frame.columns], axis=1)
    else:
        values = np.stack([_whole(c, x) for c, x in zip(frame.columns, found, strict=True)], axis=1)
    return Part(values[:, 0] if len(found) == 1 else values, frame.ids, frame.names)


def _whole(cells: np.ndarray, x: Any) -> np.ndarray:
    """Integers, if that is how the cells are written."""
    if cells.dtype.kind == "U" and all(cell.lstrip("+-").isdigit() for cell in cells):
        with suppress(OverflowError):
            return cells.astype(np.int64)
    return x
