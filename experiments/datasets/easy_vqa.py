"""easy-VQA: questions about drawings of one coloured shape, as the package easy-vqa ships them.

4,000 training and 1,000 test pictures of 64 × 64 pixels, with 38,575 and 9,673 questions and 13
answers: yes and no, three shapes, eight colours. Inputs are

    image       [N, SIDE, SIDE, 3] uint8, every pixel the mean of four
    question    [N, T] int32, ids of words, PADDING after the last

and labels int32 [N]. No picture is in two parts.

Source: Zhou, "Easy Visual Question Answering", 2019, github.com/vzhou842/easy-VQA (MIT).
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.common.errors import InputError
from experiments.datasets import Dataset, Split
from experiments.datasets.preprocess import take
from experiments.datasets.text import build_vocabulary, encode, words

HELD_OUT = 200  # training pictures that select the epoch
MOST = 3800  # that are left to train on
SIDE = 32  # pixels
ANSWERS = {
    "yes/no": ("no", "yes"),
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
CLASSES = tuple(answer for answers in ANSWERS.values() for answer in answers)


def load(images: int, seed: int) -> tuple[Dataset, int]:
    """The data, with so many training pictures, and the size of the vocabulary.

    The pictures for validation, and those for training among the others, are drawn by the seed.

    Raises:
      InputError: the package easy-vqa is not installed.
    """
    package = _package()
    pictures, tested = map(_read, (package.get_train_image_paths(), package.get_test_image_paths()))
    order = np.random.default_rng(seed).permutation(len(pictures))
    held_out, trained = order[:HELD_OUT], order[HELD_OUT : HELD_OUT + images]
    texts, answers, about = package.get_train_questions()
    vocabulary = build_vocabulary(texts, size=10**6)
    length = max(len(words(text)) for text in texts)

    def split(texts: Sequence[str], answers: Sequence[str], images: np.ndarray) -> Split:
        inputs = {"image": images, "question": encode(texts, vocabulary, length)}
        return Split(inputs, np.array([CLASSES.index(answer) for answer in answers], np.int32))

    every = split(texts, answers, pictures[about])
    train, validation = (take(every, np.isin(about, part)) for part in (trained, held_out))
    texts, answers, about = package.get_test_questions()
    test = split(texts, answers, tested[about])
    dataset = Dataset("easy-VQA", "real", CLASSES, train, validation, test)
    return dataset, len(vocabulary) + 2


def _package() -> Any:
    try:
        import easy_vqa
    except ImportError as error:
        raise InputError("easy-VQA needs pip install -e '.[vqa]'") from error
    return easy_vqa


def _read(paths: Mapping[int, str]) -> np.ndarray:
    """Pictures [N, SIDE, SIDE, 3] in the order of their numbers, which are 0 … N - 1."""
    images = []
    for number in range(len(paths)):
        with Image.open(Path(paths[number])) as image:
            images.append(np.asarray(image.convert("RGB").reduce(image.width // SIDE)))
    return np.stack(images)


def by_kind(labels: np.ndarray) -> dict[str, np.ndarray]:
    """{kind: [N] bool}, which labels are answers of that kind."""
    numbers = {kind: [CLASSES.index(a) for a in answers] for kind, answers in ANSWERS.items()}
    return {kind: np.isin(labels, of_kind) for kind, of_kind in numbers.items()}


def question_alone(train: Split, test: Split) -> np.ndarray:
    """[N, C] one-hot: the most frequent training answer to each question, whatever the picture."""
    counts: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for question, answer in zip(train.inputs["question"], train.labels, strict=True):
        counts[question.tobytes()][int(answer)] += 1
    any_question = Counter(train.labels.tolist())
    best = [
        (counts.get(question.tobytes()) or any_question).most_common(1)[0][0]
        for question in test.inputs["question"]
    ]
    return np.eye(len(CLASSES), dtype=np.float32)[best]
