"""Reading .npz files from outside: plain arrays only, nothing is unpickled."""

import zipfile
from pathlib import Path

import numpy as np

from experiments.common.errors import InputError


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by their names.

    Raises:
      InputError: it cannot be read, or holds objects.
    """
    try:
        with path.open("rb") as handle:
            if not zipfile.is_zipfile(handle):
                raise zipfile.BadZipFile("it is no archive of arrays")
            handle.seek(0)
            with np.load(handle, allow_pickle=False) as file:
                return dict(file)
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as an .npz file of plain arrays ({error}); "
            "write it with np.savez, fixed-width strings and no object arrays"
        ) from error
