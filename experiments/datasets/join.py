"""Rows of several files put together: by their ids, or in their order where no file has ids."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import Part, refuse_twice

SHOWN = 3  # ids in a message
WHOLE = ("split", "mask", "groups")  # what no row may lack


def joined(
    parts: Mapping[str, Part], first: str = "labels"
) -> tuple[dict[str, np.ndarray], np.ndarray | None, list[str]]:
    """The values of all parts with the same row in every place, its id, and what is to be said.

    The rows are those of `first`, or without it all that there are. A row that a modality lacks is
    NaN there.

    Raises:
      InputError: an id is there twice, ids do not fit together, or some parts have none.
    """
    ids = {name: part.ids for name, part in parts.items() if part.ids is not None}
    values = {name: part.values for name, part in parts.items()}
    if not ids:
        return values, None, []
    for name, found in ids.items():
        refuse_twice(found, name)
    if len(ids) < len(parts):
        return values, _counted(ids, values), []
    _refuse_two_counts(ids)
    rows = ids[first] if first in ids else _all(list(ids.values()))
    notes: list[str] = []
    for name, found in ids.items():
        values[name] = _taken(name, values[name], found, rows, notes)
        if first in ids and (others := _without(found, rows)).size:
            notes.append(
                f"{len(others):,} of {len(found):,} rows of {name} have no {first} and are left "
                f"out: {_some(others)}"
            )
    return values, rows, notes


def _all(ids: Sequence[np.ndarray]) -> np.ndarray:
    every = np.concatenate(ids)
    return every[np.sort(np.unique(every, return_index=True)[1])]


def _taken(
    name: str, values: np.ndarray, ids: np.ndarray, rows: np.ndarray, notes: list[str]
) -> np.ndarray:
    """The values of these rows; NaN where there are none."""
    lacking = _without(rows, ids)
    _refuse_spellings(name, lacking, _without(ids, rows))
    if len(lacking) == len(rows):
        raise InputError(
            f"no id of {name} ({_some(ids)}) is among the others ({_some(rows)}); give all files "
            "the same ids, or none and the same order"
        )
    order = np.argsort(ids)
    at = order[np.minimum(np.searchsorted(ids, rows, sorter=order), len(ids) - 1)]
    if not lacking.size:
        return values[at]
    if name in WHOLE:
        raise InputError(f"{name} lacks {len(lacking):,} rows: {_some(lacking)}")
    notes.append(f"{len(lacking):,} of {len(rows):,} rows are missing in {name}: {_some(lacking)}")
    taken = values[at].astype(np.result_type(values.dtype, np.float32))
    taken[ids[at] != rows] = np.nan
    return taken


def _without(ids: np.ndarray, others: np.ndarray) -> np.ndarray:
    return ids[~np.isin(ids, others)]


def _some(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:SHOWN])) + (", …" if len(ids) > SHOWN else "")


def _counted(ids: Mapping[str, np.ndarray], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The ids, where they do nothing but count the rows of files that are as long as the others."""
    lengths = {len(x) for x in values.values()}
    for name, found in ids.items():
        if len(lengths) > 1 or not any(_counts(found, start) for start in (0, 1)):
            none = next(key for key in values if key not in ids)
            raise InputError(
                f"{name} has ids ({_some(found)}) and {none} has none; give all files ids, or none"
            )
    return next(iter(ids.values()))


def _counts(ids: np.ndarray, start: int) -> bool:
    return np.array_equal(ids, np.arange(start, start + len(ids)).astype(str))


def _refuse_two_counts(ids: Mapping[str, np.ndarray]) -> None:
    """Rows that one file counts from 0 and another from 1, each the whole of its rows."""
    begins: dict[tuple[int, int], str] = {}
    for name, found in ids.items():
        numbers = np.sort(found.astype(np.int64)) if all(map(str.isdigit, found)) else found[:0]
        for start in (0, 1):
            if np.array_equal(numbers, np.arange(start, start + len(found))):
                begins[start, len(found)] = name
    for (start, rows), name in begins.items():
        if other := begins.get((1 - start, rows)):
            raise InputError(f"{name} and {other} count their rows from 0 and from 1; number alike")


def _refuse_spellings(name: str, lacking: np.ndarray, others: np.ndarray) -> None:
    """Ids that would be the same, but for zeros or capitals."""
    plain = {_plain(one): one for one in lacking}
    if pair := next(((one, plain[_plain(one)]) for one in others if _plain(one) in plain), None):
        raise InputError(
            f"the id {str(pair[0])!r} of {name} is {str(pair[1])!r} elsewhere; ids are text, write "
            "them alike"
        )


def _plain(one: str) -> str:
    return one.casefold().removesuffix(".0").lstrip("0")
