"""Predictions of an exported model for rows of features.

    python -m experiments.predict model.zip --data data.npz            (writes predictions.csv)
    python -m experiments.predict model.zip --data image.csv text.csv

The files are read as `experiments.features` reads them, and joined by their ids; labels, split and
groups are not looked at. predictions.csv has a line a row: its id, what is predicted, the
probability of every class, of a fusion with a solver whether the row converged, its steps and its
residual, and which modalities are missing. A row that did not converge is predicted all the same:
look at it with care. One of which nothing is there is not.
"""

import csv
import io
import json
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import tyro
from jax import export as jax_export

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import make_folder, write_text
from experiments.common.text import note
from experiments.datasets.columns import Known
from experiments.datasets.features import hide, missing, modality
from experiments.datasets.files import merged, read_files
from experiments.datasets.join import joined
from experiments.datasets.preprocess import scaled

STATS = ("converged", "steps", "residual")
IGNORED = ("labels", "split", "groups")
ROWS = 1024  # at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predictions of an exported model.

    Attributes:
      model: what `python -m experiments.export` wrote.
      data: an .npz file with a key per modality, or files called after them.
      out: the .csv file to write.
    """

    POSITIONAL: ClassVar = ("model",)

    model: tyro.conf.Positional[Path | None] = None
    data: tuple[Path, ...] = ()
    out: Path = Path("predictions.csv")


class Model(NamedTuple):
    """An exported model: its program, and what about.json says."""

    program: jax_export.Exported
    about: dict[str, Any]


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.predict")
    if config.model is None or not config.data:
        raise InputError("give a model and its data: predict model.zip --data data.npz")
    return config


def read_model(path: Path) -> Model:
    """Reads an exported model.

    Raises:
      InputError: it is none, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as file:  # which checks its own checksums
            about = json.loads(file.read("about.json"))
            return Model(jax_export.deserialize(bytearray(file.read("program.jax"))), about)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read as an exported model ({error}); python -m experiments.export "
            "RUN_DIR writes one"
        ) from error


class Rows(NamedTuple):
    """Rows that are to be predicted.

    Attributes:
      inputs: {name: [N, …]} as the model's program takes them.
      missing: {name: [N] bool}; what is not there.
      ids: [N] text; None: they have none.
      notes: what was guessed.
    """

    inputs: dict[str, np.ndarray]
    missing: dict[str, np.ndarray]
    ids: np.ndarray | None
    notes: list[str]


def read_rows(paths: Sequence[Path], about: Mapping[str, Any]) -> Rows:
    """The rows of files, as the model takes them.

    Raises:
      InputError: they hold something else than the model reads.
    """
    prepare = about.get("prepare")
    known = {
        name: Known(tuple(how["columns"]) if how["columns"] else None, how["words"])
        for name, how in (prepare or {}).items()
    }
    parts, guessed = read_files(paths, known=known)
    parts = {name: part for name, part in parts.items() if name not in IGNORED}
    arrays, ids, notes = joined(parts)
    mask = arrays.pop("mask", None)
    wanted, called = about["inputs"], ", ".join(map(str, paths))
    if set(arrays) != set(wanted):
        raise InputError(
            f"{called} holds {', '.join(arrays) or 'nothing'}; the model reads {', '.join(wanted)}"
        )
    length = {name: len(x) if x.ndim else 0 for name, x in arrays.items()}
    if len(set(length.values())) > 1:
        raise InputError(f"{called} has {length} rows; expected as many of each modality")
    inputs = {name: _checked(name, arrays[name], *wanted[name]) for name in wanted}
    if mask is not None:
        if still := [name for name, x in inputs.items() if x.dtype.kind != "f"]:
            raise InputError(f"mask: {still[0]} of this model cannot be missing; leave mask out")
        hide(inputs, mask, parts["mask"].names)
    lacks = {name: missing(x) for name, x in inputs.items()}
    if prepare:
        moments = {n: (np.array(x["mean"]), np.array(x["deviation"])) for n, x in prepare.items()}
        inputs = scaled(inputs, moments)
    inputs = {name: inputs[name].astype(dtype) for name, (_, dtype) in wanted.items()}
    return Rows(inputs, lacks, ids, [*merged(guessed), *notes])


