"""Data sets of several views as one .npz file each, as `experiments.features` reads them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn import datasets

from experiments.common.errors import InputError
from experiments.datasets import Dataset, mosi, multiomics
from experiments.datasets.preprocess import join

# scikit-learn's own, with the columns that make a view
COLUMNS = {
    "digits": {"top": slice(0, 32), "bottom": slice(32, 64)},
    "breast_cancer": {"mean": slice(0, 10), "error": slice(10, 20), "worst": slice(20, 30)},
    "wine": {"first": slice(0, 6), "second": slice(6, 13)},
    "iris": {"sepal": slice(0, 2), "petal": slice(2, 4)},
    "diabetes": {"body": slice(0, 4), "serum": slice(4, 10)},
}
PUBLISHED: dict[str, Callable[[Path], Dataset]] = {
    "rosmap": lambda folder: multiomics.load("rosmap", folder),
    "mosi": lambda folder: _pooled(mosi.load(folder)),
}


def files_of(named: str, folder: Path) -> tuple[Path, ...]:
    """The files of a set: an .npz file, those of a directory, `digits` and the like, `rosmap=DIR`
    or `mosi=DIR`; what has to be made is written into the folder."""
    name, _, where = named.partition("=")
    path = Path(named)
    if path.is_dir():
        return tuple(sorted(path.glob("*.csv")))
    if path.is_file():
        return (path,)
    made = folder / f"{name}.npz"
    if name in COLUMNS:
        table = getattr(datasets, f"load_{name}")()
        views = {view: table.data[:, columns] for view, columns in COLUMNS[name].items()}
        np.savez(made, **views, labels=table.target)
    elif name in PUBLISHED and where:
        arrays: dict[str, Any] = _with_split(PUBLISHED[name](Path(where)))
        np.savez(made, **arrays)
    else:
        known = ", ".join([*COLUMNS, *(f"{published}=DIR" for published in PUBLISHED)])
        raise InputError(f"{named}: give an .npz file, a folder of .csv files, or one of {known}")
    return (made,)


def _with_split(dataset: Dataset) -> dict[str, np.ndarray]:
    """The rows of both parts, and which is of which; validation rows are not chosen yet."""
    rows = join(dataset.train, dataset.test)
    split = np.repeat([0, 2], [len(dataset.train.labels), len(dataset.test.labels)])
    return rows.inputs | {"labels": rows.labels, "split": split}


def _pooled(parts: Sequence[mosi.Utterances]) -> Dataset:
    """Utterances without what was said before and after."""
    train, test = (part.rows for part in parts)
    return Dataset("CMU-MOSI", "real", mosi.CLASSES, train, None, test)
