"""How rows are split, and scaling that is fitted on the training rows only."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.model_selection import train_test_split

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split

Moments = dict[str, tuple[np.ndarray, np.ndarray]]  # {modality: (mean, deviation)}


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


def draw_split(strata: np.ndarray, seed: int) -> np.ndarray:
    """[N] of 0 (train), 1 (validation) and 2 (test): 15 % each of the rows with a stratum ≥ 0.

    The rows are lined up by stratum, in random order within each, and taken at equal distances: of
    n rows of a stratum 0.15 n, rounded up or down. The test rows are the same for all seeds.
    """
    split = np.zeros(len(strata), np.int32)
    count = -(-15 * np.count_nonzero(strata >= 0) // 100)
    for part, draw in ((2, 0), (1, seed % 2**32)):
        rng = np.random.default_rng((part, draw))
        free = np.flatnonzero((split == 0) & (strata >= 0))
        line = free[np.lexsort((rng.random(len(free)), strata[free]))]
        taken = (np.arange(count) + rng.random()) * len(line) / count
        split[line[taken.astype(int)]] = part
    return split


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


def take(split: Split, rows: np.ndarray) -> Split:
    inputs = {modality: values[rows] for modality, values in split.inputs.items()}
    return Split(inputs, split.labels[rows])


def standardise(train: Split, *others: Split) -> tuple[Split, ...]:
    """Every split scaled by the moments of train."""
    found = moments(train)
    return tuple(s._replace(inputs=scaled(s.inputs, found)) for s in (train, *others))


def scaled(inputs: Mapping[str, Any], found: Moments, xp: Any = np) -> dict[str, Any]:
    """`scale` of every modality by its `moments`."""
    return {name: scale(x, *found[name], xp) for name, x in inputs.items()}


def scale(x: Any, mean: np.ndarray, deviation: np.ndarray, xp: Any = np) -> Any:
    """Mean 0 and standard deviation 1 for each feature [N, …, d], in float32.

    At a position of which something is known, what is not known (NaN) becomes 0, the mean. A
    position that is all NaN stays so. `xp` is numpy, or jax.numpy in a program.
    """
    x = (x.astype(np.float32) - mean) / deviation
    unknown = xp.isnan(x)
    unknown = unknown & ~unknown.all(axis=-1, keepdims=True)
    return xp.where(unknown, np.float32(0), x)


def moments(train: Split) -> Moments:
    """Mean and deviation of every modality, over rows and positions, float32.

    NaN is not counted. A feature that is constant in train has the deviation 1, and becomes 0.
    """
    return {
        name: (mean.astype(np.float32), deviation.astype(np.float32))
        for name, x in train.inputs.items()
        for mean, deviation in [_moments(x)]
    }


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (1 if it is 0) of each feature [N, …, d], NaN left out."""
    axes = tuple(range(values.ndim - 1))
    some_rows = np.array_split(values, len(values) // 1000 + 1)  # float64 of all takes much memory
    count = np.maximum(sum(np.sum(~np.isnan(x), axis=axes) for x in some_rows), 1)
    mean = sum(np.nansum(x, axis=axes, dtype=np.float64) for x in some_rows) / count
    square = sum(np.nansum((x - mean) ** 2, axis=axes) for x in some_rows)
    deviation = np.sqrt(square / count)
    return mean, np.where(deviation > 0, deviation, 1)
