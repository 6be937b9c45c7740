"""CMU-MOSI by utterances: is what is said positive, from its words, its sound and the face?

Inputs are float32 [N, width], "text", "audio" and "video", as published (not scaled); labels are
[N] int32. An utterance belongs to a recording of one speaker and has its place there; no recording
of the test part is in the training part. There is no validation part (see `hold_out`).

    widths 100, 73, 100      2 classes      1447 train (62 recordings), 752 test (31 recordings)

Source: github.com/declare-lab/multimodal-deep-learning (MIT licence), the features of bc-LSTM
(Poria et al., ACL 2017). Files, without header lines, the numbers in quotes: for each modality
``{modality}_{train,test}0.csv``, the features and the label; ``text_{train,test}.csv``, whose
first column says which line of ``transcripts.csv`` (identifier, words, number, label) a row is.

The networks that computed text and video were trained on the training rows: a linear classifier of
either reaches .98 and .91 there, under cross-validation by recording (and .50 of audio). No part of
the training rows tells how good these two are; `experiments.mosi` says what it does about that.
"""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from sklearn.model_selection import GroupShuffleSplit

from experiments.datasets import Split
from experiments.datasets.download import Remote, fetch, sha256
from experiments.datasets.prepared import (
    SourceBuilder,
    cache_root,
    fingerprint,
    prepare,
    read_split,
)
from experiments.errors import InputError

CLASSES = ("negative", "positive")
WIDTHS = {"text": 100, "audio": 73, "video": 100}
MODALITIES = tuple(WIDTHS)
PARTS = ("train", "test")
_URL = (
    "https://raw.githubusercontent.com/declare-lab/multimodal-deep-learning/"
    "111b401d867c14a1dcd930fd2b2ab58a5eca3f70/bc-LSTM/data"
)
FILES = {  # path in the folder above → (bytes, git blob SHA-1)
    "text/text_train0.csv": (2993906, "c2222f00be2bb0099af9fd1f1d1c8b98d1bedcad"),
    "text/text_test0.csv": (1551145, "64fbf16fcc2daee1eb495ca617935b5c2b3916a1"),
    "audio/audio_train0.csv": (1343911, "f966e0ff77fc165c5c705fe09c2f283aab0572b3"),
    "audio/audio_test0.csv": (699228, "41b7cca24f1f9ad573a597c36b693324ea47c76b"),
    "video/video_train0.csv": (1055454, "6d62f4ba0ab022c6051419a2ffcb69b674d87463"),
    "video/video_test0.csv": (557378, "111ef545bcd364bb26564a9d0bf19caaf53eb5c4"),
    "text_train.csv": (1689050, "7420d5b826970d9ca1c82da4233fee591b8fb1f8"),
    "text_test.csv": (889325, "875c819d2df9709cdf1ab048d4db1efa1ae41fca"),
    "transcripts.csv": (201361, "2cba61298a49ebb6d7f0bce42d37bef4a20d51c5"),
}


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


