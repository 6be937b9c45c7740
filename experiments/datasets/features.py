"""Features of one's own: an .npz file, or a CSV file per modality.

Every key of the .npz file with N rows is a modality, [N, d], [N, T, d], …, except

    labels  [N] integers: multiclass; [N, C] zeros and ones: multilabel; [N] floats: regression
    split   [N], 0 train, 1 validation, 2 test; optional
    mask    [N, M] zeros and ones, columns in alphabetical order of the modalities: who is there;
            optional

A CSV file is the key that it is called after (``image.csv``, ``labels.csv``), numbers without a
header. A row of a modality that is all NaN is missing as well; single NaNs are not known, and take
the mean of the training rows, see ``preprocess.standardise``.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.datasets.npz import read_npz
from experiments.errors import InputError

Kind = Literal["multiclass", "multilabel", "regression"]
RESERVED = ("labels", "split", "mask")
FEWEST = 10  # rows; with fewer there is nothing to hold out


class Table(NamedTuple):
    """What was found: N rows.

    Attributes:
      name: of the file, or of the folder of the CSV files.
      modalities: {name: [N, …] float32}; the rows of a missing modality are NaN.
      labels: [N] int32, [N, C] float32 or [N] float32, by `kind`.
      kind: what is to be predicted.
      classes: names; none for a regression.
      split: [N] 0, 1 or 2; None: to be drawn.
    """

    name: str
    modalities: dict[str, np.ndarray]
    labels: np.ndarray
    kind: Kind
    classes: tuple[str, ...]
    split: np.ndarray | None


def read(paths: Sequence[Path]) -> Table:
    """Reads and checks one .npz file, or CSV files.

    Raises:
      InputError: in one line, what is wrong in which key.
    """
    arrays = _read_files(paths)
    if "labels" not in arrays:
        raise InputError(f"{_called(paths)} has no labels, only {', '.join(arrays) or 'nothing'}")
    labels, kind, classes = _labels(arrays.pop("labels"))
    rows = len(labels)
    if rows < FEWEST:
        raise InputError(f"labels has {rows} rows; at least {FEWEST} are needed to learn and test")
    split, mask = arrays.pop("split", None), arrays.pop("mask", None)
    if not arrays:
        raise InputError(f"{_called(paths)} has no modality beside {', '.join(RESERVED)}")
    modalities = {name: _modality(name, x, rows) for name, x in sorted(arrays.items())}
    if mask is not None:
        _hide(modalities, mask, rows)
    for name, x in modalities.items():
        if missing(x).all():
            raise InputError(f"{name} is missing in every row, all NaN or masked; leave it out")
    split = None if split is None else _split(split, rows)
    return Table(_called(paths), modalities, labels, kind, classes, split)


def missing(x: np.ndarray) -> np.ndarray:
    """[N] bool, the rows of a modality [N, …] that are all NaN."""
    return np.isnan(x).all(axis=tuple(range(1, x.ndim)))


# --- files -----------------------------------------------------------------------------------


def _called(paths: Sequence[Path]) -> str:
    return paths[0].stem if len(paths) == 1 else paths[0].parent.resolve().name


def _read_files(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    if len(paths) == 1 and paths[0].suffix == ".npz":
        return read_npz(paths[0])
    if wrong := [path for path in paths if path.suffix != ".csv"]:
        raise InputError(f"{wrong[0]}: expected one .npz file, or a .csv file per modality")
    names = [path.stem for path in paths]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two files are called {min(twice)}.csv; a file is named by its modality")
    return {path.stem: _read_csv(path) for path in paths}


def _read_csv(path: Path) -> np.ndarray:
    """[N] for a single column, [N, d] else; whole numbers stay such."""
    try:
        lines = path.read_text(encoding="utf-8").strip().splitlines()
        cells = (cell.strip('" ') for line in lines for cell in line.split(","))
        whole = all(cell.lstrip("+-").isdecimal() for cell in cells)
        dtype = np.int64 if whole else np.float64
        table = np.loadtxt(lines, dtype, delimiter=",", comments=None, quotechar='"', ndmin=2)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a table of numbers without a header: {error}") from error
    return table[:, 0] if table.shape[1] == 1 and path.stem in ("labels", "split") else table


# --- keys ------------------------------------------------------------------------------------


def _labels(labels: np.ndarray) -> tuple[np.ndarray, Kind, tuple[str, ...]]:
    """The labels as they are learned, what kind they are of, and the names of the classes."""
    form = f"labels is {labels.dtype} {labels.shape}"
    if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2):
        raise InputError(f"{form}; expected integers [N], zeros and ones [N, C], or floats [N]")
    labels = labels.astype(int) if labels.dtype.kind == "b" else labels
    if not np.isfinite(labels).all():
        raise InputError(f"{form}, and row {_first(~np.isfinite(labels))} is NaN or infinite")
    if labels.ndim == 2:
        if labels.shape[1] < 2 or not np.isin(labels, (0, 1)).all():
            raise InputError(f"{form}; two axes mean several classes a row: zeros and ones [N, C]")
        if idle := np.flatnonzero(labels.min(axis=0) == labels.max(axis=0)).tolist():
            raise InputError(f"labels: column {idle[0]} is {labels[0, idle[0]]:g} in every row")
        return labels.astype(np.float32), "multilabel", _numbered(range(labels.shape[1]))
    if len(np.unique(labels)) < 2:
        raise InputError(f"labels are {labels[0]:g} in every row; there is nothing to tell apart")
    if labels.dtype.kind == "f":
        return labels.astype(np.float32), "regression", ()
    if (labels < 0).any():
        row = _first(labels < 0)
        raise InputError(f"labels: row {row} is {labels[row]}; classes are counted from 0")
    found, labels = np.unique(labels, return_inverse=True)
    return labels.astype(np.int32), "multiclass", _numbered(found)


def _numbered(classes: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"class {i}" for i in classes)


def _modality(name: str, x: np.ndarray, rows: int) -> np.ndarray:
    """Float32, with at least two axes."""
    if x.dtype.kind not in "biuf" or not x.ndim or len(x) != rows or not x.size:
        raise InputError(
            f"{name} is {x.dtype} {x.shape}; expected numbers [{rows}, …], a row per label"
        )
    x = x.astype(np.float32).reshape(rows, -1) if x.ndim == 1 else x.astype(np.float32)
    if np.isinf(x).any():
        raise InputError(f"{name}: row {_first(np.isinf(x))} is infinite; NaN means not known")
    return x


def _hide(modalities: dict[str, np.ndarray], mask: np.ndarray, rows: int) -> None:
    """Turns the rows that are masked out to NaN."""
    shape = (rows, len(modalities))
    if mask.shape != shape or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"mask is {mask.dtype} {mask.shape}; expected zeros and ones {shape}, a column each "
            f"for {', '.join(modalities)}"
        )
    for x, present in zip(modalities.values(), mask.T, strict=True):
        x[present == 0] = np.nan


def _split(split: np.ndarray, rows: int) -> np.ndarray:
    if (
        split.shape != (rows,)
        or split.dtype.kind not in "iuf"
        or not np.isin(split, (0, 1, 2)).all()
    ):
        raise InputError(
            f"split is {split.dtype} {split.shape}; expected [{rows}] of 0 (train), 1 (validation) "
            "and 2 (test)"
        )
    for part, name in enumerate(("train", "validation", "test")):
        if not (split == part).any():
            raise InputError(f"split has no {part}, so no {name} rows; give all three or no split")
    return split.astype(np.int32)


def _first(bad: np.ndarray) -> int:
    """The first row in which there is any."""
    return int(np.argwhere(bad)[0, 0])
