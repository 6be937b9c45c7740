"""ROSMAP and BRCA multi-omics: classes of patients from mRNA, DNA methylation and miRNA.

Inputs are float32 [N, width], "mRNA", "methylation" and "miRNA", as published (not scaled); labels
are [N] int32. There is no validation split (see ``preprocess.carve_validation``).

    ROSMAP    widths 200, 200, 200      2 classes    245 train, 106 test
    BRCA      widths 1000, 1000, 503    5 classes    612 train, 263 test

Source: github.com/txWang/MOGONET (MIT licence), Wang et al., MOGONET, Nature Communications 2021.
Files, without header lines: ``{1,2,3}_{tr,te}.csv`` and ``labels_{tr,te}.csv``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.download import Remote, fetch, sha256
from experiments.datasets.numbers import to_float32
from experiments.datasets.prepared import (
    SourceBuilder,
    cache_root,
    fingerprint,
    prepare,
    read_split,
)

MODALITIES = ("mRNA", "methylation", "miRNA")
_URL = "https://raw.githubusercontent.com/txWang/MOGONET/32d9066b7fe289b3f7cdb496a5668834079c274c"
_SUFFIXES = {"train": "tr", "test": "te"}


class Cohort(NamedTuple):
    """One of the data sets; ``files`` gives name → (bytes, git blob SHA-1) as published.

    ``rows`` are those of train and test, ``frequencies`` the training rows by class.
    """

    name: str
    rows: tuple[int, int]
    frequencies: tuple[int, ...]
    widths: tuple[int, int, int]
    classes: tuple[str, ...]
    files: dict[str, tuple[int, str]]


COHORTS = {
    "rosmap": Cohort(
        "ROSMAP",
        (245, 106),
        (118, 127),
        (200, 200, 200),
        ("Normal control", "Alzheimer's disease"),
        {
            "1_tr.csv": (1225000, "e35c70223b8506acf45ee46509356db39ea70ea4"),
            "1_te.csv": (530000, "c52d01e785471c42a17f0aaeeae5c65822214978"),
            "2_tr.csv": (1225000, "64378292cd1ce30af3e2b4462e25de05f498fbc6"),
            "2_te.csv": (530000, "c2cc6718934085d74a4260c6268e4f023dad7ce3"),
            "3_tr.csv": (1225000, "7a5e82a9a2d08b58be531c6c6e9dd657d956a626"),
            "3_te.csv": (530000, "266f6f6292f1bf8305c20b9362bdb033d6bc5ea5"),
            "labels_tr.csv": (6125, "535f5fa69c9b2e61f1f31ca6e278c24c5f033f63"),
            "labels_te.csv": (2650, "6773b84fcd8e2526d020f7f7f3c9440290bff9c7"),
        },
    ),
    "brca": Cohort(
        "BRCA",
        (612, 263),
        (80, 92, 32, 305, 103),
        (1000, 1000, 503),
        ("Normal-like", "Basal-like", "HER2-enriched", "Luminal A", "Luminal B"),
        {
            "1_tr.csv": (15300000, "f9592a73980ecb37f332b7a6d9b57b5a99078090"),
            "1_te.csv": (6575000, "d34625f7875308260b4b83b584c5b8eeffd621da"),
            "2_tr.csv": (15300000, "c58c38acd33f14dd99295c6eb629cc56885af98e"),
            "2_te.csv": (6575000, "ac5dd437b58659090eb6934e7e3a4a9a52a4a553"),
            "3_tr.csv": (7695900, "08e7b9a8c490892df01a474973c3e53efc76beb7"),
            "3_te.csv": (3307225, "7f8a67831896b6302f446dca88f0aeac71103635"),
            "labels_tr.csv": (15300, "500c4965cfb07b192ddee944a022d02e2481ef30"),
            "labels_te.csv": (6575, "44fd92df634fa828e26c9a6766af640987a294ae"),
        },
    ),
}


class Source(NamedTuple):
    """What to read: a cohort and the folder of its files."""

    cohort: Cohort
    folder: Path


class MultiOmics(SourceBuilder):
    """TFDS builder; ``source`` is a Source."""

    VERSION = tfds.core.Version("1.0.0")
    source: Source

    def _info(self) -> tfds.core.DatasetInfo:
        cohort = self.source.cohort
        features = {
            modality: tfds.features.Tensor(shape=(width,), dtype=np.float32)
            for modality, width in zip(MODALITIES, cohort.widths, strict=True)
        }
        features["label"] = tfds.features.ClassLabel(names=list(cohort.classes))
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{cohort.name}: mRNA, DNA methylation and miRNA of patients, with labels.",
            homepage="https://github.com/txWang/MOGONET",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        splits = {split: read_tables(self.source, split) for split in _SUFFIXES}
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def _generate_examples(self, rows: Split) -> Iterator[tuple[int, dict]]:
        for i, label in enumerate(rows.labels):
            yield i, {name: rows.inputs[name][i] for name in MODALITIES} | {"label": int(label)}


def load(
    name: str,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    download: bool = False,
) -> Dataset:
    """Load "rosmap" or "brca", preparing it first if need be.

    ``data_dir`` holds the eight files, or a folder with the cohort's name that does; without it
    they are looked for in the cache directory, where ``download=True`` puts them.
    """
    if name.lower() not in COHORTS:
        raise InputError(f"there is no multi-omics data set {name!r}: {' and '.join(COHORTS)} are")
    cohort = COHORTS[name.lower()]
    folder = _folder(cohort, data_dir, cache_dir)
    if download:
        for remote in remotes(cohort):
            fetch(remote, folder)
    _require_files(cohort, folder)
    # Other splits of the same patients have files of the same sizes: go by content.
    contents = [sha256(folder / file) for file in cohort.files]
    builder = prepare(
        lambda where: MultiOmics(Source(cohort, folder), data_dir=where),
        f"{MultiOmics.name}_{name.lower()}",
        fingerprint((), str(MultiOmics.VERSION), *contents),
        cache_dir,
    )
    train, test = (_to_split(read_split(builder, split)) for split in _SUFFIXES)
    return Dataset(cohort.name, "real", cohort.classes, train, None, test)


def sample(name: str, seed: int = 0) -> Dataset:
    """Synthetic rows in the shapes of "rosmap" or "brca", to see that the code runs, and how fast.

    Classes are as frequent as in the published training rows. A tenth of the features of every
    modality is uniform noise around the class's own mean, the others uniform noise.
    """
    cohort, rng = COHORTS[name.lower()], np.random.default_rng(seed)
    means = [rng.random((len(cohort.classes), width // 10)) for width in cohort.widths]

    def rows(count: int) -> Split:
        share = np.array(cohort.frequencies) / sum(cohort.frequencies)
        labels = rng.choice(len(share), count, p=share).astype(np.int32)
        labels[: len(share)] = np.arange(len(share))  # each at least once
        inputs = {}
        for modality, width, mean in zip(MODALITIES, cohort.widths, means, strict=True):
            x = rng.random((count, width))
            x[:, : mean.shape[1]] = (x[:, : mean.shape[1]] + 0.3 * mean[labels]) / 1.3
            inputs[modality] = x.astype(np.float32)
        return Split(inputs, labels)

    train, test = (rows(count) for count in cohort.rows)
    return Dataset(cohort.name, "sample", cohort.classes, train, None, test)


def remotes(cohort: Cohort) -> list[Remote]:
    """Where the published files are, with their sizes and checksums."""
    return [
        Remote(f"{_URL}/{cohort.name}/{file}", size, blob)
        for file, (size, blob) in cohort.files.items()
    ]


def read_tables(source: Source, split: str) -> Split:
    """Read and check the four files of a split."""
    cohort, folder = source
    suffix = _SUFFIXES[split]
    labels = _read_labels(folder / f"labels_{suffix}.csv", len(cohort.classes))
    inputs = {}
    for i, modality in enumerate(MODALITIES):
        path = folder / f"{i + 1}_{suffix}.csv"
        table = _read_csv(path)
        if table.shape != (len(labels), cohort.widths[i]):
            raise InputError(
                f"{path} ({modality}) has {table.shape[0]} rows of {table.shape[1]} numbers; "
                f"expected {len(labels)} rows, as labels_{suffix}.csv has, of {cohort.widths[i]}"
            )
        inputs[modality] = table
    return Split(inputs, labels)


def _to_split(columns: dict[str, np.ndarray]) -> Split:
    inputs = {modality: columns[modality] for modality in MODALITIES}
    return Split(inputs, columns["label"].astype(np.int32))


def _folder(cohort: Cohort, data_dir: Path | None, cache_dir: Path | None) -> Path:
    if data_dir is None:
        return cache_root(cache_dir) / "downloads" / cohort.name
    data_dir = Path(data_dir).expanduser()
    inner = data_dir / cohort.name
    return inner if inner.is_dir() else data_dir


def _require_files(cohort: Cohort, folder: Path) -> None:
    missing = [file for file in cohort.files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{folder} has no {', '.join(missing)} of {cohort.name}; ask for the download, or get "
            f"them from {_URL}/{cohort.name}/ and give their folder as the data directory"
        )


def _read_labels(path: Path, classes: int) -> np.ndarray:
    values = _read_csv(path)
    if values.shape[1] != 1:
        raise InputError(f"{path} has {values.shape[1]} columns; expected one label per line")
    labels = values[:, 0]
    bad = (labels != np.round(labels)) | (labels < 0) | (labels >= classes)
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{path}: line {row + 1} is {labels[row]:g}; "
            f"expected a whole number from 0 to {classes - 1}"
        )
    return labels.astype(np.int32)


def _read_csv(path: Path) -> np.ndarray:
    """A table of finite numbers, [rows, columns] float32."""
    try:
        lines = path.read_text().strip().splitlines()
        table = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2) if lines else None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from error
    if table is None:
        raise InputError(f"{path} is empty: get it again")
    table = to_float32(table)
    bad = ~np.isfinite(table)
    if bad.any():
        row, column = np.argwhere(bad)[0] + 1
        raise InputError(f"{path}: line {row}, column {column} is NaN or infinite")
    return table
