"""Features of one's own: an .npz file, or a file per modality.

Every key of the .npz file with N rows is a modality, [N, d], [N, T, d], …, except

    labels  [N] integers or words: multiclass; [N, C] zeros and ones: multilabel, or classes where
            every row has a single one; [N] floats: regression, or classes if they are whole and
            few; see ``labels``
    split   [N], 0 train, 1 validation, 2 test; optional, see ``strata`` for what is done without
            it, or without validation rows
    groups  [N] integers or words: rows of one group stay on one side of a split that is drawn;
            optional
    mask    [N, M] zeros and ones, columns in alphabetical order of the modalities: who is there;
            optional
    ids     [N] words or integers, by which rows are joined with those of other files; optional

Any other file is the key that it is called after: ``image.csv``, ``labels.csv``, ``rna.npz`` with a
sparse matrix of scipy, ``rna.npy``, ``rna.parquet``, ``rna.h5ad``; see ``files`` and, for the form
of tables, ``csv_file`` and ``columns``. Files that have ids are joined by them. A column called
split or groups beside the labels is that key.

A row of a modality that is all NaN is missing as well, and so is a position that is: fill up
sequences of unequal length with NaN. Single NaNs are not known, and take the mean of the training
rows, see ``preprocess.standardise``. Rows of which nothing is there are left out.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Known, Part, first
from experiments.datasets.files import merged, read_files
from experiments.datasets.join import joined
from experiments.datasets.labels import FEWEST, Kind, Wanted, read_labels
from experiments.datasets.preprocess import Moments

RESERVED = ("labels", "split", "groups", "mask", "ids")
CALLED = ("y", "label", "target", "targets", "class", "classes")  # what others call the labels
FEWEST_GROUPS = 3  # to train, to validate and to test on
RARE = 3  # rows of a class, or groups with it; with fewer it cannot be in all parts
LARGEST = float(np.finfo(np.float32).max)


class Table(NamedTuple):
    """What was found: N rows.

    Attributes:
      name: of the file, or of the folder of the files.
      modalities: {name: [N, …] float32 or float64}; the rows of a missing modality are NaN.
      labels: [N] int32, [N, C] float32 or [N] float32, by `kind`.
      kind: what is to be predicted.
      classes: names; none for a regression.
      split: [N] 0, 1 or 2; None: to be drawn; without any 1: validation rows are to be drawn.
      groups: [N] int; None: every row is one of its own.
      known: what predictions have to know of the columns.
      notes: what was guessed, and what was left out.
    """

    name: str
    modalities: dict[str, np.ndarray]
    labels: np.ndarray
    kind: Kind
    classes: tuple[str, ...]
    split: np.ndarray | None
    groups: np.ndarray | None = None
    known: Mapping[str, Known] = {}
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> int:
        """Features of a row, over all modalities and positions."""
        return sum(x[0].size for x in self.modalities.values())


class Recipe(NamedTuple):
    """How rows of a file become inputs: what a model has to remember of its training rows.

    Attributes:
      moments: by which every modality is standardised.
      known: what the columns have to be.
    """

    moments: Moments
    known: Mapping[str, Known]


def read(paths: Sequence[Path], column: str = "", wanted: Wanted = "auto") -> Table:
    """Reads and checks files; `column` is that of the labels, `wanted` what to learn.

    Raises:
      InputError: in one line, what is wrong in which key.
    """
    parts, guessed = read_files(paths, column)
    _refuse_without_labels(paths, parts, column)
    arrays, _, said = joined(parts)
    labels = read_labels(arrays.pop("labels"), parts["labels"].names, wanted)
    rows = len(labels.values)
    split, mask, groups = (arrays.pop(key, None) for key in ("split", "mask", "groups"))
    if not arrays:
        raise InputError(f"{called(paths)} has no modality beside {', '.join(RESERVED)}")
    modalities = {name: modality(name, x, rows) for name, x in sorted(arrays.items())}
    if mask is not None:
        hide(modalities, mask, parts["mask"].names)
    for name, x in modalities.items():
        if missing(x).all():
            raise InputError(f"{name} is missing in every row, all NaN or masked; leave it out")
    known = {name: Known(parts[name].names, parts[name].words) for name in modalities}
    notes = (*merged(guessed), *said, *labels.notes)
    table = Table(called(paths), modalities, *labels[:3], None, None, known, notes)
    if split is not None:
        table = table._replace(split=_split(split, rows))
    if groups is not None:
        table = table._replace(groups=_groups(groups, rows))
    return _without_empty_rows(table)


def _refuse_without_labels(paths: Sequence[Path], parts: Mapping[str, Part], column: str) -> None:
    if "labels" in parts:
        return
    has = f"{called(paths)} has no labels, only {', '.join(parts) or 'nothing'}"
    if parted := [name for name in parts if re.search(r"_(train|test|val)$", name)]:
        raise InputError(
            f"{has}; put the rows of {parted[0]} and its like into one array, and tell them apart "
            "by a key split of 0 (train), 1 (validation) and 2 (test)"
        )
    if name := next((name for name in parts if name.lower() in CALLED), None):
        raise InputError(f"{has}; rename {name} to labels")
    if any(path.suffix in (".h5ad", ".h5mu") for path in paths):
        name = f"no obs has a column {column}" if column else "name the column of obs"
        raise InputError(f"{has}; {name}: --labels COLUMN, or labels.csv, say what to learn")
    raise InputError(f"{has}; add a key labels, or a file called labels.csv")


def _without_empty_rows(table: Table) -> Table:
    """Without the rows of which no modality is there."""
    empty = np.all([missing(x) for x in table.modalities.values()], axis=0)
    if not empty.any():
        return table
    kept = np.flatnonzero(~empty)
    note = f"{empty.sum():,} rows without any modality are left out"
    split, groups = (None if x is None else x[kept] for x in (table.split, table.groups))
    if split is not None:
        split = _split(split, len(kept))
    return table._replace(
        modalities={name: x[kept] for name, x in table.modalities.items()},
        labels=table.labels[kept],
        split=split,
        groups=groups,
        notes=(*table.notes, note),
    )


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
    tenth of the values of a regression. -1: of a class with one or two rows, or in one or two
    groups, which stay in train.

    Raises:
      InputError: hardly any other rows.
    """
    labels, rows = table.labels, len(table.labels)
    units = rows if table.groups is None else len(np.unique(table.groups))
    if units < FEWEST_GROUPS:
        raise InputError(f"there are {units} groups; at least {FEWEST_GROUPS} are needed to split")
    if table.kind == "regression":
        return np.argsort(np.argsort(labels, kind="stable")) * min(10, rows // 7) // rows
    count = groups_by_class(table)
    if table.kind == "multiclass":
        group, rare = labels, count[labels] < RARE
    else:
        rare = labels[:, count < RARE].any(axis=1)
        _, group = np.unique(labels[:, np.argsort(count)], axis=0, return_inverse=True)
    if np.sum(~rare) < FEWEST:
        raise InputError(
            f"labels: {table.classes[count.argmin()]!r} has {count.min()} of {units} "
            f"{'rows' if table.groups is None else 'groups'}, and only {np.sum(~rare)} rows are of "
            f"classes with {RARE} or more; join classes, give a split, or say --task regression"
        )
    return np.where(rare, -1, group)


def rows_by_class(labels: np.ndarray, classes: int) -> np.ndarray:
    """[C] how many of the rows are of each class; labels [N] or [N, C]."""
    return np.bincount(labels, minlength=classes) if labels.ndim == 1 else (labels > 0).sum(axis=0)


def groups_by_class(table: Table) -> np.ndarray:
    """[C] in how many of the groups a class is, or of the rows where there are no groups."""
    if table.groups is None:
        return rows_by_class(table.labels, len(table.classes))
    one_hot = np.eye(len(table.classes))[table.labels] if table.labels.ndim == 1 else table.labels
    return np.array([len(np.unique(table.groups[column > 0])) for column in one_hot.T])


def missing(x: np.ndarray) -> np.ndarray:
    """[N] bool, the rows of a modality [N, …] that are all NaN."""
    return np.isnan(x).all(axis=tuple(range(1, x.ndim)))


# --- keys ------------------------------------------------------------------------------------


def called(paths: Sequence[Path]) -> str:
    """The name of the file, or of the folder of the files."""
    return paths[0].stem if len(paths) == 1 else paths[0].parent.resolve().name


def modality(name: str, x: np.ndarray, rows: int) -> np.ndarray:
    """[N, …] with at least two axes, float64; float32 where that holds the numbers as exactly.

    Raises:
      InputError: these are no numbers, or not of so many rows, or too large for float32.
    """
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise InputError(f"a modality is called {name!r}; use letters, digits, and any of _ . + -")
    if x.dtype.kind in "US":
        raise InputError(
            f"{name} is text, {x.dtype} {x.shape}; a modality is numbers [{rows}, …]: make them of "
            f"sentences, say by sklearn's TfidfVectorizer().fit_transform({name}).toarray(), or "
            f"leave {name} out"
        )
    if x.dtype.kind not in "biuf" or not x.ndim or len(x) != rows or not x.size:
        hints = {rows + 1: " (is its first row a header?)", rows - 1: " (is its first row none?)"}
        hint = hints.get(len(x), "") if x.ndim else ""
        raise InputError(
            f"{name} is {x.dtype} {x.shape}; expected numbers [{rows}, …], a row per label{hint}"
        )
    narrow = x.dtype.itemsize <= 2 or x.dtype == np.float32
    x = x.astype(np.float32 if narrow else np.float64)
    x = x[:, None] if x.ndim == 1 else x
    if (row := first(np.abs(x) > LARGEST)) is not None:
        raise InputError(f"{name}: row {row} is infinite, or too large; NaN means not known")
    return x


def hide(modalities: dict[str, np.ndarray], mask: np.ndarray, names: Sequence[str] | None) -> None:
    """Turns the rows that are masked out to NaN; `names` are those of the mask's columns.

    Raises:
      InputError: the mask has another shape, or other numbers than zeros and ones.
    """
    shape = (len(next(iter(modalities.values()))), len(modalities))
    if mask.shape != shape or mask.dtype.kind not in "biuf" or not np.isin(mask, (0, 1)).all():
        raise InputError(
            f"mask is {mask.dtype} {mask.shape}; expected zeros and ones {shape}, a column each "
            f"for {', '.join(sorted(modalities))}"
        )
    if not names or all(map(str.isdigit, names)):
        names = sorted(modalities)
    if set(names) != set(modalities):
        raise InputError(
            f"mask has columns {', '.join(names)}; expected {', '.join(sorted(modalities))}"
        )
    for name, present in zip(names, mask.T, strict=True):
        modalities[name][present == 0] = np.nan


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
    for part, name in ((0, "train"), (2, "test")):
        if not (split == part).any():
            raise InputError(f"split has no {part}, so no {name} rows; give both, or no split")
    return split.astype(np.int32)


def _groups(groups: np.ndarray, rows: int) -> np.ndarray:
    """[N] int, numbered from 0."""
    if groups.shape != (rows,) or groups.dtype.kind not in "biufUS":
        raise InputError(
            f"groups is {groups.dtype} {groups.shape}; expected integers or words [{rows}]"
        )
    unknown = np.isin(groups, ("", "nan")) if groups.dtype.kind in "US" else np.isnan(groups)
    if (row := first(unknown)) is not None:
        raise InputError(f"groups: row {row} is not known; give it a group of its own")
    return np.unique(groups, return_inverse=True)[1].reshape(rows)
