"""Build a TFDS data set, or other files, once; keep them, check them, read them back.

Data sets are read as array_record, without TensorFlow.

A prepared data set lives in ``CACHE/<builder name>/<fingerprint>/``. The fingerprint covers the
source files and the builder's version, so changed sources are prepared anew. The folder appears by
one rename, after everything in it was written and its checksums recorded: a build that dies half
way leaves nothing that could be taken for whole (only an ``incomplete-*`` folder, free to delete),
and damage on disk is noticed before reading.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from experiments.common.errors import InputError, naming_full_disk
from experiments.datasets.download import sha256

CACHE_VARIABLE = "DEQ_FUSION_CACHE"
_CHECKSUMS = "checksums.json"
_BLOCK = 256  # rows decoded at once


class _OfSource:
    """Reads one source, given at construction; rows stay in source order."""

    def __init__(self, source: object, **kwargs):
        self.source = source  # before super(): TFDS calls _info() in there
        super().__init__(**kwargs)


class SourceBuilder(  # type: ignore[call-arg]  # an option of TFDS's registry, unknown to mypy
    _OfSource, tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A TFDS builder of what fits in memory: TFDS holds a split before it writes it."""


class ShardedBuilder(  # type: ignore[call-arg]
    _OfSource, tfds.core.ShardBasedBuilder, skip_registration=True
):
    """A TFDS builder of any size: TFDS writes what it gets as it comes."""

    def _example_writer(self) -> "_Writer":
        return _Writer()


class _Writer:
    """array_record as TFDS writes it, but uncompressed: floats gain little, and read half as fast.

    Compression saves a tenth of the file.
    """

    def write(self, path: Path, examples: Iterable[tuple[int, bytes]]) -> None:
        options = "group_size:1,uncompressed"
        with contextlib.closing(ArrayRecordWriter(os.fspath(path), options)) as file:
            for _, example in examples:
                file.write(example)


def cache_root(cache_dir: Path | None = None) -> Path:
    """The cache directory: the argument, else $DEQ_FUSION_CACHE, else ~/.cache/deq_fusion_jax."""
    chosen = cache_dir or os.environ.get(CACHE_VARIABLE) or Path("~/.cache/deq_fusion_jax")
    root = Path(chosen).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot use {root} as the cache directory ({error}); "
            f"pass another one, or set {CACHE_VARIABLE}"
        ) from error
    return root


def fingerprint(files: Iterable[Path], *settings: object) -> str:
    """16 hex digits that change when a file's path, size or time of change does, or a setting."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        stat = path.stat()
        digest.update(f"{path.absolute()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def prepare(
    make_builder: Callable[[str], tfds.core.DatasetBuilder],
    name: str,
    key: str,
    cache_dir: Path | None = None,
) -> tfds.core.DatasetBuilder:
    """The data set ``name`` of fingerprint ``key``, from the cache or else built there.

    ``make_builder(data_dir)`` is called only when there is something to build.
    """
    home = prepared_folder(lambda scratch: _build(make_builder, scratch), name, key, cache_dir)
    return tfds.builder_from_directory(home)


def prepared_folder(
    build: Callable[[Path], Path], name: str, key: str, cache_dir: Path | None = None
) -> Path:
    """The folder ``name``/``key`` of the cache, whole, or else built there.

    ``build(scratch)`` writes files into an empty folder, and returns that, or one in there.
    """
    home = cache_root(cache_dir) / name / key
    damage = _damage(home)
    if damage:
        print(f"{home}: {damage}; preparing it again", file=sys.stderr)
        shutil.rmtree(home)
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {name} (once) in {home}")
        with (
            naming_full_disk(home),
            tempfile.TemporaryDirectory(prefix="incomplete-", dir=home.parent) as scratch,
        ):
            _publish(build(Path(scratch)), home)
    return home


class Examples:
    """A split's examples by row number: dicts of arrays, numbers and str.

    The records and the decoding of each feature are TFDS's. What TFDS does between the two, for
    nested features, takes three times as long as all of this.
    """

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._home = builder.data_path
        self._records = builder.as_data_source(split, deserialize_method=raw)
        self._features = dict(builder.info.features)

    def __len__(self) -> int:
        return len(self._records)

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The examples of these rows, in this order; from any thread."""
        try:
            return [self._decode(record) for record in self._records.__getitems__(rows)]
        except (RuntimeError, ValueError) as error:  # from array_record; from what it read
            raise InputError(
                f"{self._home} cannot be read any more ({error}); delete it, and it is prepared "
                "again"
            ) from error

    def _decode(self, record: bytes) -> dict[str, Any]:
        stored = tf_example_pb2.Example.FromString(record).features.feature
        return {name: _value(kind, stored[name]) for name, kind in self._features.items()}


def _value(kind: tfds.features.FeatureConnector, stored: tf_feature_pb2.Feature) -> Any:
    """One feature of an example: as stored → as it was given to the builder."""
    if stored.HasField("bytes_list"):
        value = kind.decode_example_np(stored.bytes_list.value[0])
        return value.decode() if isinstance(value, bytes) else value
    numbers = stored.float_list if stored.HasField("float_list") else stored.int64_list
    return np.array(numbers.value, kind.np_dtype).reshape(kind.shape)


def read_columns(source: Examples, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """{feature: [B, …]} of B rows, in this order; texts as object arrays of str."""
    columns: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), _BLOCK):
        for at, example in enumerate(source.__getitems__(rows[start : start + _BLOCK]), start):
            for name, value in example.items():
                if name not in columns:
                    kind = object if isinstance(value, str) else value.dtype
                    columns[name] = np.empty((len(rows), *np.shape(value)), kind)
                columns[name][at] = value
    return columns


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """Every feature of one split as one array [N, …], in the order of the source."""
    source = Examples(builder, split)
    return read_columns(source, range(len(source)))


def _build(make_builder: Callable[[str], tfds.core.DatasetBuilder], scratch: Path) -> Path:
    with _quiet():
        builder = make_builder(str(scratch))
        builder.download_and_prepare(
            file_format="array_record",
            download_config=tfds.download.DownloadConfig(
                try_download_gcs=False, force_checksums_validation=True
            ),
        )
    return Path(builder.data_dir)


def _publish(built: Path, home: Path) -> None:
    """Record checksums, then move into place; if another process was faster, theirs stays."""
    sums = {path.name: sha256(path) for path in sorted(built.iterdir())}
    (built / _CHECKSUMS).write_text(json.dumps(sums, indent=1))
    try:
        built.rename(home)
    except OSError:
        if _damage(home) is not None or not home.exists():
            raise


def _damage(home: Path) -> str | None:
    """What is wrong with a prepared folder, in words; None if it is whole or not there."""
    if not home.exists():
        return None
    try:
        sums = json.loads((home / _CHECKSUMS).read_text())
    except (OSError, ValueError):
        return "it has no readable checksums"
    for name, expected in sums.items():
        if not (home / name).is_file():
            return f"{name} is missing"
        if sha256(home / name) != expected:
            return f"{name} is damaged"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back TFDS's progress bars, banners and hints; our own lines go to stderr."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
        absl_logging.set_verbosity(verbosity)
