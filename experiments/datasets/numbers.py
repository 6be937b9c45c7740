"""From numbers of any kind to those that a model is given."""

import numpy as np
from numpy.typing import ArrayLike


def to_float32(values: ArrayLike) -> np.ndarray:
    """float32; a number too large for it becomes infinite, which every reader refuses."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(np.float32, copy=False)
