"""Plots to token ids: a vocabulary of the training rows' words."""

import re
from collections import Counter
from collections.abc import Iterable

import numpy as np

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
