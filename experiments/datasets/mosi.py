"""CMU-MOSI by utterances: is what is said positive, from its words, its sound and the face?

Inputs are float32 [N, width], "text", "audio" and "video", as published (not scaled); labels are
[N] int32. An utterance belongs to a recording of one speaker and has its place there; no recording
of the test part is in the training part. There is no validation part (see `hold_out`).

    widths 100, 73, 100      2 classes      1447 train (62 recordings), 752 test (31 recordings)

Source: github.com/declare-lab/multimodal-deep-learning (MIT licence), the features of bc-LSTM
(Poria et al., ACL 2017). `mosi_csv` reads the files.

The networks that computed text and video were trained on the training rows: a linear classifier of
either reaches .98 and .91 there, under cross-validation by recording (and .50 of audio). No part of
the training rows tells how good these two are; `experiments.mosi` says what it does about that.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from sklearn.model_selection import GroupShuffleSplit

from experiments.common.errors import InputError
from experiments.datasets import Split
from experiments.datasets.download import Remote, fetch, sha256
from experiments.datasets.mosi_csv import WIDTHS, Utterances, check_parts, read_part
from experiments.datasets.prepared import (
    SourceBuilder,
    cache_root,
    fingerprint,
    prepare,
    read_split,
)

CLASSES = ("negative", "positive")
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


def _to_utterances(columns: dict[str, np.ndarray]) -> Utterances:
    inputs = {name: columns[name] for name in MODALITIES}
    rows = Split(inputs, columns["label"].astype(np.int32))
    return Utterances(rows, columns["recording"], columns["position"])


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
