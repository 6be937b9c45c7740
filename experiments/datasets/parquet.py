"""Reading .parquet files, as pandas writes them; needs the extra "omics"."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Frame


def read_parquet(path: Path) -> Frame:
    """Its columns; the index, unless it counts the rows, is a first column without a name.

    Raises:
      InputError: it cannot be read, or pandas or pyarrow are not installed.
    """
    try:
        import pandas as pd
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path}: .parquet files need pip install -e '.[omics]'") from error
    try:
        table = pd.read_parquet(path, engine="pyarrow")
    except Exception as error:  # those of pyarrow and pandas have little in common
        raise InputError(f"{path} cannot be read as a .parquet file: {error}") from error
    if not table.size:
        raise InputError(f"{path} holds no line of numbers")
    frame = frame_of(table, str(path))
    if isinstance(table.index, pd.RangeIndex) and table.index[0] == 0 and table.index.step == 1:
        return frame
    index = table.index.astype(str).to_numpy().astype(str)
    names = ("", *(frame.names or ()))
    return frame._replace(names=names, columns=[index, *frame.columns])


def frame_of(table: Any, source: str) -> Frame:
    """The columns of a pandas.DataFrame."""
    columns = [_column(table[name]) for name in table]
    return Frame(source, tuple(map(str, table.columns)), columns)


def _column(values: Any) -> np.ndarray:
    """Numbers as they are, NaN for what is not known; anything else as text."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(values.dtype) or not pd.api.types.is_numeric_dtype(values.dtype):
        return values.astype(object).where(values.notna(), "").astype(str).to_numpy().astype(str)
    if values.isna().any():
        return values.to_numpy(np.float64, na_value=np.nan)
    return values.to_numpy()
