"""Reading .npz and .npy files from outside: arrays and sparse matrices, nothing is unpickled."""

import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import scipy.sparse

from experiments.common.errors import InputError
from experiments.common.memory import total_memory

DAMAGE = (  # what NumPy, SciPy and zipfile raise
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    NotImplementedError,
    zlib.error,
    zipfile.BadZipFile,
)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by their names; a sparse matrix is the one called after the file.

    Raises:
      InputError: it cannot be read, holds objects, or a sparse matrix too large to be filled up.
    """
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise zipfile.BadZipFile("it is no archive of arrays")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as file:
                if {"format", "shape", "data"} <= set(file.files):
                    return {path.stem: _sparse(path)}
                return {name: _array(file, name) for name in file.files}
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path} cannot be read as an .npz file of plain arrays ({error}); "
            "write it with np.savez, fixed-width strings and no object arrays"
        ) from error


def _sparse(path: Path) -> np.ndarray:
    matrix = scipy.sparse.load_npz(path)
    if hasattr(matrix, "check_format"):
        matrix.check_format()  # filling up writes where the indices say, whatever they are
    return dense(matrix, str(path))


def _array(file: np.lib.npyio.NpzFile, name: str) -> np.ndarray:
    try:
        return file[name]
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InputError(
            f"{name} is an object array, and only plain arrays are read; save numbers as "
            f"np.array({name}, float), and words as fixed-width strings, np.array({name}, str)"
        ) from error


def read_npy(path: Path) -> np.ndarray:
    """The array of an .npy file.

    Raises:
      InputError: it cannot be read, or holds objects.
    """
    try:
        with path.open("rb") as handle, warnings.catch_warnings(action="ignore"):  # of Python 2
            return np.lib.format.read_array(handle, allow_pickle=False)
    except (*DAMAGE, tokenize.TokenError) as error:
        raise InputError(
            f"{path} cannot be read as an .npy file of numbers or words ({error}); write it with "
            "np.save, and no object array"
        ) from error


def dense(matrix: scipy.sparse.spmatrix, source: str) -> np.ndarray:
    """A sparse matrix filled up with zeros.

    Raises:
      InputError: it would take more than a quarter of the memory.
    """
    rows, columns = matrix.shape
    size, room = rows * columns * matrix.dtype.itemsize, total_memory() / 4
    if size > room:
        raise InputError(
            f"{source}: {rows:,} × {columns:,} numbers filled up with zeros take "
            f"{size / 2**30:.1f} GiB, more than a quarter of the memory, {room / 2**30:.1f} GiB; "
            "choose fewer columns, or sum them up with sklearn.decomposition.TruncatedSVD"
        )
    return matrix.toarray()
