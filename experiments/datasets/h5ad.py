"""Reading .h5ad and .h5mu files, of anndata and mudata; needs the extra "omics".

A modality is X, called after the file, or of .h5mu one for each of `mod`. Rows are joined by
obs_names. Of obs, the file's or else a modality's, are read the columns groups and split, and as
labels the one that is named, or called labels or label.
"""

import importlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from experiments.common.errors import InputError
from experiments.datasets.columns import Part
from experiments.datasets.npz import dense
from experiments.datasets.parquet import frame_of

LABELS = ("labels", "label")


def read_h5ad(path: Path, labels: str = "") -> dict[str, Part]:
    """{name: X, and "labels", "groups", "split" of obs, where there are any}.

    Raises:
      InputError: it cannot be read, or its library is not installed.
    """
    found = _opened(path)
    modalities = {path.stem: found} if path.suffix == ".h5ad" else dict(found.mod)
    parts = {name: _modality(x, f"{path}, {name}") for name, x in modalities.items()}
    tables = [found, *modalities.values()]
    for key, column in _columns(tables, labels):
        table = next(table for table in tables if column in table.obs)
        values = frame_of(table.obs[[column]], str(path)).columns[0]
        parts[key] = Part(values, _names(table.obs_names))
    return parts


def _opened(path: Path) -> Any:
    library = "mudata" if path.suffix == ".h5mu" else "anndata"
    try:
        module = importlib.import_module(library)
    except ImportError as error:
        raise InputError(f"{path}: {path.suffix} files need pip install -e '.[omics]'") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # of old files
            return getattr(module, f"read_{path.suffix[1:]}")(path)
    except Exception as error:  # whatever is wrong in a file, each library has errors of its own
        what = str(error).split("\n")[0]
        raise InputError(f"{path} cannot be read as an {path.suffix} file: {what}") from error


def _modality(found: Any, source: str) -> Part:
    if found.X is None:
        raise InputError(f"{source} has no X, only layers; copy one of them to X")
    x = dense(found.X, source) if scipy.sparse.issparse(found.X) else np.asarray(found.X)
    return Part(x, _names(found.obs_names), tuple(map(str, found.var_names)))


def _names(index: Any) -> np.ndarray:
    return index.astype(str).to_numpy().astype(str)


def _columns(tables: Sequence[Any], labels: str) -> Iterator[tuple[str, str]]:
    """Keys, and the columns of obs that hold them."""
    names = {str(name) for table in tables for name in table.obs}
    chosen = next((name for name in ([labels] if labels else LABELS) if name in names), "")
    if chosen:
        yield "labels", chosen
    yield from ((name, name) for name in ("groups", "split") if name in names and name != chosen)
