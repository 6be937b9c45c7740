"""What is said of one's own features before they are learned from: what was read, and guessed."""

import textwrap
from collections.abc import Iterator

import numpy as np

from experiments.common.text import note
from experiments.datasets import Dataset
from experiments.datasets.features import RARE, Table, groups_by_class, missing, rows_by_class

UNEVEN = 0.25  # difference between shares of rows that lack a modality, from which it is said


def what_was_found(table: Table, dataset: Dataset) -> Iterator[str]:
    """Lines that tell what was read, and what may be wrong with it."""
    kind = f"{table.kind}, {len(table.classes)} classes" if table.classes else table.kind
    yield f"{table.name}: {len(table.labels)} rows, {kind}"
    for name, x in table.modalities.items():
        yield f"  {name} {list(x.shape[1:])}{_unknown(x)}"
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    kept = "" if table.groups is None else ", groups kept together"
    drawn = f"drawn with equal shares of the labels{kept}"
    if table.split is not None:
        drawn = "as given" if (table.split == 1).any() else f"validation {drawn}, test as given"
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in parts.items() if part)
    yield f"  {sizes} rows, {drawn}"
    yield from _labels_found(table, dataset)
    notes = [*table.notes, *_parted_groups(table), *missing_elsewhere(dataset)]
    yield from map(note, notes)
    if table.columns > 10 * len(dataset.train.labels):
        yield note(
            f"{table.columns:,} features of {len(dataset.train.labels):,} training rows are easily "
            "learned by heart; fewer features, or a larger --head-dropout, may help"
        )


def _unknown(x: np.ndarray) -> str:
    """How much of a modality is NaN: rows, positions, and single values."""
    nan = np.isnan(x)
    rows, positions = nan.all(axis=tuple(range(1, x.ndim))).sum(), nan.all(axis=-1).sum()
    padding = positions - rows * x[0, ..., 0].size
    single = nan.sum() - positions * x.shape[-1]
    counts = [
        (rows, "missing in {:,} rows"),
        (padding, "padded at {:,} positions"),
        (single, "{:,} unknown values take the mean"),
    ]
    return "".join(", " + text.format(count) for count, text in counts if count)


def _parted_groups(table: Table) -> Iterator[str]:
    if table.groups is None or table.split is None:
        return
    pairs = np.unique(np.stack([table.groups, table.split]), axis=1)
    parted = int((np.bincount(pairs[0]) > 1).sum())
    if parted:
        of = len(np.unique(table.groups))
        yield f"the split parts {parted:,} of {of:,} groups; scores may be too good to be true"


def missing_elsewhere(dataset: Dataset) -> Iterator[str]:
    """Of modalities that rows of one part lack far more often than those of another."""
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    for name in dataset.train.inputs:
        lacks = {which: missing(part.inputs[name]) for which, part in parts.items() if part}
        shares = [x.mean() for x in lacks.values()]
        if max(shares) - min(shares) > UNEVEN:
            count = ", ".join(f"{x.sum():,} of {len(x):,} {which}" for which, x in lacks.items())
            yield f"{name} is missing in {count} rows: it is tested on what it did not learn"


def _labels_found(table: Table, dataset: Dataset) -> Iterator[str]:
    """Rows by class, or where the numbers lie."""
    labels = table.labels
    if table.kind == "regression":
        yield f"  labels {labels.min():.4g} to {labels.max():.4g}, mean {labels.mean():.4g}"
        return
    count, learned = (rows_by_class(x, len(table.classes)) for x in (labels, dataset.train.labels))
    most = np.argsort(-count, kind="stable")
    by_class = ", ".join(f"{table.classes[i]}: {count[i]}" for i in most)
    yield "  " + textwrap.shorten(by_class, 78, placeholder=" …")
    if table.split is None and (rare := (groups_by_class(table) < RARE).sum()):
        fewer = f"{RARE}" if table.groups is None else f"{RARE} groups"
        yield f"Note: rows of classes with fewer than {fewer} ({rare} classes) stay in train."
    if idle := [table.classes[i] for i in np.flatnonzero(learned == 0)]:
        yield textwrap.shorten(f"Note: no training row is of {', '.join(idle)}.", 80)
