"""Reading pickles from outside: NumPy arrays in built-in containers, and nothing is executed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError


def read_pickle(path: Path) -> Any:
    """What a pickle of arrays, numbers, strings, lists, tuples and dicts holds.

    Raises:
      InputError: it asks for anything else, or is no whole pickle.
    """
    try:
        with path.open("rb") as file:
            return _Arrays(file, encoding="latin1").load()  # Python 2's strings hold its arrays
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    except Exception as error:  # the bytes of a damaged pickle can call for any operation
        raise InputError(f"{path} cannot be read as a pickle ({error}): get it again") from error


def _encode(text: str, encoding: str) -> bytes:
    """How protocols below 3 write bytes; the codec of their name, no other."""
    if encoding != "latin1":
        raise InputError(f"asks for the codec {encoding!r}; expected a pickle of NumPy arrays")
    return text.encode(encoding)


_MAKE_ARRAY = np.zeros(1).__reduce__()[0]
_MAKE_ARRAY_IN_PLACE = np.zeros(1).__reduce_ex__(5)[0]
_ALLOWED = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # NumPy 1 and 2 call their modules differently.
    ("numpy.core.multiarray", "_reconstruct"): _MAKE_ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _MAKE_ARRAY,
    ("numpy.core.numeric", "_frombuffer"): _MAKE_ARRAY_IN_PLACE,
    ("numpy._core.numeric", "_frombuffer"): _MAKE_ARRAY_IN_PLACE,
}


class _Arrays(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(
                f"asks for {module}.{name}, which could do anything; expected a pickle of NumPy "
                "arrays in lists, tuples or dicts"
            )
        return _ALLOWED[module, name]
