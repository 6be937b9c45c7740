"""MM-IMDB as features: reader, writer and TFDS builder of ``multimodal_imdb.hdf5``.

The file has one row per movie, N = 25959 in the published one:

    features      (N, 300)   float32  mean word2vec vector of the plot
    vgg_features  (N, 4096)  float32  VGG-16's last hidden layer on the poster
    genres        (N, 23)    int32    0/1; attribute ``target_names``: a JSON list of 23 names
    images        (N, 3, H, W) int32, sequences (N,) variable-length int32: not used here
    imdb_ids      (N,)       bytes of length 7

(the published file has ``three_grams`` and ``word_grams`` besides). The root attribute ``split`` is
Fuel's H5PYDataset table, one entry per split ("train", "dev", "test") and source (a key above):
split, source, start, stop, indices (a reference to a data set of row numbers, or null), available,
comment.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import tensorflow_datasets as tfds

from experiments.common.errors import InputError
from experiments.datasets.numbers import to_float32
from experiments.datasets.prepared import ShardedBuilder

FILE_NAME = "multimodal_imdb.hdf5"
TEXT_WIDTH, IMAGE_WIDTH, GENRES = 300, 4096, 23
PUBLISHED_ROWS = {"train": (0, 15552), "validation": (15552, 18160), "test": (18160, 25959)}
_FUEL_NAMES = {"train": "train", "validation": "dev", "test": "test"}
_WIDTHS = {"features": TEXT_WIDTH, "vgg_features": IMAGE_WIDTH, "genres": GENRES}
_CHUNK = 1024  # rows read from HDF5 at once
# How h5py tells that a file is damaged, depending on where.
DAMAGE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


class Layout(NamedTuple):
    """What a well-formed file says about itself."""

    genres: tuple[str, ...]
    rows: dict[str, np.ndarray]  # split → row numbers


class MmimdbFeatures(ShardedBuilder):
    """TFDS builder; ``source`` is the path of the HDF5 file."""

    VERSION = tfds.core.Version("1.1.0")  # 1.1.0: arrays as bytes
    source: Path

    def _info(self) -> tfds.core.DatasetInfo:
        with open_hdf5(self.source) as file:
            genres = read_layout(file).genres
        return tfds.core.DatasetInfo(
            builder=self,
            description="MM-IMDB: word2vec text and VGG poster features, 23 genres (multi-label).",
            homepage="https://github.com/johnarevalo/gmu-mmimdb",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": _bytes(TEXT_WIDTH, np.float32),
                    "image": _bytes(IMAGE_WIDTH, np.float32),
                    "genres": _bytes(GENRES, np.int8),
                }
            ),
            metadata=tfds.core.MetadataDict({"classes": list(genres)}),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, list[Callable]]:
        with open_hdf5(self.source) as file:
            rows = read_layout(file).rows
        return {split: [partial(self._generate_examples, rows[split])] for split in rows}

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict]]:
        example: dict = {}  # one for all rows: TFDS holds on to what it gets, to count it later
        with open_hdf5(self.source) as file:
            for start in range(0, len(rows), _CHUNK):
                for key, row in enumerate(read_rows(file, rows[start : start + _CHUNK]), start):
                    example.update(row)
                    yield key, example


def _bytes(width: int, dtype: type) -> tfds.features.Tensor:
    """[width], stored as it is in memory: read back faster than a protobuf list of numbers."""
    return tfds.features.Tensor(shape=(width,), dtype=dtype, encoding=tfds.features.Encoding.BYTES)


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open for reading; what HDF5 cannot read, then or later, is an InputError naming the file."""
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(
            f"{path} cannot be read as an HDF5 file ({error}); it is missing, cut short, damaged "
            f"or of another kind: delete it and get it again"
        ) from error


def read_layout(file: h5py.File) -> Layout:
    """Check keys, shapes, genre names and the split, without reading the features."""
    missing = sorted({*_WIDTHS, "imdb_ids"} - set(file))
    if missing:
        raise InputError(
            f"{file.filename} has no {', '.join(missing)}: it has {', '.join(file) or 'nothing'}; "
            f"expected the layout of the published {FILE_NAME}"
        )
    total = len(file["imdb_ids"])
    for key, width in _WIDTHS.items():
        if file[key].shape != (total, width):
            raise InputError(
                f"{file.filename}: {key} has shape {file[key].shape}, expected ({total}, {width}): "
                f"imdb_ids has {total} rows"
            )
    return Layout(_genre_names(file), _split_rows(file, total))


def fuel_split(rows: dict[str, tuple[int, int]], sources: tuple[str, ...]) -> np.ndarray:
    """The root attribute ``split`` for contiguous ranges, as Fuel writes it."""
    names = [name.encode() for name in (*_FUEL_NAMES.values(), *sources)]
    width = f"S{max(len(name) for name in names)}"
    kind = [
        ("split", width),
        ("source", width),
        ("start", np.int64),
        ("stop", np.int64),
        ("indices", h5py.ref_dtype),
        ("available", np.bool_),
        ("comment", "S1"),
    ]
    entries = [
        (_FUEL_NAMES[split].encode(), source.encode(), *rows[split], h5py.Reference(), True, b".")
        for split in rows
        for source in sources
    ]
    return np.array(entries, dtype=kind)


