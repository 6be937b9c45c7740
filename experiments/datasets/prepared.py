"""Build a TFDS data set once, keep it, check it, read it back: array_record, no TensorFlow.

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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from experiments.datasets.download import sha256
from experiments.errors import InputError

CACHE_VARIABLE = "DEQ_FUSION_CACHE"
_CHECKSUMS = "checksums.json"


class SourceBuilder(  # type: ignore[call-arg]  # an option of TFDS's registry, unknown to mypy
    tfds.core.GeneratorBasedBuilder, skip_registration=True
):
    """A TFDS builder that reads one source, given at construction; rows stay in source order."""

    def __init__(self, source: object, **kwargs):
        self.source = source  # before super(): TFDS calls _info() in there
        super().__init__(**kwargs)


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
    make_builder: Callable[[str], tfds.core.GeneratorBasedBuilder],
    name: str,
    key: str,
    cache_dir: Path | None = None,
) -> tfds.core.DatasetBuilder:
    """The data set ``name`` of fingerprint ``key``, from the cache or else built there.

    ``make_builder(data_dir)`` is called only when there is something to build.
    """
    home = cache_root(cache_dir) / name / key
    damage = _damage(home)
    if damage:
        print(f"{home}: {damage}; preparing it again", file=sys.stderr)
        shutil.rmtree(home)
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        print(f"preparing {name} (once) in {home}")
        with tempfile.TemporaryDirectory(prefix="incomplete-", dir=home.parent) as scratch:
            _publish(_build(make_builder, scratch), home)
    return tfds.builder_from_directory(home)


def read_split(builder: tfds.core.DatasetBuilder, split: str) -> dict[str, np.ndarray]:
    """Every feature of one split as one array [N, …], in the order of the source.

    Text features come back as object arrays of str.
    """
    source = builder.as_data_source(split)
    columns: dict[str, np.ndarray] = {}
    with _quiet():
        for row, example in enumerate(source):
            for name, value in example.items():
                if isinstance(value, bytes):
                    value = value.decode()
                if name not in columns:
                    kind = object if isinstance(value, str) else np.asarray(value).dtype
                    columns[name] = np.empty((len(source), *np.shape(value)), kind)
                columns[name][row] = value
    return columns


def _build(make_builder: Callable[[str], tfds.core.GeneratorBasedBuilder], scratch: str) -> Path:
    with _quiet():
        builder = make_builder(scratch)
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
