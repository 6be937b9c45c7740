"""VQA v2: questions about pictures, ten answers to each, from the files it is published in.

Inputs of N questions are

    image       [N, R, w] float16, features of regions, NaN where a picture has no more
    question    [N, WORDS] int32, ids of words, PADDING after the last

and labels [N, 21] int32: the numbers of up to ten answers in the vocabulary, then how many people
gave each, 0 where there are no more, then the answer type, a number in KINDS.
"""

import hashlib
import math
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.download import Remote, fetch, sha256
from experiments.datasets.preprocess import take
from experiments.datasets.stream import OnDisk, Stream
from experiments.datasets.text import build_vocabulary, encode
from experiments.datasets.vqa_answers import PEOPLE, WORTH, vocabulary, votes
from experiments.datasets.vqa_json import KINDS, Questions, read_questions
from experiments.datasets.vqa_regions import Regions, load_regions
from experiments.datasets.vqa_sample import sample

MODALITIES = ("image", "question")
SPLITS = ("train2014", "val2014")
WORDS = 14  # of a question; what is longer is cut, one of four hundred
HELD_OUT = 0.1  # of the training pictures, which select the epoch
IN_MEMORY = 2 * 10**9  # bytes
_URL = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
FILES = {  # and their SHA-256
    "v2_Questions_Train_mscoco.zip": (
        "05a64b6e2582d06d7585f5429674a9a33851878be1bff9f8668cdcf792df611e"
    ),
    "v2_Questions_Val_mscoco.zip": (
        "e71f6c5c3e97a51d050f28243e262b28cd0c48d11a6b4632d769d30d3f93222a"
    ),
    "v2_Annotations_Train_mscoco.zip": (
        "fb101bcefe91422c543c2bb6d70af11eb3119d0ff745ae283d09acdf66250853"
    ),
    "v2_Annotations_Val_mscoco.zip": (
        "0caae7c8d1dafd852727f5ac046bc1efca9b72026bd6ffa34fc489f3a7b3291e"
    ),
}


class VQA(NamedTuple):
    """What there is to learn from, and with.

    Attributes:
      dataset: its test split is VQA v2's validation split, the last with public answers.
      answers: the vocabulary.
      words: how many ids of words there are.
      trained, tested: questions of the training file and of the test rows.
      labels: of `trained`, validation rows included.
      notes: on what was read.
    """

    dataset: Dataset
    answers: tuple[str, ...]
    words: int
    trained: Questions
    tested: Questions
    labels: np.ndarray
    notes: Sequence[str]


def load(folder: Path | None, seed: int, cache_dir: Path | None = None) -> VQA:
    """VQA v2 from a folder; None: the synthetic sample, in the same files.

    The folder has the questions and annotations of train2014 and val2014 as they are published,
    plain or gzipped, and features of the regions of all their pictures, in .tsv or .hdf5 files or
    in folders of .npz. The vocabulary is of the answers of the training file. A tenth of its
    pictures, drawn by the seed, with all their questions, are the validation split. Where the
    regions of all questions take more than IN_MEMORY, they stay on disk.

    Raises:
      InputError: a file is missing or damaged, or the files do not fit together.
    """
    data: Literal["sample", "real"] = "real" if folder else "sample"
    folder = folder.expanduser() if folder else sample(cache_dir)
    trained, tested = (read_questions(*_files(folder, split)) for split in SPLITS)
    if both := np.intersect1d(trained.images, tested.images).tolist():
        raise InputError(f"{folder}: picture {both[0]} is in train2014 and in val2014")
    assert trained.answers is not None
    answers = vocabulary(trained.answers.most)
    words = build_vocabulary(trained.texts, size=10**6)
    regions = load_regions(_region_files(folder), cache_dir)
    every, test = (_split(questions, regions, answers, words) for questions in (trained, tested))
    held_out = _held_out(trained.images, seed)
    train, validation = (_part(every, np.flatnonzero(x)) for x in (~held_out, held_out))
    notes, stream = _notes(answers, every, test), None
    if (size := sum(_bytes(part) for part in (every, test))) > IN_MEMORY:
        stream = Stream(len(train.labels), partial(take, train))
        train = take(train, np.arange(2))
        notes.append(f"Regions of all questions take {size / 1e9:.0f} GB and stay on disk.")
    else:
        train, validation, test = (
            take(part, np.arange(len(part.labels))) for part in (train, validation, test)
        )
    dataset = Dataset("VQA v2", data, (), train, validation, test, stream)
    return VQA(dataset, answers, len(words) + 2, trained, tested, every.labels, notes)


def download(folder: Path) -> None:
    """Puts VQA v2's questions and annotations into a folder; there are no features to be had.

    Raises:
      InputError: a file cannot be had, or is not the published one.
    """
    for name, checksum in FILES.items():
        archive = fetch(Remote(f"{_URL}/{name}", sha256=checksum), folder / "downloads")
        try:
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)
        except (zipfile.BadZipFile, OSError) as error:
            raise InputError(f"{archive} cannot be unpacked ({error})") from error


def _files(folder: Path, split: str) -> list[Path]:
    """Questions and annotations, gzipped where such files are there."""
    names = f"v2_OpenEnded_mscoco_{split}_questions.json", f"v2_mscoco_{split}_annotations.json"
    zipped = (folder / f"{name}.gz" for name in names)
    return [path if path.exists() else path.with_suffix("") for path in zipped]


