"""A synthetic sample in VQA v2's own files: drawn scenes, questions about them, ten answers each.

A picture has 3 to 8 things, each of one of four shapes, six colours and two sizes, somewhere. Its
regions are these and the background, without which attention, a mean, could not count. Their
features are a fixed random map of these attributes, plus noise. Questions come from five templates.
For each text, every possible answer is right equally often in a split, so a question alone tells
nothing about its answer. Of ten people each is wrong with probability ERRS, and then gives any
other answer to the question; each writes as people do, "Two", "2" or "two.".
"""

import base64
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.datasets.prepared import prepared_folder
from experiments.datasets.vqa_answers import NUMBERS, PEOPLE, normalised

SHAPES = ("ball", "cone", "cube", "ring")
COLOURS = ("blue", "green", "purple", "red", "white", "yellow")
SIZES = ("large", "small")
WIDTH = 32  # of the features
NOISE = 0.3
PIXELS = 100, 100  # of a picture
ERRS = 0.1
MOST = 3  # things of a kind that are counted
PICTURES = {"train2014": 2_500, "val2014": 800}
QUESTIONS = {"train2014": 10_000, "val2014": 2_400}  # or some fewer: all answers alike
SEED, VERSION = 0, 1
YES_NO = ("no", "yes")
COUNTS = tuple(map(str, range(MOST + 1)))


class Scenes(NamedTuple):
    """M pictures of at most R things.

    Attributes:
      shape, colour, size: [M, R] numbers in SHAPES, COLOURS and SIZES; -1 where nothing is.
      boxes: [M, R, 4] x1, y1, x2, y2 in pixels.
    """

    shape: np.ndarray
    colour: np.ndarray
    size: np.ndarray
    boxes: np.ndarray


class Question(NamedTuple):
    """A text, and what is right in which pictures.

    Attributes:
      text, kind: the question, and its answer type.
      begins: its first words.
      answers: all that may be right.
      right: [M] number of the right one, -1 where a picture does not allow the question.
    """

    text: str
    kind: str
    begins: str
    answers: tuple[str, ...]
    right: np.ndarray


def draw_scenes(rng: np.random.Generator, pictures: int) -> Scenes:
    shape = pictures, 8
    there = np.arange(8) < rng.integers(3, 9, size=(pictures, 1))
    attributes = (np.where(there, rng.integers(n, size=shape), -1) for n in (4, 6, 2))
    shapes, colours, sizes = attributes
    half = np.where(sizes == 0, 12, 6)[..., None]
    centre = rng.integers(12, 89, size=(*shape, 2))
    return Scenes(shapes, colours, sizes, np.concatenate([centre - half, centre + half], axis=-1))


def ask(scenes: Scenes) -> Iterator[Question]:
    """Every question there is."""
    is_shape = scenes.shape[None] == np.arange(len(SHAPES))[:, None, None]
    is_colour = scenes.colour[None] == np.arange(len(COLOURS))[:, None, None]
    for s, shape in enumerate(SHAPES):
        one = is_shape[s].sum(axis=1) == 1
        of_it = np.where(one, scenes.colour[np.arange(len(one)), is_shape[s].argmax(axis=1)], -1)
        for c, colour in enumerate(COLOURS):
            both = (is_shape[s] & is_colour[c]).any(axis=1)
            yield Question(
                f"Is there a {colour} {shape}?", "yes/no", "is there a", YES_NO, both + 0
            )
            right = np.where(one, of_it == c, -1)
            yield Question(f"Is the {shape} {colour}?", "yes/no", "is the", YES_NO, right)
        yield Question(f"What color is the {shape}?", "other", "what color is the", COLOURS, of_it)
        yield _count(f"{shape}s", is_shape[s])
    for c, colour in enumerate(COLOURS):
        one = is_colour[c].sum(axis=1) == 1
        of_it = np.where(one, scenes.shape[np.arange(len(one)), is_colour[c].argmax(axis=1)], -1)
        yield Question(f"What is the {colour} thing?", "other", "what is the", SHAPES, of_it)
        yield _count(f"{colour} things", is_colour[c])


def _count(things: str, there: np.ndarray) -> Question:
    count = there.sum(axis=1)
    right = np.where(count <= MOST, count, -1)
    return Question(f"How many {things} are there?", "number", "how many", COUNTS, right)


