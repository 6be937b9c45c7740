"""From files of one's own to what they hold under which key, whatever their formats."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Frame, Part, encode, numbers, suspicious, take_ids
from experiments.datasets.csv_file import SUFFIXES, Sheet, read_sheet, refuse_two_commas
from experiments.datasets.h5ad import read_h5ad
from experiments.datasets.npz import read_npy, read_npz
from experiments.datasets.parquet import read_parquet

Note = tuple[str, str]  # of which file, what
BESIDE = ("groups", "split")  # what labels.csv may hold as columns
NO_FEATURES = ("labels", "mask", *BESIDE)
FORMATS = ".npz, .npy, .csv, .tsv, .txt, .parquet, .h5ad or .h5mu"
MADE = {  # lines of Python that make a file that is read
    ".mat": "numpy.savez('{0}.npz', **{{k: x for k, x in scipy.io.loadmat('{0}.mat').items() "
    "if k[0] != '_'}})",
    ".xlsx": "pandas.read_excel('{0}.xlsx').to_csv('{0}.csv', index=False)",
    ".xls": "pandas.read_excel('{0}.xls').to_csv('{0}.csv', index=False)",
    ".pkl": "pandas.read_pickle('{0}.pkl').to_csv('{0}.csv')",
    ".pt": "numpy.savez('{0}.npz', **{{k: x.numpy() for k, x in torch.load('{0}.pt').items()}})",
}


class Known(NamedTuple):
    """What a trained model knows of the columns of a modality: their names, and words in them."""

    names: tuple[str, ...] | None
    words: Mapping[str, Sequence[str]]


def read_files(
    paths: Sequence[Path], labels: str = "", known: Mapping[str, Known] | None = None
) -> tuple[dict[str, Part], list[Note]]:
    """What the files hold by key, and what was guessed.

    `labels` is the column of the labels, where a file has several. For a trained model `known` says
    of every modality what its columns have to be.

    Raises:
      InputError: in one line, which file cannot be read, and why.
    """
    notes: list[Note] = []
    parts: dict[str, Part] = {}
    frames: dict[Path, Frame] = {}
    sheets: dict[Path, Sheet] = {}
    stems = [path.stem for path in paths]
    if twice := next((stem for i, stem in enumerate(stems) if stem in stems[:i]), ""):
        raise InputError(f"two files are called {twice}; a file is named by its modality")
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in SUFFIXES:
            sheets[path] = read_sheet(path)
        elif suffix == ".parquet":
            frames[path] = read_parquet(path)
        elif suffix in (".h5ad", ".h5mu"):
            _add(parts, _by_name(read_h5ad(path, labels), path, known or {}, notes))
        elif suffix in (".npz", ".npy"):
            found = read_npz(path) if suffix == ".npz" else {path.stem: read_npy(path)}
            _add(parts, _of_arrays(found, path, notes))
        else:
            raise InputError(_unreadable(path))
    refuse_two_commas(sheets.values())
    for path, frame in _settled(sheets, frames, parts, known, notes).items():
        _add(parts, _of_frame(path, frame, labels, known, notes))
    return parts, notes


def merged(notes: Iterable[Note]) -> list[str]:
    """One line for each thing that was guessed, with all files of which it was."""
    files: dict[str, list[str]] = {}
    for file, what in notes:
        files.setdefault(what, []).append(file)
    return [f"{', '.join(names)}: {what}" for what, names in files.items()]


def _unreadable(path: Path) -> str:
    if line := MADE.get(path.suffix.lower()):
        return f"{path} is not read, but what Python writes: {line.format(path.with_suffix(''))}"
    return f"{path}: expected one .npz file, or a file per modality, {FORMATS}"


def _add(parts: dict[str, Part], more: Mapping[str, Part]) -> None:
    for name, part in more.items():
        if name in parts and not _agree(parts[name], part):
            raise InputError(f"two files hold {name}; a file is named by its modality")
        parts.setdefault(name, part)


def _agree(one: Part, other: Part) -> bool:
    """Whether two parts have the same values for the ids of the first."""
    if one.ids is None or other.ids is None or one.values.ndim > 1:
        return False
    pairs = dict(zip(one.ids, one.values, strict=True))
    return pairs == dict(zip(other.ids, other.values, strict=True))


def _by_name(
    parts: Mapping[str, Part], path: Path, known: Mapping[str, Known], notes: list[Note]
) -> dict[str, Part]:
    """With the columns that a model knows, in its order."""
    found = dict(parts)
    for name in known.keys() & found.keys():
        part = found[name]
        order = _order(part.names, known[name].names, path, notes)
        if order is not None:
            found[name] = part._replace(values=part.values[:, order], names=known[name].names)
    return found


# --- arrays ----------------------------------------------------------------------------------


def _of_arrays(arrays: Mapping[str, np.ndarray], path: Path, notes: list[Note]) -> dict[str, Part]:
    """The keys of an .npz file; "ids" are those of all that have as many rows."""
    arrays = dict(arrays)
    ids = arrays.pop("ids", None)
    if ids is not None and (ids.ndim != 1 or ids.dtype.kind not in "iuUS"):
        raise InputError(f"ids is {ids.dtype} {ids.shape}; expected words or integers [N]")
    for name, x in list(arrays.items()):
        if _names_columns(x, arrays.values()):
            notes.append((path.name, f"{name} holds names of columns and is left out"))
            del arrays[name]
        elif x.dtype.kind in "biuf" and x.ndim in (1, 2) and name not in NO_FEATURES:
            columns = x.reshape(len(x), -1)
            numbered = (f"column {i + 1} of {name}" for i in range(columns.shape[1]))
            called = [name] if x.ndim == 1 else list(numbered)
            notes += [(path.name, what) for what in suspicious(columns, called)]
    if ids is None:
        return {name: Part(x) for name, x in arrays.items()}
    text = np.char.strip(ids.astype(str))
    rows = {name: len(x) if x.ndim else 0 for name, x in arrays.items()}
    return {n: Part(x, text if rows[n] == len(text) else None) for n, x in arrays.items()}


def _names_columns(x: np.ndarray, arrays: Iterable[np.ndarray]) -> bool:
    """Whether these are words, as many as an array is wide, and as none is long."""
    if x.dtype.kind not in "US" or x.ndim != 1:
        return False
    shapes = [other.shape for other in arrays if other.dtype.kind in "biuf" and other.ndim > 0]
    wide = {shape[-1] for shape in shapes if len(shape) > 1}
    return len(x) in wide - {shape[0] for shape in shapes}


# --- tables ----------------------------------------------------------------------------------


def _settled(
    sheets: Mapping[Path, Sheet],
    frames: Mapping[Path, Frame],
    parts: Mapping[str, Part],
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
    _share_ids(found, parts, notes)
    open_ = {path: sheet for path, sheet in sheets.items() if sheet.header is None}
    others = [*parts.values(), *(Part(frame.columns[0], frame.ids) for frame in found.values())]
    for path, header in _headers(open_, others, known).items():
        add(path, header)
    _share_ids(found, parts, notes)
    return found


def _with_ids(
    path: Path, frame: Frame, known: Mapping[str, Known] | None, notes: list[Note]
) -> Frame:
    frame, what = take_ids(frame, known[path.stem].names if known and path.stem in known else None)
    if what:
        notes.append((path.name, f"rows are joined by the ids in {what}"))
    return frame


def _share_ids(frames: dict[Path, Frame], parts: Mapping[str, Part], notes: list[Note]) -> None:
    """Takes as ids whole numbers, another in every row, that are first in all files.

    If they do no more than count, they may be ranks: then all files have the same header there.
    """
    first = {path: _whole_numbers(frame) for path, frame in frames.items() if frame.ids is None}
    names = {(frames[path].names or (None,))[0] for path in first}
    ids = _ids([*parts.values(), *(Part(f.columns[0], f.ids) for f in frames.values())])
    others = bool(ids)
    if any(part.ids is None for part in parts.values()) or (not others and len(first) < 2):
        return
    ids = ids or set.intersection(*first.values())
    counts = ids <= set(map(str, range(len(ids) + 1)))
    if counts and (others or len(names) > 1):
        return
    if not all(2 * len(cells & ids) >= len(cells) > 0 for cells in first.values()):
        return
    for path in first:
        frame = frames[path]
        frames[path] = frame.after(1)._replace(ids=frame.columns[0].astype(str))
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
        frame = _columns(frame, _order(frame.names, model.names, path, notes))
    part, said = encode(frame, None if model is None else model.words)
    notes += [(path.name, what) for what in said]
    return {key: part}


def _order(
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
    if len(chosen) > 1 and names and not _are_members(_columns(frame, chosen)):
        called = ", ".join(names[i] for i in chosen)
        raise InputError(f"{path} has columns {called}; say which to learn, --labels COLUMN")
    picked = {"labels": chosen, **{key: [i] for key, i in beside.items()}}
    return {key: _plain(_columns(frame, rows)) for key, rows in picked.items()}


def _are_members(frame: Frame) -> bool:
    """Whether there is nothing but zeros and ones."""
    return all(x is not None and np.isin(x, (0, 1)).all() for x in map(numbers, frame.columns))


def _columns(frame: Frame, columns: Sequence[int] | None) -> Frame:
    if columns is None:
        return frame
    names = frame.names and tuple(frame.names[i] for i in columns)
    return frame._replace(names=names, columns=[frame.columns[i] for i in columns])


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
        return cells.astype(np.int64)
    return x
