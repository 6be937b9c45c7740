"""From files of one's own to what they hold under which key, whatever their formats."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Frame, Known, Note, Part, in_order, suspicious
from experiments.datasets.csv_file import SUFFIXES, Sheet, read_sheet
from experiments.datasets.h5ad import read_h5ad
from experiments.datasets.npz import read_npy, read_npz
from experiments.datasets.parquet import read_parquet
from experiments.datasets.tables import BESIDE, read_tables

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
    for table in read_tables(sheets, frames, list(parts.values()), labels, known, notes):
        _add(parts, table)
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
        order = in_order(part.names, known[name].names, path, notes)
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
