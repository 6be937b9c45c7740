"""VQA v2: questions about pictures, ten answers to each, from the files it is published in.

Inputs of N questions are

    image       [N, R, w] float16, features of regions, NaN where a picture has no more
    question    [N, WORDS] int32, ids of words, PADDING after the last

and labels [N, 21] int32: the numbers of up to ten answers in the vocabulary, then how many people
gave each, 0 where there are no more, then the answer type, a number in KINDS.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.text import build_vocabulary, encode
from experiments.datasets.vqa_answers import PEOPLE, WORTH, best_possible, vocabulary, votes
from experiments.datasets.vqa_json import KINDS, Questions, read_questions
from experiments.datasets.vqa_regions import load_regions
from experiments.datasets.vqa_sample import sample

MODALITIES = ("image", "question")
WORDS = 14  # of a question; what is longer is cut, one of four hundred
HELD_OUT = 0.1  # of the training pictures, which select the epoch


class VQA(NamedTuple):
    """What there is to learn from, and with.

    Attributes:
      dataset: its test split is VQA v2's validation split, the last with public answers.
      answers: the vocabulary.
      words: how many ids of words there are.
      questions: of the test rows.
      notes: on what was read.
    """

    dataset: Dataset
    answers: tuple[str, ...]
    words: int
    questions: Questions
    notes: Sequence[str]


def load_sample(seed: int, cache_dir: Path | None = None) -> VQA:
    """The synthetic sample, read from files as VQA v2's are."""
    folder = sample(cache_dir)
    return load(folder, [folder / "train2014.tsv"], [folder / "val2014.tsv"], seed, cache_dir)


def load(
    folder: Path,
    train_regions: Sequence[Path],
    test_regions: Sequence[Path],
    seed: int,
    cache_dir: Path | None = None,
) -> VQA:
    """Questions and annotations of `folder`, and regions of the pictures of both splits.

    The vocabulary is of the answers of the training file. A tenth of its pictures, drawn by the
    seed, with all their questions, are the validation split.

    Raises:
      InputError: a file is missing or damaged, or the files do not fit together.
    """
    trained, tested = (_read(folder, split) for split in ("train2014", "val2014"))
    if both := np.intersect1d(trained.images, tested.images).tolist():
        raise InputError(f"{folder}: picture {both[0]} is in train2014 and in val2014")
    assert trained.answers is not None
    answers = vocabulary(trained.answers.most)
    words = build_vocabulary(trained.texts, size=10**6)
    every = _split(trained, train_regions, answers, words, cache_dir)
    held_out = _held_out(trained.images, seed)
    train, validation = (
        Split({name: x[rows] for name, x in every.inputs.items()}, every.labels[rows])
        for rows in (~held_out, held_out)
    )
    test = _split(tested, test_regions, answers, words, cache_dir)
    dataset = Dataset("VQA v2", "sample", (), train, validation, test)
    return VQA(dataset, answers, len(words) + 2, tested, _notes(answers, train, test))


def _read(folder: Path, split: str) -> Questions:
    questions = folder / f"v2_OpenEnded_mscoco_{split}_questions.json"
    return read_questions(questions, folder / f"v2_mscoco_{split}_annotations.json")


def _held_out(images: np.ndarray, seed: int) -> np.ndarray:
    """[N] bool, questions about pictures that are held out."""
    pictures = np.random.default_rng(seed).permutation(np.unique(images))
    return np.isin(images, pictures[: max(1, round(HELD_OUT * len(pictures)))])


def _split(
    questions: Questions,
    files: Sequence[Path],
    answers: Sequence[str],
    words: dict[str, int],
    cache_dir: Path | None,
) -> Split:
    regions = load_regions(files, cache_dir)
    image, counts = regions.gather(regions.rows_of(questions.images))
    image[np.arange(regions.most) >= counts[:, None]] = np.nan
    text = encode(questions.texts, words, WORDS)
    return Split({"image": image, "question": text}, labels_of(questions, answers))


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


def floors(data: VQA) -> Mapping[str, np.ndarray]:
    """{what is known: [N] official accuracy on test rows} with less than everything.

    From the question, or the picture, alone: the answers are chosen knowing what test rows with the
    same question, or picture, are worth, so no model that sees as little does better.
    """
    train, labels = data.dataset.train.labels, data.dataset.test.labels
    usual = np.full(len(labels), _best_of(train, np.zeros(len(train), int))[0])
    texts = np.unique(np.array(data.questions.texts), return_inverse=True)[1]
    pictures = np.unique(data.questions.images, return_inverse=True)[1]
    return {
        "the most frequent answer": worth(labels, usual),
        "at most, from the question alone": worth(labels, _best_of(labels, texts)),
        "at most, from the picture alone": worth(labels, _best_of(labels, pictures)),
    }


def ceiling(data: VQA) -> np.ndarray:
    """[N] official accuracy of the best answer of the vocabulary to every test question."""
    assert data.questions.answers is not None
    numbers = {answer: number for number, answer in enumerate(data.answers)}
    return best_possible(data.questions.answers.ten, numbers)


def _best_of(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[N] for every row the one answer that is worth most on all rows of its group."""
    table = np.zeros((groups.max() + 1, labels[:, :PEOPLE].max() + 1))
    np.add.at(table, (groups[:, None], labels[:, :PEOPLE]), np.asarray(WORTH)[labels[:, PEOPLE:-1]])
    return np.argmax(table, axis=1)[groups]