def balanced(
    rng: np.random.Generator, questions: list[Question], rows: int
) -> list[tuple[int, Question]]:
    """About so many (picture, question): each first word, text and answer as often as its like."""
    texts = Counter(question.begins for question in questions)
    found = []
    for question in questions:
        share = rows / len(texts) / texts[question.begins] / len(question.answers)
        pictures = [np.flatnonzero(question.right == i) for i in range(len(question.answers))]
        count = min(round(share), *map(len, pictures))
        drawn = np.concatenate([rng.choice(of, count, replace=False) for of in pictures])
        found += [(picture, question) for picture in drawn.tolist()]
    return sorted(found, key=lambda pair: pair[0])


def answered(rng: np.random.Generator, right: str, answers: tuple[str, ...]) -> list[str]:
    """What ten people say."""
    others = [answer for answer in answers if answer != right]
    said = [str(rng.choice(others)) if rng.random() < ERRS else right for _ in range(PEOPLE)]
    return [_written(rng, answer) for answer in said]


def _written(rng: np.random.Generator, answer: str) -> str:
    if answer.isdigit() and rng.random() < 0.3:
        answer = NUMBERS[int(answer)]
    how = rng.random()
    return answer.capitalize() if how < 0.1 else answer + "." if how < 0.15 else answer


def sample(cache_dir: Path | None = None) -> Path:
    """The folder with the files, made once in the cache: of the training and of the validation
    split questions, annotations, and the features of regions as tsv."""
    return prepared_folder(_write, "vqa_sample", f"v{VERSION}", cache_dir)


def _write(folder: Path) -> Path:
    rng = np.random.default_rng(SEED)
    attributes = len(SHAPES) + len(COLOURS) + len(SIZES) + 1  # the last: being the background
    seen_as = rng.standard_normal((attributes, WIDTH)) / np.sqrt(3)
    for number, split in enumerate(PICTURES):
        scenes = draw_scenes(rng, PICTURES[split])
        first = 1 + 100_000 * number  # no number is in both
        rows = balanced(rng, list(ask(scenes)), QUESTIONS[split])
        _write_questions(folder, split, rng, rows, first)
        _write_regions(folder / f"{split}.tsv", rng, scenes, seen_as, first)
    return folder


def _write_questions(
    folder: Path,
    split: str,
    rng: np.random.Generator,
    rows: list[tuple[int, Question]],
    first: int,
) -> None:
    questions, annotations, of_picture = [], [], Counter[int]()
    for picture, question in rows:
        image = first + picture
        ids = {"image_id": image, "question_id": 1000 * image + of_picture[picture]}
        of_picture[picture] += 1
        ten = answered(rng, question.answers[question.right[picture]], question.answers)
        questions.append(ids | {"question": question.text})
        annotations.append(
            ids
            | {
                "question_type": question.begins,
                "answer_type": question.kind,
                "multiple_choice_answer": Counter(map(normalised, ten)).most_common(1)[0][0],
                "answers": [
                    {"answer": answer, "answer_confidence": "yes", "answer_id": i}
                    for i, answer in enumerate(ten, 1)
                ],
            }
        )
    about: dict[str, Any] = {"info": {"description": "A synthetic sample."}, "data_subtype": split}
    (folder / f"v2_OpenEnded_mscoco_{split}_questions.json").write_text(
        json.dumps(about | {"questions": questions})
    )
    (folder / f"v2_mscoco_{split}_annotations.json").write_text(
        json.dumps(about | {"annotations": annotations})
    )


def _write_regions(
    path: Path, rng: np.random.Generator, scenes: Scenes, seen_as: np.ndarray, first: int
) -> None:
    with path.open("w", encoding="ascii") as file:
        for picture in range(len(scenes.shape)):
            there = scenes.shape[picture] >= 0
            shape, colour, size = (x[picture][there] for x in scenes[:3])
            ids = shape, len(SHAPES) + colour, len(SHAPES) + len(COLOURS) + size
            features = np.vstack([sum(seen_as[i] for i in ids), seen_as[-1]])
            features += NOISE * rng.standard_normal(features.shape)
            boxes = np.vstack([scenes.boxes[picture][there], [0, 0, *PIXELS]])
            coded = (base64.b64encode(np.float32(x).tobytes()).decode() for x in (boxes, features))
            line = first + picture, *PIXELS, len(features), *coded
            file.write("\t".join(map(str, line)) + "\n")
