"""Texts to token ids: a vocabulary of the training rows' words."""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

from experiments.datasets import Dataset, Split

PADDING, UNKNOWN = 0, 1  # the first ids


def words(text: str) -> list[str]:
    """Lower-case words of letters, digits and apostrophes."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower())


def build_vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """{word: id} of the most frequent words, ids from 2; at most `size` ids with the two special.

    Words of equal frequency come in alphabetical order, so the ids depend on the texts alone.
    """
    counts = Counter(word for text in texts for word in words(text))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))[: max(size - 2, 0)]
    return {word: i for i, word in enumerate(ranked, start=2)}


def encode(texts: Iterable[str], vocabulary: dict[str, int], length: int) -> np.ndarray:
    """[N, length] int32: the first `length` words of every text, then PADDING."""
    rows = [[vocabulary.get(word, UNKNOWN) for word in words(text)[:length]] for text in texts]
    tokens = np.full((len(rows), length), PADDING, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens


def tokenised(
    dataset: Dataset, size: int, length: int, first: tuple[int, ...] = ()
) -> tuple[Dataset, int]:
    """The inputs "text" [N] as ids [N, length], the `first` ones given; and the vocabulary's size.

    Inputs that are no texts but features [N, …] stay as they are, with a vocabulary of 0.
    """
    texts = dataset.train.inputs["text"]
    if texts.ndim > 1:
        return dataset, 0
    vocabulary = build_vocabulary(texts, size)

    def ids(split: Split) -> Split:
        tokens = encode(split.inputs["text"], vocabulary, length - len(first))
        given = np.tile(np.array(first, np.int32), (len(tokens), 1))
        return split._replace(inputs={**split.inputs, "text": np.hstack([given, tokens])})

    assert dataset.validation is not None  # published with the data
    train, validation, test = map(ids, (dataset.train, dataset.validation, dataset.test))
    dataset = dataset._replace(train=train, validation=validation, test=test)
    return dataset, len(vocabulary) + 2