class Mosi(SourceBuilder):
    """TFDS builder; ``source`` is {path in the published folder: file}."""

    VERSION = tfds.core.Version("1.0.0")
    source: dict[str, Path]

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            name: tfds.features.Tensor(shape=(width,), dtype=np.float32)
            for name, width in WIDTHS.items()
        }
        features |= {
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
            "recording": tfds.features.Text(),
            "position": tfds.features.Scalar(dtype=np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="CMU-MOSI: text, audio and video features of utterances, with labels.",
            homepage="https://github.com/declare-lab/multimodal-deep-learning",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        parts = {part: read_part(self.source, part) for part in PARTS}
        check_parts(parts["train"], parts["test"])
        return {part: self._generate_examples(read) for part, read in parts.items()}

    def _generate_examples(self, part: Utterances) -> Iterator[tuple[int, dict]]:
        for i, label in enumerate(part.rows.labels):
            yield (
                i,
                {name: x[i] for name, x in part.rows.inputs.items()}
                | {"label": int(label), "recording": part.recordings[i]}
                | {"position": part.positions[i]},
            )


def load(
    data_dir: Path | None = None, cache_dir: Path | None = None, download: bool = False
) -> tuple[Utterances, Utterances]:
    """The training and the test part, prepared first if need be.

    ``data_dir`` holds the nine files, side by side or in folders as published; without it they
    are looked for in the cache directory, where ``download=True`` puts them.
    """
    folder = Path(data_dir or cache_root(cache_dir) / "downloads" / "CMU-MOSI").expanduser()
    if download:
        for remote in remotes():
            fetch(remote, folder)
    files = locate(folder)
    builder = prepare(
        lambda where: Mosi(files, data_dir=where),
        Mosi.name,
        fingerprint((), str(Mosi.VERSION), *map(sha256, files.values())),
        cache_dir,
    )
    train, test = (_to_utterances(read_split(builder, part)) for part in PARTS)
    return train, test


def remotes() -> list[Remote]:
    """Where the published files are, with their sizes and checksums."""
    return [Remote(f"{_URL}/{path}", size, blob) for path, (size, blob) in FILES.items()]


def locate(folder: Path) -> dict[str, Path]:
    """The file for each published path, in folders as published or all in one."""
    found = {}
    for path in FILES:
        flat = folder / Path(path).name
        found[path] = flat if flat.is_file() else folder / path
    missing = [path for path, file in found.items() if not file.is_file()]
    if missing:
        raise InputError(
            f"{folder} has no {', '.join(missing)} of CMU-MOSI; ask for the download, or get the "
            f"files from {_URL} and give their folder as the data directory"
        )
    return found


# --- the files of a part ---


def read_part(files: Mapping[str, Path], part: str) -> Utterances:
    """Read and check the files of "train" or "test"."""
    inputs, labels = {}, {}
    for name, width in WIDTHS.items():
        path = files[f"{name}/{name}_{part}0.csv"]
        table = _read_table(path, width + 1)
        inputs[name] = table[:, :-1].astype(np.float32)
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
    """A table of finite numbers, [rows, width] float64."""
    lines = _read_lines(path)
    for number, line in enumerate(lines, start=1):
        if len(line) != width:
            raise InputError(
                f"{path}: line {number} has {len(line)} columns; expected {width - 1} features "
                "and the label"
            )
    try:
        table = np.array(lines, np.float64)
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


def _to_utterances(columns: dict[str, np.ndarray]) -> Utterances:
    inputs = {name: columns[name] for name in MODALITIES}
    rows = Split(inputs, columns["label"].astype(np.int32))
    return Utterances(rows, columns["recording"], columns["position"])


# --- what a model is given ---


def hold_out(train: Utterances, fraction: float, seed: int) -> tuple[Utterances, Utterances]:
    """(train, validation) with about this share of the recordings, whole ones, in validation.

    The speakers of the validation rows are as unknown to a model as those of the test rows.
    """
    draw = GroupShuffleSplit(1, test_size=fraction, random_state=seed)
    try:
        parts = next(draw.split(train.positions, groups=train.recordings))
    except ValueError as error:
        raise InputError(
            f"cannot hold out {fraction!r} of {len(set(train.recordings))} recordings for "
            f"validation: {error}"
        ) from error
    rest, validation = (_take(train, rows) for rows in parts)
    return rest, validation


def windows(utterances: Utterances, context: int) -> Split:
    """[N, W, width] for each modality: an utterance among `context` before and as many after it.

    W = 2 context + 1 and the utterance itself is in the middle. NaN where the recording has no
    utterance.
    """
    places = zip(utterances.recordings, utterances.positions, strict=True)
    row_of = {place: row for row, place in enumerate(places)}
    none = len(row_of)  # the row of NaN that is put below the others
    around = np.array(
        [
            [row_of.get((recording, position + step), none) for step in _steps(context)]
            for recording, position in row_of
        ]
    )
    inputs = {}
    for name, x in utterances.rows.inputs.items():
        nothing = np.full((1, *x.shape[1:]), np.nan, x.dtype)
        inputs[name] = np.concatenate([x, nothing])[around]
    return Split(inputs, utterances.rows.labels)


def _steps(context: int) -> range:
    return range(-context, context + 1)


def _take(utterances: Utterances, rows: np.ndarray) -> Utterances:
    inputs = {name: x[rows] for name, x in utterances.rows.inputs.items()}
    split = Split(inputs, utterances.rows.labels[rows])
    return Utterances(split, utterances.recordings[rows], utterances.positions[rows])
