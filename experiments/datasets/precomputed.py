"""Features computed elsewhere (BERT, ResNet, …), in place of a data set's own, matched by id.

An .npz file with ``ids`` (N strings) and ``text`` [N, d] or ``image`` [N, d] or both, saved as

    np.savez("features.npz", ids=np.array(["0012349", …]), text=text)
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.npz import read_npz
from experiments.datasets.numbers import to_float32

MODALITIES = ("text", "image")


class Features(NamedTuple):
    """Features by id; ``pick`` puts them in a given order."""

    path: Path
    row_of: dict[str, int]
    arrays: dict[str, np.ndarray]  # modality → [N, d] float32

    def pick(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The features of these ids, in this order."""
        missing = [name for name in ids if name not in self.row_of]
        if missing:
            raise InputError(
                f"{self.path} has no features for {len(missing)} of {len(ids)} ids "
                f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}); "
                f"its own ids look like {', '.join(list(self.row_of)[:3])}"
            )
        rows = [self.row_of[name] for name in ids]
        return {modality: values[rows] for modality, values in self.arrays.items()}


def read_features(path: Path) -> Features:
    """Read and check an .npz file of the form above."""
    content = read_npz(path)
    found = ", ".join(content) or "nothing"
    if "ids" not in content or not set(MODALITIES) & set(content):
        raise InputError(f"{path} holds {found}; expected ids and text, image or both")
    unknown = set(content) - {"ids", *MODALITIES}
    if unknown:
        raise InputError(f"{path} holds {found}; {', '.join(sorted(unknown))} has no use here")
    ids = content.pop("ids")
    if ids.ndim != 1 or ids.dtype.kind not in "US":
        raise InputError(f"{path}: ids is {ids.dtype} {ids.shape}; expected N strings")
    names = ids.astype(str).tolist()
    if len(set(names)) != len(names):
        raise InputError(f"{path}: ids has {len(names)} entries, only {len(set(names))} different")
    arrays = {key: _checked(path, key, values, names) for key, values in content.items()}
    return Features(path, {name: row for row, name in enumerate(names)}, arrays)


def _checked(path: Path, key: str, values: np.ndarray, names: list[str]) -> np.ndarray:
    if values.ndim != 2 or len(values) != len(names) or values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: {key} is {values.dtype} {values.shape}; "
            f"expected numbers of shape ({len(names)}, d), one row per id"
        )
    values = to_float32(values)
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise InputError(
            f"{path}: the {key} features of id {names[bad.argmax()]} hold NaN or infinity"
        )
    return values
