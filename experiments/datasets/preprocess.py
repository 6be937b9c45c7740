"""How rows are split, and scaling that is fitted on the training rows only."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, train_test_split

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split

Moments = Mapping[str, tuple[np.ndarray, np.ndarray]]  # {modality: (mean, deviation)}


def carve_validation(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(train, validation) from a split with class labels [N]; classes keep their proportions."""
    if split.labels.ndim != 1:
        raise ValueError(f"carve_validation needs labels [N], got shape {split.labels.shape}")
    try:
        rows = train_test_split(
            np.arange(len(split.labels)),
            test_size=fraction,
            random_state=seed,
            stratify=split.labels,
        )
    except ValueError as error:
        raise InputError(
            f"cannot carve {fraction!r} of {len(split.labels)} rows for validation: {error}"
        ) from error
    train, validation = (take(split, np.sort(part)) for part in rows)
    return train, validation


def draw_split(
    strata: np.ndarray,
    seed: int,
    groups: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """[N] of 0 (train), 1 (validation) and 2 (test): 15 % each of the rows with a stratum ≥ 0.

    The rows are lined up by stratum, in random order within each, and taken at equal distances: of
    n rows of a stratum 0.15 n, rounded up or down. Of `groups` [N] whole ones are taken, a seventh
    of the rows, or one group where there are fewer than seven. The test rows are the same for all
    seeds. A part that is `given`, in a split [N], is not drawn.

    Raises:
      InputError: fewer than three groups can be held out.
    """
    split = np.zeros(len(strata), np.int32) if given is None else given.copy()
    count = -(-15 * np.count_nonzero(strata >= 0) // 100)
    for part, draw, counts in ((2, 0, (3, 7)), (1, seed % 2**32, (2, 6))):
        if (split == part).any():
            continue
        rng = np.random.default_rng((part, draw))
        if groups is not None:
            free = np.where(split == 0, strata, -1)
            split[_held_out_groups(free, groups, counts, rng)] = part
            continue
        free = np.flatnonzero((split == 0) & (strata >= 0))
        line = _line(strata, free, rng)
        taken = (np.arange(count) + rng.random()) * len(line) / count
        split[line[taken.astype(int)]] = part
    return split


def folds(
    strata: np.ndarray, groups: np.ndarray | None, count: int, repeats: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Repeated cross-validation: (rows, held out) of `count` folds, `repeats` times over.

    Row numbers in ascending order. In each repeat every row with a stratum ≥ 0 is held out once, in
    folds of as many rows, or one more, and of as many of each stratum; a row of stratum -1 never
    is. Rows of one of the `groups` [N] are held out together, and no group with a row of stratum -1
    is; the folds are as even as whole groups allow.

    Raises:
      InputError: there are fewer rows, or groups, that can be held out than folds.
    """
    found = []
    for repeat in range(repeats):
        rng = np.random.default_rng((seed % 2**32, repeat))
        for held_out in _deal(strata, groups, (count, count), rng):
            rows = np.setdiff1d(np.arange(len(strata)), held_out)
            found.append((rows, np.sort(held_out)))
    return found


def _deal(
    strata: np.ndarray,
    groups: np.ndarray | None,
    counts: tuple[int, int],
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """The rows that can be held out in parts, as many as there are groups between `counts`."""
    free = strata >= 0
    if groups is not None:
        free &= ~np.isin(groups, groups[~free])
    rows = np.flatnonzero(free)
    units = len(rows) if groups is None else len(np.unique(groups[rows]))
    if units < counts[0]:
        raise InputError(
            f"{units} {'rows' if groups is None else 'groups'} can be held out, in {counts[0]} "
            "parts; there are too few"
        )
    count = min(units, counts[1])
    if groups is None:
        line = _line(strata, rows, rng)
        return [line[start::count] for start in range(count)]
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=int(rng.integers(2**32)))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # of small strata
        parts = list(splitter.split(rows, strata[rows], groups[rows]))
    return [rows[held_out] for _, held_out in parts]


def _held_out_groups(
    strata: np.ndarray, groups: np.ndarray, counts: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """The rows of whole groups that come nearest to an equal share of every stratum."""
    parts = _deal(strata, groups, counts, rng)
    share = np.bincount(strata[np.concatenate(parts)]) / len(parts)
    far = [np.abs(np.bincount(strata[p], minlength=len(share)) - share).sum() for p in parts]
    return parts[int(np.argmin(far))]


def _line(strata: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The rows by stratum, in random order within each."""
    return rows[np.lexsort((rng.random(len(rows)), strata[rows]))]


def join(first: Split, second: Split) -> Split:
    """The rows of one after those of the other."""
    inputs = {name: np.concatenate([x, second.inputs[name]]) for name, x in first.inputs.items()}
    return Split(inputs, np.concatenate([first.labels, second.labels]))


def redraw(dataset: Dataset, seed: int, test: float = 0.3) -> Dataset:
    """All rows of the published train and test parts, split anew; classes keep their proportions.

    Random 70/30 splits are what the results of MOGONET (2021) are means over.
    """
    train, other = carve_validation(join(dataset.train, dataset.test), test, seed)
    return dataset._replace(name=f"{dataset.name}, random splits", train=train, test=other)


def min_max(train: Split, *others: Split) -> tuple[Split, ...]:
    """Scale each feature [N, d] by its least and greatest value in train, to 0 … 1 there.

    A feature that is constant in train becomes 0 there. Other splits may leave the interval.
    """
    scaled: list[dict[str, np.ndarray]] = [{} for _ in (train, *others)]
    for modality, values in train.inputs.items():
        low, high = values.min(axis=0), values.max(axis=0)
        width = np.where(high > low, high - low, 1).astype(values.dtype)
        for inputs, split in zip(scaled, (train, *others), strict=True):
            inputs[modality] = (split.inputs[modality] - low) / width
    return tuple(
        split._replace(inputs=inputs)
        for split, inputs in zip((train, *others), scaled, strict=True)
    )


def take(split: Split, rows: Any) -> Split:
    """The rows with these numbers, an array of NumPy or, under jit, of JAX."""
    inputs = {modality: values[rows] for modality, values in split.inputs.items()}
    return Split(inputs, split.labels[rows])


def standardise(train: Split, *others: Split) -> tuple[Split, ...]:
    """Every split scaled by the moments of train."""
    found = moments(train)
    return tuple(s._replace(inputs=scaled(s.inputs, found)) for s in (train, *others))


def scaled(inputs: Mapping[str, np.ndarray], found: Moments) -> dict[str, np.ndarray]:
    """`scale` of every modality by its `moments`."""
    return {name: scale(x, *found[name]) for name, x in inputs.items()}


def scale(x: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 for each feature [N, …, d]: in float64, then float32.

    At a position of which something is known, what is not known (NaN) becomes 0, the mean. A
    position that is all NaN stays so.
    """
    out = np.empty(x.shape, np.float32)
    for rows in _some_rows(x):
        some = (x[rows] - mean) / deviation
        unknown = np.isnan(some)
        some[unknown & ~unknown.all(axis=-1, keepdims=True)] = 0
        out[rows] = some
    return out


def moments(train: Split) -> Moments:
    """Mean and deviation of every modality, over rows and positions, float64.

    NaN is not counted. A feature that is constant in train has the deviation 1, and becomes 0.
    """
    return {name: _moments(x) for name, x in train.inputs.items()}


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (1 if it is 0) of each feature [N, …, d], NaN left out."""
    axes = tuple(range(values.ndim - 1))
    low = np.fmin.reduce(values, axis=axes, dtype=np.float64)
    low = np.where(np.isnan(low), 0, low)  # never known
    width = np.fmax.reduce(values, axis=axes, dtype=np.float64) - low
    width = np.where(width > 0, width, 1)
    count, total, square = (np.zeros_like(low) for _ in range(3))
    for rows in _some_rows(values):  # float64 of all takes much memory
        count += np.sum(~np.isnan(values[rows]), axis=axes)
        total += np.nansum((values[rows] - low) / width, axis=axes)
    share = total / np.maximum(count, 1)  # exactly 0 where all are the same
    for rows in _some_rows(values):
        square += np.nansum(((values[rows] - low) / width - share) ** 2, axis=axes)
    deviation = np.sqrt(square / np.maximum(count, 1)) * width
    return low + share * width, np.where(deviation > 0, deviation, 1)


def _some_rows(values: np.ndarray) -> list[slice]:
    """A thousand each."""
    return [slice(start, start + 1000) for start in range(0, len(values), 1000)]
