"""Features of one's own: an .npz file, or a CSV file per modality.

Every key of the .npz file with N rows is a modality, [N, d], [N, T, d], …, except

    labels  [N] integers or words: multiclass; [N, C] zeros and ones: multilabel; [N] floats:
            regression
    split   [N], 0 train, 1 validation, 2 test; optional, see ``strata`` for what is done without
    mask    [N, M] zeros and ones, columns in alphabetical order of the modalities: who is there;
            optional

A CSV file is the key that it is called after (``image.csv``, ``labels.csv``); see ``csv_file`` for
its form. A row of a modality that is all NaN is missing as well, and so is a position that is: fill
up sequences of unequal length with NaN. Single NaNs are not known, and take the mean of the
training rows, see ``preprocess.standardise``.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.csv_file import UNKNOWN, read_labels, read_numbers
from experiments.datasets.npz import read_npz
from experiments.datasets.numbers import to_float32

Kind = Literal["multiclass", "multilabel", "regression"]
RESERVED = ("labels", "split", "mask")
FEWEST = 10  # rows; with fewer there is nothing to hold out
RARE = 3  # rows of a class; with fewer it cannot be in train, validation and test


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


def sha256(paths: Sequence[Path]) -> str:
    """Of what the files hold, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def strata(table: Table) -> np.ndarray:
    """[N] groups of rows that are to keep their proportions in a drawn split.

    Rows of a class; of a set of classes, those that share their rarest ones side by side; or of a
    tenth of the values of a regression. -1: of a class with one or two rows, which stay in train.

    Raises:
      InputError: hardly any other rows.
    """
    labels, rows = table.labels, len(table.labels)
    if table.kind == "regression":
        return np.argsort(np.argsort(labels, kind="stable")) * min(10, rows // 7) // rows
    count = rows_by_class(labels, len(table.classes))
    if table.kind == "multiclass":
        group, rare = labels, count[labels] < RARE
    else:
        rare = labels[:, count < RARE].any(axis=1)
        _, group = np.unique(labels[:, np.argsort(count)], axis=0, return_inverse=True)
    if np.sum(~rare) < FEWEST:
        raise InputError(
            f"labels: {table.classes[count.argmin()]!r} has {count.min()} of {rows} rows, and only "
            f"{np.sum(~rare)} are of classes with {RARE} or more; join classes, or give a split"
        )
    return np.where(rare, -1, group)


def rows_by_class(labels: np.ndarray, classes: int) -> np.ndarray:
    """[C] how many of the rows are of each class; labels [N] or [N, C]."""
    return np.bincount(labels, minlength=classes) if labels.ndim == 1 else (labels > 0).sum(axis=0)


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
    arrays = {path.stem: _read_csv(path) for path in paths}
    labels = arrays.get("labels")
    if labels is not None and labels.dtype.kind == "U":
        rows = {len(x) for name, x in arrays.items() if name != "labels"}
        if rows == {len(labels) - 1}:  # the first word is a header
            arrays["labels"] = labels[1:]
    return arrays


def _read_csv(path: Path) -> np.ndarray:
    """[N] for a single column of labels or split, [N, d] else."""
    table = read_labels(path) if path.stem == "labels" else read_numbers(path)
    return table[:, 0] if table.shape[1:] == (1,) and path.stem in RESERVED[:2] else table


# --- keys ------------------------------------------------------------------------------------


def _labels(labels: np.ndarray) -> tuple[np.ndarray, Kind, tuple[str, ...]]:
    """The labels as they are learned, what kind they are of, and the names of the classes."""
    form = f"labels is {labels.dtype} {labels.shape}"
    if labels.dtype.kind not in "biufUS" or labels.ndim not in (1, 2):
        raise InputError(
            f"{form}; expected integers or words [N], zeros and ones [N, C], or floats [N]"
        )
    if len(labels) < FEWEST:
        raise InputError(
            f"labels has {len(labels)} rows; at least {FEWEST} are needed to learn and test"
        )
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    labels = labels.astype(int) if labels.dtype.kind == "b" else labels
    if labels.dtype.kind in "US":
        return _words(labels, form)
    labels = to_float32(labels) if labels.dtype.kind == "f" else labels
    if not np.isfinite(labels).all():
        row = _first(~np.isfinite(labels))
        raise InputError(f"{form}, and row {row} is NaN or infinite; leave such rows out")
    if labels.ndim == 2:
        return _several(labels, form)
    if labels.dtype.kind == "f":
        _tell_apart(labels)
        return labels, "regression", ()
    if (labels < 0).any():
        row = _first(labels < 0)
        raise InputError(
            f"labels: row {row} is {labels[row]}; classes are counted from 0, and numbers to be "
            "predicted are floats"
        )
    return _classes(labels, "class {}")


def _classes(labels: np.ndarray, name: str) -> tuple[np.ndarray, Kind, tuple[str, ...]]:
    _tell_apart(labels)
    found, index = np.unique(labels, return_inverse=True)
    return index.astype(np.int32), "multiclass", tuple(name.format(i) for i in found)


def _words(labels: np.ndarray, form: str) -> tuple[np.ndarray, Kind, tuple[str, ...]]:
    if labels.ndim == 2:
        raise InputError(f"{form}; expected one word a row, [N], or zeros and ones [N, C]")
    try:
        labels = np.char.strip(labels.astype(str))
    except UnicodeError as error:
        raise InputError(f"{form}, and not ASCII; save text as str, not bytes") from error
    if (unknown := np.isin(labels, UNKNOWN)).any():
        row = _first(unknown)
        raise InputError(f"labels: row {row} is {str(labels[row])!r}; leave such rows out")
    return _classes(labels, "{}")


def _several(labels: np.ndarray, form: str) -> tuple[np.ndarray, Kind, tuple[str, ...]]:
    if labels.shape[1] == 0 or not np.isin(labels, (0, 1)).all():
        raise InputError(
            f"{form}; two axes mean several classes a row, zeros and ones [N, C]; of several "
            "numbers predict one at a time, floats [N]"
        )
    if idle := np.flatnonzero(labels.min(axis=0) == labels.max(axis=0)).tolist():
        value = labels[0, idle[0]]
        raise InputError(f"labels: column {idle[0]} is {value:g} in every row; leave it out")
    names = tuple(f"class {i}" for i in range(labels.shape[1]))
    return labels.astype(np.float32), "multilabel", names


def _tell_apart(labels: np.ndarray) -> None:
    if (labels == labels[0]).all():
        raise InputError(f"labels are {labels[0]} in every row; there is nothing to tell apart")


def _modality(name: str, x: np.ndarray, rows: int) -> np.ndarray:
    """Float32, with at least two axes."""
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise InputError(f"a modality is called {name!r}; use letters, digits, and any of _ . + -")
    if x.dtype.kind not in "biuf" or not x.ndim or len(x) != rows or not x.size:
        hint = " (is its first row a header?)" if x.ndim and len(x) == rows + 1 else ""
        raise InputError(
            f"{name} is {x.dtype} {x.shape}; expected numbers [{rows}, …], a row per label{hint}"
        )
    x = to_float32(x)
    x = x[:, None] if x.ndim == 1 else x
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
