"""Files of a run directory: written whole or not at all, JSON that any reader understands.

Undefined numbers (None, NaN) are null in JSON.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from experiments.common.errors import InputError

PACKAGES = ("jax", "flax", "optax", "jaxopt", "orbax-checkpoint", "numpy", "scikit-learn")


def make_folder(path: Path, option: str) -> None:
    """The folder of an option, before the work whose results go there.

    Raises:
      InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option} {path}: {error.strerror}; give a folder") from error


def write_text(path: Path, text: str) -> None:
    """Write all of it or nothing: a reader, or a crash, never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _named(path), partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    with _named(path), path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(text)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Of a full disk the system does not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def set_aside(path: Path) -> Path:
    """Renames a file to the first free name with a number: metrics.jsonl → metrics.1.jsonl."""
    numbered = (path.with_suffix(f".{i}{path.suffix}") for i in itertools.count(1))
    return path.rename(next(free for free in numbered if not free.exists()))


def write_json(path: Path, value: Any) -> None:
    """`value` as strict JSON, whole or not at all (see `plain` for what becomes of what)."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      OSError: it cannot be opened.
      ValueError: it is no JSON, or nested beyond all reason.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def plain(value: Any) -> Any:
    """JSON's own types: NaN and infinities → None, arrays → lists, paths → text,
    dataclasses → dicts with their `type`, functions and classes → their name."""
    return json.loads(json.dumps(value, default=_plainer), parse_constant=lambda _: None)


def _plainer(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **_fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return value.tolist() if hasattr(value, "tolist") else getattr(value, "__name__", str(value))


def _fields(config: Any) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def config_to_dict(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON; nested dataclasses (a solver, say) keep their `type`."""
    return plain(_fields(config))


def versions() -> dict[str, str]:
    """Python, the packages that decide the numbers, and the devices."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    devices = jax.devices()
    return {**found, "device": f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})"}


def processor() -> str:
    """The model of the CPU, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