def checksum(folder: Path) -> str:
    """SHA-256 of all questions and annotations in a folder.

    Raises:
      InputError: one of the files is missing.
    """
    try:
        sums = [sha256(path) for split in SPLITS for path in _files(folder, split)]
    except OSError as error:
        raise InputError(
            f"cannot read {error.filename}: {error.strerror}; --download gets VQA v2's questions "
            "and annotations"
        ) from error
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def _region_files(folder: Path) -> list[Path]:
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in there if path.suffix in (".tsv", ".hdf5", ".h5")]
    files += [path for path in there if path.is_dir() and any(path.glob("*.npz"))]
    if not files:
        raise InputError(
            f"{folder} has no features of regions; expected .tsv or .hdf5 files, or folders of "
            ".npz, that together have all pictures. They are not downloaded: the links of "
            "bottom-up attention are dead; LXMERT's authors, among others, publish some"
        )
    return files


def _held_out(images: np.ndarray, seed: int) -> np.ndarray:
    """[N] bool, questions about pictures that are held out."""
    pictures = np.random.default_rng(seed).permutation(np.unique(images))
    return np.isin(images, pictures[: max(1, round(HELD_OUT * len(pictures)))])


def _split(
    questions: Questions, regions: Regions, answers: Sequence[str], words: dict[str, int]
) -> Split:
    """Whose regions are on disk."""
    image: Any = _image(regions, regions.rows_of(questions.images))
    text = encode(questions.texts, words, WORDS)
    return Split({"image": image, "question": text}, labels_of(questions, answers))


def _image(regions: Regions, places: np.ndarray) -> OnDisk:
    """Of pictures at these places [N] of the table."""

    def read(rows: np.ndarray) -> np.ndarray:
        image, counts = regions.gather(places[rows])
        image[np.arange(regions.most) >= counts[:, None]] = np.nan
        return image

    width = regions.features.shape[1]
    return OnDisk((len(places), regions.most, width), regions.features.dtype, read)


def _part(split: Split, rows: np.ndarray) -> Split:
    """Some rows [n] of a split, where regions stay on disk."""
    whole: Any = split.inputs["image"]
    image: Any = OnDisk((len(rows), *whole.shape[1:]), whole.dtype, lambda some: whole[rows[some]])
    return Split({"image": image, "question": split.inputs["question"][rows]}, split.labels[rows])


def _bytes(split: Split) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in split.inputs.values())


def labels_of(questions: Questions, answers: Sequence[str]) -> np.ndarray:
    """[N, 21], as above."""
    assert questions.answers is not None
    numbers = {answer: number for number, answer in enumerate(answers)}
    labels = np.zeros((len(questions.ids), 2 * PEOPLE + 1), np.int32)
    for row, ten, kind in zip(labels, questions.answers.ten, questions.answers.kinds, strict=True):
        given = votes(ten, numbers)
        row[: len(given)] = list(given)
        row[PEOPLE : PEOPLE + len(given)] = list(given.values())
        row[-1] = kind
    return labels


def _notes(answers: Sequence[str], train: Split, test: Split) -> list[str]:
    unknown = (np.sum(~split.labels[:, PEOPLE:-1].any(axis=1)) for split in (train, test))
    return [
        f"The vocabulary has {len(answers):,} answers, of the training file alone. "
        "{:,} training and {:,} test questions have no answer in it.".format(*unknown)
    ]


# --- what answers are worth --------------------------------------------------------------------


def worth(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[N] official accuracy of answers, by their numbers [N] in the vocabulary."""
    same = labels[:, :PEOPLE] == predicted[:, None]
    counts = np.sum(np.where(same, labels[:, PEOPLE:-1], 0), axis=1)
    return np.asarray(WORTH)[counts]


def by_kind(labels: np.ndarray) -> dict[str, np.ndarray]:
    """{answer type: [N] bool}, which rows are of it; of those that there are."""
    rows = {kind: labels[:, -1] == number for number, kind in enumerate(KINDS)}
    return {kind: of_kind for kind, of_kind in rows.items() if of_kind.any()}


def floors(data: VQA) -> dict[str, np.ndarray]:
    """{what is known: [N] official accuracy on test rows} with less than everything.

    The most frequent answers are those of the training file. Of the sample there is more, what can
    be had from the question, or the picture, alone: answers are chosen knowing what they are worth
    on all test rows with that question, or picture, so no model that sees as little does better.
    """
    labels = data.dataset.test.labels
    assert data.trained.answers is not None and data.tested.answers is not None
    usual = _best_of(data.labels, np.zeros(len(data.labels), int))[0]
    types = data.trained.answers.types
    of_type = dict(zip(types, _by(data.labels, types), strict=True))
    by_type = np.array([of_type.get(kind, usual) for kind in data.tested.answers.types])
    found = {
        "the most frequent answer": worth(labels, np.full(len(labels), usual)),
        "the most frequent, by type of question": worth(labels, by_type),
    }
    if data.dataset.data == "sample":
        at_most = _by(labels, data.tested.texts), _by(labels, data.tested.images.tolist())
        found["at most, from the question alone"] = worth(labels, at_most[0])
        found["at most, from the picture alone"] = worth(labels, at_most[1])
    return found


def ceiling(data: VQA) -> np.ndarray:
    """[N] official accuracy of the best answer of the vocabulary to every test question."""
    return np.asarray(WORTH)[data.dataset.test.labels[:, PEOPLE:-1].max(axis=1)]


def _by(labels: np.ndarray, names: Sequence[object]) -> np.ndarray:
    """`_best_of` rows with the same name."""
    return _best_of(labels, np.unique(np.array(names), return_inverse=True)[1])


def _best_of(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N] for every row the one answer that is worth most on all rows of its group."""
    table = np.zeros((groups.max() + 1, labels[:, :PEOPLE].max() + 1))
    np.add.at(table, (groups[:, None], labels[:, :PEOPLE]), np.asarray(WORTH)[labels[:, PEOPLE:-1]])
    return np.argmax(table, axis=1)[groups]
