"""Predictions of an exported model for the rows of an .npz file.

    python -m experiments.predict model.zip --data data.npz            (writes predictions.csv)

The file has a key per modality with N rows each, as the model was trained on; `labels`, `split` and
`mask` are not read. predictions.csv has a line a row: what is predicted, the probability of every
class, and of a fusion with a solver whether the row converged, its steps and its residual. A row
that did not converge is predicted all the same: look at it with care.
"""

import csv
import io
import json
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import tyro
from jax import export as jax_export

from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import write_text
from experiments.datasets.npz import read_npz

STATS = ("converged", "steps", "residual")
IGNORED = {"labels", "split", "mask"}
ROWS = 1024  # at a time


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predictions of an exported model.

    Attributes:
      model: what `python -m experiments.export` wrote.
      data: an .npz file with a key per modality.
      out: the .csv file to write.
    """

    POSITIONAL: ClassVar = ("model",)

    model: tyro.conf.Positional[Path | None] = None
    data: Path | None = None
    out: Path = Path("predictions.csv")


class Model(NamedTuple):
    """An exported model: its program, and what about.json says."""

    program: jax_export.Exported
    about: dict[str, Any]


def parse_args(args: Sequence[str]) -> Config:
    config = parse(Config(), args, "python -m experiments.predict")
    if config.model is None or config.data is None:
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
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read as an exported model ({error}); python -m experiments.export "
            "RUN_DIR writes one"
        ) from error


def read_inputs(path: Path, about: dict[str, Any]) -> dict[str, np.ndarray]:
    """The modalities of the file, as the model takes them."""
    found = {name: x for name, x in read_npz(path).items() if name not in IGNORED}
    wanted = about["inputs"]
    if set(found) != set(wanted):
        raise InputError(f"{path} holds {', '.join(found)}; the model reads {', '.join(wanted)}")
    inputs = {}
    for name, (shape, dtype) in wanted.items():
        x = found[name]
        if x.ndim == 1 and shape == [1]:
            x = x[:, None]
        if x.dtype.kind not in "biuf" or list(x.shape[1:]) != shape or not len(x):
            raise InputError(
                f"{path}: {name} is {x.dtype} {x.shape}; the model reads numbers [N, "
                f"{', '.join(map(str, shape))}]"
            )
        inputs[name] = x.astype(dtype)
    rows = {name: len(x) for name, x in inputs.items()}
    if len(set(rows.values())) > 1:
        raise InputError(f"{path} has {rows} rows; expected as many of each modality")
    return inputs


def predict(model: Model, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{"prediction": [N, C] or [N], "converged": [N], …} for all rows, some at a time."""
    total = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, total, ROWS):
        some = {name: x[start : start + ROWS] for name, x in inputs.items()}
        parts.append(jax.tree.map(np.asarray, model.program.call(some)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def table(found: dict[str, np.ndarray], about: dict[str, Any]) -> Iterator[list[Any]]:
    """The lines of predictions.csv, the header first."""
    classes, stats = about["classes"], [name for name in STATS if name in found]
    yield ["row", "prediction", *classes, *stats]
    for row, value in enumerate(found["prediction"]):
        if not classes:
            chosen, shares = f"{value:.6g}", []
        else:
            names = [classes[i] for i in np.flatnonzero(value > 0.5)]
            chosen = ";".join(names) if about["several"] else classes[value.argmax()]
            shares = [f"{share:.6g}" for share in value]
        yield [row, chosen, *shares, *(found[name][row] for name in stats)]


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    assert config.model is not None and config.data is not None
    model = read_model(config.model)
    found = predict(model, read_inputs(config.data, model.about))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table(found, model.about))
    write_text(config.out, text.getvalue())
    rows = len(found["prediction"])
    print(f"{rows:,} rows by a model of {model.about['data']}: {config.out}")
    if "converged" in found and (lost := int((~found["converged"]).sum())):
        print(f"{lost:,} of them did not converge: False in the column converged.")


if __name__ == "__main__":
    main()