def _checked(name: str, x: np.ndarray, shape: list[int], dtype: str) -> np.ndarray:
    """A modality with the model's shape; of floats in all their digits."""
    if x.ndim == 1 and shape == [1]:
        x = x[:, None]
    if x.dtype.kind not in "biuf" or list(x.shape[1:]) != shape or not len(x):
        raise InputError(
            f"{name} is {x.dtype} {x.shape}; the model reads numbers [N, "
            f"{', '.join(map(str, shape))}]"
        )
    if np.dtype(dtype).kind == "f":
        return modality(name, x, len(x))
    if x.dtype.kind == "f" and not np.array_equal(x, np.round(x)):  # so nor is NaN
        raise InputError(f"{name} has numbers that the model, of {dtype}, cannot take")
    return x


def predict(model: Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"prediction": [N, C] or [N], "converged": [N], …} for all rows, some at a time."""
    total = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, total, ROWS):
        some = {name: x[start : start + ROWS] for name, x in inputs.items()}
        parts.append(jax.tree.map(np.asarray, model.program.call(some)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def refuse_unless_honoured(model: Model, rows: Rows) -> None:
    """Raises InputError if a modality is missing and the model knows no such thing."""
    for name, lacks in rows.missing.items():
        if not lacks.any():
            continue
        first = {key: np.nan_to_num(x[:1]) for key, x in rows.inputs.items()}
        first[name] = np.full_like(first[name], np.nan)
        if not np.isfinite(predict(model, first)["prediction"]).all():
            raise InputError(
                f"{name} is missing in {lacks.sum():,} rows, and this model cannot do without it; "
                "leave such rows out"
            )


def is_predicted(found: Mapping[str, np.ndarray], rows: Rows) -> np.ndarray:
    """[N] bool: something is there, and what came out is a number."""
    finite = np.isfinite(found["prediction"]).reshape(len(found["prediction"]), -1).all(axis=1)
    return finite & ~np.all(list(rows.missing.values()), axis=0)


def table(
    found: Mapping[str, np.ndarray], rows: Rows, about: Mapping[str, Any]
) -> Iterator[list[Any]]:
    """The lines of predictions.csv, the header first."""
    classes, stats = about["classes"], [name for name in STATS if name in found]
    several, known = about["several"], is_predicted(found, rows)
    yield ["row" if rows.ids is None else "id", "prediction", *classes, *stats, "missing"]
    for row, value in enumerate(found["prediction"]):
        name = row if rows.ids is None else rows.ids[row]
        lacks = ";".join(name for name, where in rows.missing.items() if where[row])
        if not known[row]:
            yield [name, "", *("" for _ in classes), *(False, "", "")[: len(stats)], lacks]
            continue
        if not classes:
            chosen, shares = f"{value:.6g}", []
        else:
            names = [classes[i] for i in np.flatnonzero(value > 0.5)]
            chosen = ";".join(names) if several else classes[value.argmax()]
            shares = [f"{share:.6g}" for share in value]
        yield [name, chosen, *shares, *(found[stat][row] for stat in stats), lacks]


def check_writable(path: Path) -> None:
    """Raises InputError if no file can be written there."""
    if path.is_dir():
        raise InputError(f"--out {path} is a folder; give a file")
    make_folder(path.parent, "--out, in")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}") from error


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    assert config.model is not None
    check_writable(config.out)
    model = read_model(config.model)
    rows = read_rows(config.data, model.about)
    for text in rows.notes:
        print(note(text))
    refuse_unless_honoured(model, rows)
    found = predict(model, rows.inputs)
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(table(found, rows, model.about))
    write_text(config.out, lines.getvalue())
    known = is_predicted(found, rows)
    print(f"{len(known):,} rows by a model of {model.about['data']}: {config.out}")
    if empty := int((~known).sum()):
        print(f"{empty:,} of them are not predicted, as nothing of them is there.")
    if "converged" in found and (lost := int((known & ~found["converged"]).sum())):
        print(f"{lost:,} of them did not converge: False in the column converged.")


if __name__ == "__main__":
    main()
