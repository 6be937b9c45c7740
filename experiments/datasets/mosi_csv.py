"""bc-LSTM's files of CMU-MOSI, read and checked. No header lines, the numbers in quotes.

For each modality ``{modality}_{train,test}0.csv``, the features and the label;
``text_{train,test}.csv``, whose first column says which line of ``transcripts.csv`` (identifier,
words, number, label) a row is.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets import Split
from experiments.datasets.numbers import to_float32

WIDTHS = {"text": 100, "audio": 73, "video": 100}


class Utterances(NamedTuple):
    """N utterances.

    Attributes:
      rows: their features, [N, width] or, after `windows`, [N, W, width], and labels.
      recordings: [N] identifier of the recording that an utterance is from.
      positions: [N] its place there, from 1.
    """

    rows: Split
    recordings: np.ndarray
    positions: np.ndarray


def read_part(files: Mapping[str, Path], part: str) -> Utterances:
    """Read and check the files of "train" or "test"."""
    inputs, labels = {}, {}
    for name, width in WIDTHS.items():
        path = files[f"{name}/{name}_{part}0.csv"]
        table = _read_table(path, width + 1)
        inputs[name] = table[:, :-1]
        labels[path] = _checked_labels(path, table[:, -1])
    numbers = files[f"text_{part}.csv"]
    names, labels[files["transcripts.csv"]] = _transcribed(numbers, files["transcripts.csv"])
    (first, expected), *others = labels.items()
    for path, found in others:
        source = path if path.name != "transcripts.csv" else f"{path}, at the lines of {numbers},"
        _require_same(first, expected, source, found)
    recordings, positions = _places(names, files["transcripts.csv"])
    return Utterances(Split(inputs, expected), recordings, positions)


def check_parts(train: Utterances, test: Utterances) -> None:
    """Raises InputError if a recording is in both parts, or train has one label only."""
    shared = sorted(set(train.recordings) & set(test.recordings))
    if shared:
        raise InputError(
            f"recording {shared[0]} is in the training and in the test part; "
            "expected no recording in both"
        )
    if len(set(train.rows.labels.tolist())) < 2:
        raise InputError(f"all {len(train.rows.labels)} training rows have the same label")


def _transcribed(numbers: Path, transcripts: Path) -> tuple[list[str], np.ndarray]:
    """Identifiers and labels of the transcripts' lines that the first column of ``numbers`` names.

    Lines count from 0.
    """
    lines = _read_lines(transcripts)
    names, labels = [], []
    for row, (number, *_) in enumerate(_read_lines(numbers), start=1):
        if not number.isdecimal() or int(number) >= len(lines):
            raise InputError(
                f"{numbers}: line {row} starts with {number!r}; expected the number of a line of "
                f"{transcripts}, from 0 to {len(lines) - 1}"
            )
        line = lines[int(number)]
        if len(line) != 4 or line[3] not in ("0", "1"):
            raise InputError(
                f"{transcripts}: line {int(number) + 1} is not of the form "
                "identifier, words, number, label 0 or 1"
            )
        names.append(line[0])
        labels.append(int(line[3]))
    return names, np.array(labels, np.int32)


def _places(names: list[str], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """RECORDING_POSITION → recordings and positions."""
    split = [name.rpartition("_") for name in names]
    for name, (recording, _, position) in zip(names, split, strict=True):
        if not recording or not position.isdecimal():
            raise InputError(f"{path}: {name!r} is no identifier; expected RECORDING_POSITION")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}: utterance {twice} is there twice in a part; expected it once")
    recordings = np.array([recording for recording, _, _ in split], object)
    return recordings, np.array([int(position) for _, _, position in split], np.int32)


def _require_same(first: Path, expected: np.ndarray, path: object, found: np.ndarray) -> None:
    if len(found) != len(expected):
        raise InputError(f"{path} has {len(found)} rows; expected {len(expected)}, as {first} has")
    if (found != expected).any():
        row = int((found != expected).argmax())
        raise InputError(f"{path} has another label in row {row + 1} than {first}: get both again")


def _checked_labels(path: Path, labels: np.ndarray) -> np.ndarray:
    bad = ~np.isin(labels, (0, 1))
    if bad.any():
        row = int(bad.argmax())
        raise InputError(f"{path}: line {row + 1} ends with {labels[row]:g}; expected a label 0, 1")
    return labels.astype(np.int32)


def _read_table(path: Path, width: int) -> np.ndarray:
    """A table of finite numbers, [rows, width] float32."""
    lines = _read_lines(path)
    for number, line in enumerate(lines, start=1):
        if len(line) != width:
            raise InputError(
                f"{path}: line {number} has {len(line)} columns; expected {width - 1} features "
                "and the label"
            )
    try:
        table = to_float32(np.array(lines, np.float64))
    except ValueError as error:
        raise InputError(f"{path} is not a table of numbers: {error}") from error
    bad = ~np.isfinite(table)
    if bad.any():
        row, column = np.argwhere(bad)[0] + 1
        raise InputError(f"{path}: line {row}, column {column} is NaN or infinite")
    return table


def _read_lines(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a CSV file: {error}") from error
    if not lines:
        raise InputError(f"{path} is empty: get it again")
    return lines