def _genre_names(file: h5py.File) -> tuple[str, ...]:
    """``target_names``: a JSON list, as published, or an array of strings."""
    raw = file["genres"].attrs.get("target_names")
    if isinstance(raw, bytes):
        raw = raw.decode()
    try:
        names = json.loads(raw) if isinstance(raw, str) else raw
    except json.JSONDecodeError as error:
        raise InputError(f"{file.filename}: target_names of genres is not JSON: {raw!r}") from error
    names = () if names is None else tuple(_as_str(name) for name in np.ravel(names))
    if len(set(names)) != GENRES:
        raise InputError(
            f"{file.filename}: expected the names of {GENRES} genres in the attribute target_names "
            f"of genres, found {len(set(names))}: {', '.join(names) or 'none'}"
        )
    return names


def _split_rows(file: h5py.File, total: int) -> dict[str, np.ndarray]:
    if "split" in file.attrs:
        rows = {split: _rows_of(file, split) for split in _FUEL_NAMES}
    elif total == PUBLISHED_ROWS["test"][1]:
        rows = {split: np.arange(*span) for split, span in PUBLISHED_ROWS.items()}
    else:
        raise InputError(
            f"{file.filename} has no attribute 'split', and {total} rows where the published file "
            f"has {PUBLISHED_ROWS['test'][1]}: say which rows are train, dev and test in 'split'"
        )
    used = np.concatenate(list(rows.values()))
    if used.min() < 0 or used.max() >= total:
        raise InputError(
            f"{file.filename}: 'split' names rows {used.min()} to {used.max()}, "
            f"but the file has rows 0 to {total - 1}"
        )
    if len(np.unique(used)) != len(used):
        raise InputError(f"{file.filename}: 'split' puts the same row in two places")
    return rows


def _rows_of(file: h5py.File, split: str) -> np.ndarray:
    """The rows of one split; the sources that we read must agree on them."""
    table, name = file.attrs["split"], _FUEL_NAMES[split]
    if not {"split", "source", "start", "stop"} <= set(table.dtype.names or ()):
        raise InputError(f"{file.filename}: 'split' is not Fuel's table: its type is {table.dtype}")
    found: dict[str, np.ndarray] = {}
    for entry in table:
        source = _as_str(entry["source"])
        if (
            _as_str(entry["split"]) == name
            and source in _WIDTHS
            and _optional(entry, "available", True)
        ):
            found[source] = _entry_rows(file, entry)
    missing = sorted(set(_WIDTHS) - set(found))
    if missing:
        raise InputError(f"{file.filename}: 'split' has no {name} rows for {', '.join(missing)}")
    first, *others = found.values()
    if len(first) == 0 or not all(np.array_equal(first, other) for other in others):
        spans = ", ".join(f"{source}: {len(rows)} rows" for source, rows in found.items())
        raise InputError(f"{file.filename}: {name} rows are empty or do not agree ({spans})")
    return first


def _entry_rows(file: h5py.File, entry: np.void) -> np.ndarray:
    reference = _optional(entry, "indices", None)
    return file[reference][:] if reference else np.arange(entry["start"], entry["stop"])


def _optional(entry: np.void, field: str, default: object) -> Any:
    """A field that old versions of Fuel did not write."""
    return entry[field] if field in (entry.dtype.names or ()) else default


def read_rows(file: h5py.File, rows: np.ndarray) -> Iterator[dict]:
    """Read and check some rows; yields their examples in that order."""
    text, image, genres, ids = (_take(file, key, rows) for key in (*_WIDTHS, "imdb_ids"))
    text, image = to_float32(text), to_float32(image)
    for modality, values in (("text", text), ("image", image)):
        bad = ~np.isfinite(values).all(axis=1)
        if bad.any():
            raise InputError(
                f"{file.filename}: row {rows[bad.argmax()]} has a NaN or infinite {modality} "
                "feature; every feature must be a finite number"
            )
    bad = ((genres != 0) & (genres != 1)).any(axis=1)
    if bad.any():
        row = bad.argmax()
        raise InputError(
            f"{file.filename}: row {rows[row]} of genres holds {genres[row].tolist()}; "
            "labels must be 0 or 1"
        )
    for i in range(len(rows)):
        yield {
            "id": _as_str(ids[i]),
            "text": text[i],
            "image": image[i],
            "genres": genres[i].astype(np.int8),
        }


def _take(file: h5py.File, key: str, rows: np.ndarray) -> np.ndarray:
    """``file[key][rows]``: one read of the range around them, which HDF5 does fastest.

    Rows too far apart for that are read one by one.
    """
    low, high = rows.min(), rows.max() + 1
    if high - low > 4 * len(rows):
        return np.stack([file[key][row] for row in rows])
    return file[key][low:high][rows - low]


def _as_str(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
