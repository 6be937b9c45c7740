"""What is fitted on training rows only: a validation split carved from them, min-max scaling."""

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
