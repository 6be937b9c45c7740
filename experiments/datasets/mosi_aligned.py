"""CMU-MOSI aligned by tokens, the form of the paper: words, and the sound that goes with each.

Labels are float32 [N], from -3 to 3; "text" is [N] strings, or states [N, 50, d] computed
elsewhere; "audio" is float32 [N, 50, 5], if it is there. 1284 train, 229 validation, 686 test.

Source: github.com/thuiar/Cross-Modal-BERT (no licence stated), Yang et al., CM-BERT, ACM MM 2020,
in its folder ``data``:

    text/{train,dev,test}.tsv                  a header line, then text TAB label
    audio/MOSI_cmu_audio_CLS.pickle            a sequence of three arrays [N, 50, 5]: train, dev
                                               and test, their rows in the order of the text

A row's 50 positions are BERT's: [CLS], the pieces of its words, [SEP], then nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.download import Remote, fetch
from experiments.datasets.npz import read_npz
from experiments.datasets.numbers import to_float32
from experiments.datasets.pickles import read_pickle
from experiments.datasets.prepared import cache_root

MODALITIES = ("text", "audio")
LENGTH, AUDIO_WIDTH = 50, 5
PARTS = {"train": "train", "validation": "dev", "test": "test"}  # ours → the files' name
AUDIO = "MOSI_cmu_audio_CLS.pickle"
_URL = (
    "https://raw.githubusercontent.com/thuiar/Cross-Modal-BERT/"
    "3e44dce6b00431f88f8d5de12bef9706116fa97b/data/text"
)
FILES = {  # name → (bytes, git blob SHA-1)
    "train.tsv": (85201, "22ae7d18d02ab748e9212d3b9461973d2f825263"),
    "dev.tsv": (14372, "4243d3160363b4e49912a1ff46ac9275f3429150"),
    "test.tsv": (51687, "a2455504b352a71ea2ff81d0d1fc3d215794b002"),
}
WHERE_AUDIO = (
    f"get data/audio/{AUDIO} from github.com/thuiar/Cross-Modal-BERT and put it beside the text"
)

Arrays = dict[str, np.ndarray]  # "train", "validation" and "test" → array


def load(
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    download: bool = False,
    text_npz: Path | None = None,
) -> Dataset:
    """The three parts, with "audio" where its file is there.

    ``data_dir`` holds the files side by side, or folders text and audio as published; without it
    they are looked for in the cache directory, where ``download=True`` puts those of the text.
    ``text_npz`` has states [N, 50, d] as "train", "validation" and "test", 0 at positions without
    a token; they take the place of the text.
    """
    folder = Path(data_dir or cache_root(cache_dir) / "downloads" / "CMU-MOSI aligned").expanduser()
    if download:
        for remote in remotes():
            fetch(remote, folder)
    tables = {part: read_table(_locate(folder, "text", f"{PARTS[part]}.tsv")) for part in PARTS}
    labels = {part: rows[1] for part, rows in tables.items()}
    texts = {part: rows[0] for part, rows in tables.items()}
    inputs = {"text": read_states(text_npz, labels) if text_npz else texts}
    audio = _locate(folder, "audio", AUDIO)
    if audio.is_file():
        inputs["audio"] = read_audio(audio, labels)

    def split(part: str) -> Split:
        return Split({name: arrays[part] for name, arrays in inputs.items()}, labels[part])

    train, validation, test = map(split, PARTS)
    return Dataset("CMU-MOSI aligned", "real", (), train, validation, test)


def remotes() -> list[Remote]:
    """Where the published text is, with sizes and checksums."""
    return [Remote(f"{_URL}/{name}", size, blob) for name, (size, blob) in FILES.items()]


def read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """[N] strings and [N] float32 labels of a .tsv file."""
    if not path.is_file():
        raise InputError(
            f"{path} is not there; ask for the download, or get train.tsv, dev.tsv and test.tsv "
            f"from {_URL} and give their folder as the data directory"
        )
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    if header.split("\t") != ["text", "label"]:
        raise InputError(f"{path} starts with {header[:40]!r}; expected the header text TAB label")
    if not lines:
        raise InputError(f"{path} has no rows below its header: get it again")
    rows = [_row(path, number, line) for number, line in enumerate(lines, start=2)]
    texts, labels = zip(*rows, strict=True)
    return np.array(texts, object), np.array(labels, np.float32)


def read_audio(path: Path, labels: Arrays) -> Arrays:
    """The arrays of the audio pickle by part."""
    content = read_pickle(path)
    if not isinstance(content, list | tuple) or len(content) != len(PARTS):
        size = f" of {len(content)}" if hasattr(content, "__len__") else ""
        raise InputError(
            f"{path} holds a {type(content).__name__}{size}; expected a sequence of three arrays: "
            "train, dev, test"
        )

    def fits(shape: tuple[int, ...], rows: int) -> bool:
        return shape == (rows, LENGTH, AUDIO_WIDTH)

    named = dict(zip(PARTS, content, strict=True))
    return _checked(path, named, labels, fits, f"{LENGTH}, {AUDIO_WIDTH}")


def read_states(path: Path, labels: Arrays) -> Arrays:
    """Text states by part from an .npz file, [N, 50, d]."""
    content = read_npz(path)
    if set(content) != set(PARTS):
        found = ", ".join(content) or "nothing"
        raise InputError(f"{path} holds {found}; expected {', '.join(PARTS)}")
    width = np.shape(content["train"])[-1:]

    def fits(shape: tuple[int, ...], rows: int) -> bool:
        return len(shape) == 3 and shape == (rows, LENGTH, *width) and min(shape) > 0

    named = {part: content[part] for part in PARTS}
    return _checked(path, named, labels, fits, f"{LENGTH}, d")


def _checked(
    path: Path,
    named: dict[str, Any],
    labels: Arrays,
    fits: Callable[[tuple[int, ...], int], bool],
    positions: str,
) -> Arrays:
    """The arrays as float32, if each has a row for each label, the right shape, and no NaN."""
    checked = {}
    for part, values in named.items():
        try:
            array = to_float32(values)
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: the {part} part is no array of numbers: {error}") from error
        rows = len(labels[part])
        if not fits(array.shape, rows):
            raise InputError(
                f"{path}: the {part} part has shape {array.shape}; "
                f"expected ({rows}, {positions}), a row for each of {PARTS[part]}.tsv"
            )
        bad = ~np.isfinite(array).all(axis=(1, 2))
        if bad.any():
            raise InputError(f"{path}: row {bad.argmax() + 1} of the {part} part has no number")
        checked[part] = array
    return checked


def _row(path: Path, number: int, line: str) -> tuple[str, float]:
    cells = line.split("\t")
    if len(cells) != 2:
        raise InputError(f"{path}: line {number} has {len(cells)} cells; expected text TAB label")
    try:
        label = float(cells[1])
    except ValueError:
        label = float("nan")
    if not -3 <= label <= 3:
        raise InputError(
            f"{path}: line {number} ends with {cells[1]!r}; expected a label from -3 to 3"
        )
    return cells[0], label


def _locate(folder: Path, inner: str, name: str) -> Path:
    return folder / inner / name if (folder / inner / name).is_file() else folder / name
