"""How rows are split, and scaling that is fitted on the training rows only."""

import numpy as np
from sklearn.model_selection import train_test_split

from experiments.datasets import Split
from experiments.errors import InputError


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
    train, validation = (_take(split, np.sort(part)) for part in rows)
    return train, validation


def draw_split(labels: np.ndarray, stratify: bool, seed: int) -> np.ndarray:
    """[N] of 0 (train, 70 %), 1 (validation) and 2 (test, 15 % each); the test rows are the same
    for all seeds. With `stratify`, labels [N] keep their proportions."""
    split = np.zeros(len(labels), np.int32)
    rest = np.arange(len(labels))
    for part, share, draw in ((2, 0.15, 0), (1, 0.15 / 0.85, seed)):
        groups = labels[rest] if stratify else None
        try:
            rest, chosen = train_test_split(
                rest, test_size=share, random_state=draw, stratify=groups
            )
        except ValueError as error:
            raise InputError(
                f"cannot hold out rows of every class: {error}; give a split of your own"
            ) from error
        split[chosen] = part
    return split


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


def _take(split: Split, rows: np.ndarray) -> Split:
    inputs = {modality: values[rows] for modality, values in split.inputs.items()}
    return Split(inputs, split.labels[rows])


def standardise(train: Split, *others: Split) -> tuple[Split, ...]:
    """Mean 0 and standard deviation 1 in train for each feature [N, …, d], over rows and positions.

    A feature that is constant in train becomes 0 there. NaN is not counted; where a row knows
    something of a modality, what it does not know becomes 0, the mean.
    """
    scaled: list[dict[str, np.ndarray]] = [{} for _ in (train, *others)]
    for modality, values in train.inputs.items():
        axes = tuple(range(values.ndim - 1))
        known = ~np.isnan(values)
        count = np.maximum(known.sum(axis=axes), 1)
        mean = values.sum(axis=axes, where=known, dtype=np.float64) / count
        square = np.sum((values - mean) ** 2, axis=axes, where=known)
        deviation = np.sqrt(square / count)
        deviation = np.where(deviation > 0, deviation, 1)
        for inputs, split in zip(scaled, (train, *others), strict=True):
            x = ((split.inputs[modality] - mean) / deviation).astype(np.float32)
            unknown = np.isnan(x)
            some = ~unknown.all(axis=tuple(range(1, x.ndim)), keepdims=True)
            inputs[modality] = np.where(unknown & some, np.float32(0), x)
    return tuple(
        split._replace(inputs=inputs)
        for split, inputs in zip((train, *others), scaled, strict=True)
    )
