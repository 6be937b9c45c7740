"""MM-IMDB: genres of movies from plot and poster (multi-label), as features or raw.

    features   "text" [N, 300], "image" [N, 4096] float32, from multimodal_imdb.hdf5
    raw        "text" [N] str, "image" [N, h, w, 3] uint8, from the folder mmimdb/

Labels are [N, 23] float32, 0 or 1. Without data a synthetic sample of the features is made.
Source of both: archive.org/details/mmimdb (Arevalo et al., Gated Multimodal Units, 2017).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.download import Remote, fetch, unpack
from experiments.datasets.mmimdb_hdf5 import FILE_NAME, MmimdbFeatures
from experiments.datasets.mmimdb_raw import MmimdbRaw, RawSource
from experiments.datasets.mmimdb_sample import sample_file
from experiments.datasets.precomputed import Features, read_features
from experiments.datasets.prepared import (
    Examples,
    cache_root,
    fingerprint,
    prepare,
    read_columns,
)
from experiments.datasets.stream import Stream

Variant = Literal["features", "raw"]
REMOTES: dict[Variant, Remote] = {
    "features": Remote("https://archive.org/download/mmimdb/multimodal_imdb.hdf5"),
    "raw": Remote("https://archive.org/download/mmimdb/mmimdb.tar.gz"),
}
_RAW = "with raw posters and plots: the vocabulary takes all training rows"


def load(
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    variant: Variant | None = None,
    features_npz: Path | None = None,
    image_size: tuple[int, int] = (96, 64),
    download: bool = False,
    stream: bool = False,
) -> Dataset:
    """Load MM-IMDB, preparing it first if need be.

    Args:
      data_dir: multimodal_imdb.hdf5 or a folder with it (features), or the folder mmimdb/ or its
        parent (raw). None: the synthetic sample.
      cache_dir: where prepared data, downloads and the sample are kept (see ``cache_root``).
      variant: None: found out from data_dir.
      features_npz: features to use in place of the data set's own (see ``precomputed``).
      image_size: (height, width) of the posters (raw).
      download: get the files from archive.org first, into data_dir or else the cache directory.
      stream: leave the training rows on disk (features).
    """
    _check(variant, image_size, features_npz, stream)
    precomputed = read_features(Path(features_npz).expanduser()) if features_npz else None
    if download:
        variant = variant or "features"
        data_dir = _download(variant, data_dir, cache_dir)
    source = _source(data_dir, cache_dir, variant)
    if source.is_file():
        builder = _prepare_features(source, cache_dir)
    elif stream:
        raise _not_streamed(_RAW)
    else:
        builder = _prepare_raw(RawSource(source, image_size), cache_dir)

    train, validation, test = (
        _stream(Examples(builder, split), precomputed) for split in ("train", "validation", "test")
    )
    return Dataset(
        name="MM-IMDB",
        data="sample" if data_dir is None else "real",
        classes=tuple(builder.info.metadata["classes"]),
        train=train.read(np.arange(len(train))[: 2 if stream else None]),
        validation=validation.read(np.arange(len(validation))),
        test=test.read(np.arange(len(test))),
        stream=train if stream else None,
    )


def _check(
    variant: Variant | None, image_size: tuple[int, int], features_npz: Path | None, stream: bool
) -> None:
    if variant not in (None, *REMOTES):
        raise InputError(f"variant is {variant!r}; expected {' or '.join(REMOTES)}")
    if len(image_size) != 2 or min(image_size) < 1:
        raise InputError(f"image_size is {image_size}; expected (height, width), both positive")
    if stream and features_npz:
        raise _not_streamed("with --features-npz: those features are read into memory as one file")
    if stream and variant == "raw":
        raise _not_streamed(_RAW)


def _source(data_dir: Path | None, cache_dir: Path | None, variant: Variant | None) -> Path:
    """The file of features, or the folder of the raw form; without data_dir, the sample's file."""
    if data_dir is not None:
        return _find(Path(data_dir).expanduser(), variant)
    if variant == "raw":
        raise InputError("the sample has no raw form: give the folder mmimdb/, or download it")
    return sample_file(cache_root(cache_dir) / "mmimdb_sample")


def _not_streamed(why: str) -> InputError:
    return InputError(f"--stream {why}; leave --stream out")


def _prepare_features(file: Path, cache_dir: Path | None) -> tfds.core.DatasetBuilder:
    key = fingerprint([file], str(MmimdbFeatures.VERSION))
    return prepare(
        lambda where: MmimdbFeatures(file, data_dir=where), MmimdbFeatures.name, key, cache_dir
    )


def _prepare_raw(source: RawSource, cache_dir: Path | None) -> tfds.core.DatasetBuilder:
    key = fingerprint(_raw_files(source.folder), str(MmimdbRaw.VERSION), source.image_size)
    return prepare(lambda where: MmimdbRaw(source, data_dir=where), MmimdbRaw.name, key, cache_dir)


def _stream(examples: Examples, precomputed: Features | None) -> Stream:
    def read_rows(rows: np.ndarray) -> Split:
        return _to_split(read_columns(examples, rows.tolist()), precomputed)

    return Stream(len(examples), read_rows)


def _to_split(columns: dict[str, np.ndarray], precomputed: Features | None) -> Split:
    inputs = {"text": columns["text"], "image": columns["image"]}
    if precomputed is not None:
        inputs |= precomputed.pick(columns["id"])
    return Split(inputs, columns["genres"].astype(np.float32))


def _find(where: Path, variant: Variant | None) -> Path:
    """The HDF5 file or the raw folder that data_dir means."""
    found: dict[Variant, Path] = {}
    if where.is_file():
        found["features"] = where
    elif (where / FILE_NAME).is_file():
        found["features"] = where / FILE_NAME
    for folder in (where, where / "mmimdb"):
        if (folder / "split.json").is_file():
            found["raw"] = folder
    if variant is None and len(found) == 2:
        raise InputError(f"{where} holds both forms of MM-IMDB: say which, features or raw")
    if not found or (variant is not None and variant not in found):
        what = f"MM-IMDB of the variant {variant}" if variant else "MM-IMDB"
        problem = f"holds no {what}" if where.exists() else "does not exist"
        raise InputError(
            f"{where} {problem}; expected {FILE_NAME} (features) or split.json and dataset/ (raw), "
            "from archive.org/details/mmimdb"
        )
    return found[variant] if variant else next(iter(found.values()))


def _raw_files(folder: Path) -> Iterable[Path]:
    try:
        return [folder / "split.json", *sorted((folder / "dataset").iterdir())]
    except OSError as error:
        raise InputError(f"{folder} has no readable folder dataset ({error})") from error


def _download(variant: Variant, data_dir: Path | None, cache_dir: Path | None) -> Path:
    folder = Path(data_dir).expanduser() if data_dir else cache_root(cache_dir) / "downloads/mmimdb"
    file = fetch(REMOTES[variant], folder)
    return file if variant == "features" else unpack(file, "mmimdb")
