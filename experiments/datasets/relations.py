"""Questions about chains of relations, synthetic: what colour has the object right of the one above
Eve? How many steps an answer takes is known.

A scene has n objects on a board of n × n cells, one in every row and every column, each with a name
of its own and one of four colours. A question of depth k names an object and k relations, one after
the other: the next object to the left or right, or above or below, by columns or by rows. The two
axes take turns, as "right of left of" would lead nowhere; no object comes twice, and none is off
the board. Scenes and chains are drawn together, all that obey this alike. The answer is the colour
of the last object.

    scene     [n, 3n + 4]       an object a position, in any order: one-hot column, row, name,
                                and colour
    question  [PLACES, n + 12]  a word a position: one-hot name or relation, one-hot place, and
                                whether it is the last word; NaN where there is no word

A question stands anywhere among the places, so that short ones show all of them.

Colours are independent of all else. So given the scene, the chain and every colour but that of the
last object, each answer is as likely as any other: who has not made the last step has nothing but
the colours of the objects that it may lead to. Whoever follows the chain is always right.
"""

from typing import NamedTuple

import numpy as np

from experiments.datasets import Dataset, Split

COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left", "right", "above", "below")  # rows are counted from the top
DEEPEST = 6
PLACES = DEEPEST + 1
FEWEST = 8  # objects: fewer leave hardly a chain of DEEPEST


class Questions(NamedTuple):
    """N questions, each about a scene of its own.

    Attributes:
      column, row, name, colour: [N, n] of the objects.
      start: [N] the object that a question names.
      relations: [N, DEEPEST], of which the first `depth` are asked.
      depth: [N].
      path: [N, DEEPEST + 1] the objects that the chain leads to, the start first; what comes after
        `depth` steps means nothing.
      place: [N] of the first word.
    """

    column: np.ndarray
    row: np.ndarray
    name: np.ndarray
    colour: np.ndarray
    start: np.ndarray
    relations: np.ndarray
    depth: np.ndarray
    path: np.ndarray
    place: np.ndarray

    @property
    def answer(self) -> np.ndarray:
        """[N], a colour."""
        rows = np.arange(len(self.depth))
        return self.colour[rows, self.path[rows, self.depth]]


def dataset(train: Questions, validation: Questions, test: Questions) -> Dataset:
    return Dataset("Relations", "sample", (), split_of(train), split_of(validation), split_of(test))


def draw(rng: np.random.Generator, rows: int, deepest: int, objects: int) -> Questions:
    """So many questions of the depths 1 to `deepest`, each depth as often as any other."""
    depth = rng.permutation(np.arange(rows) % deepest + 1)
    questions = _propose(rng, depth, objects)
    while len(wrong := np.flatnonzero(~_is_chain(questions))):
        for kept, new in zip(questions, _propose(rng, depth[wrong], objects), strict=True):
            kept[wrong] = new
    return questions


def _propose(rng: np.random.Generator, depth: np.ndarray, objects: int) -> Questions:
    """Any scenes and relations; a chain may leave the board or come back."""
    rows = len(depth)

    def permutations() -> np.ndarray:
        return rng.permuted(np.tile(np.arange(objects), (rows, 1)), axis=1)

    column, row, name = permutations(), permutations(), permutations()
    colour = rng.integers(len(COLOURS), size=(rows, objects))
    start = rng.integers(objects, size=rows)
    axis = (rng.integers(2, size=(rows, 1)) + np.arange(DEEPEST)) % 2
    relations = 2 * axis + rng.integers(2, size=(rows, DEEPEST))
    path = follow(column, row, start, relations)
    place = rng.integers(PLACES - depth)
    return Questions(column, row, name, colour, start, relations, depth, path, place)


def follow(
    column: np.ndarray, row: np.ndarray, start: np.ndarray, relations: np.ndarray
) -> np.ndarray:
    """[N, K + 1] the objects that K relations lead to, the start first; -1 off the board."""
    every, path = np.arange(len(start)), [start]
    objects = column.shape[1]
    at_column, at_row = np.argsort(column, axis=1), np.argsort(row, axis=1)
    for relation in relations.T:
        here, across = path[-1], relation < 2
        to = np.where(across, column[every, here], row[every, here]) + 2 * (relation % 2) - 1
        on_board = (here >= 0) & (to >= 0) & (to < objects)
        to = np.where(on_board, to, 0)
        found = np.where(across, at_column[every, to], at_row[every, to])
        path.append(np.where(on_board, found, -1))
    return np.stack(path, axis=1)


def _is_chain(questions: Questions) -> np.ndarray:
    """[N] whether the chain stays on the board and comes to no object twice."""
    path = questions.path
    fresh = [
        (path[:, k] >= 0) & np.all(path[:, :k] != path[:, k : k + 1], axis=1) for k in range(PLACES)
    ]
    asked = np.arange(PLACES) <= questions.depth[:, None]
    return np.all(np.stack(fresh, axis=1) | ~asked, axis=1)


def split_of(questions: Questions) -> Split:
    """Inputs as above, and labels [N, 2]: the answer, and the depth."""
    n, rows = questions.name.shape[1], np.arange(len(questions.depth))[:, None]
    one_hot = np.eye(n, dtype=np.float32)
    seen = questions.column, questions.row, questions.name
    scene = [one_hot[x] for x in seen] + [np.eye(len(COLOURS), dtype=np.float32)[questions.colour]]
    named = questions.name[rows, questions.start[:, None]]
    word = np.concatenate([named, n + questions.relations], axis=1)
    place = questions.place[:, None] + np.arange(PLACES)
    asked = np.arange(PLACES) <= questions.depth[:, None]
    last = np.arange(PLACES) == questions.depth[:, None]
    words = np.full((len(rows), 2 * PLACES, n + 12), np.nan, np.float32)  # half of it cut off
    words[rows, place] = np.concatenate(
        [
            np.eye(n + len(RELATIONS))[word],
            np.eye(2 * PLACES)[place][..., :PLACES],
            last[..., None],
        ],
        axis=-1,
    )
    words[rows, place] = np.where(asked[..., None], words[rows, place], np.nan)
    labels = np.stack([questions.answer, questions.depth], axis=1).astype(np.int32)
    inputs = {"scene": np.concatenate(scene, axis=-1), "question": words[:, :PLACES]}
    return Split(inputs, labels)


# --- what is known with less than everything ---------------------------------------------------


def bayes(questions: Questions) -> dict[str, np.ndarray]:
    """{what is known: probabilities of the answers [N, 4]}, exact.

    the question alone: a colour of four.
    the scene alone: the colours of all objects.
    all but the last step: the objects of the chain are known, but for the last; it is none of them.
    all but the last word: and it is next to the last but one along the other axis, on one of two
      sides, or on the only one that obeys the rules.
    """
    everywhere = np.ones_like(questions.colour, bool)
    before = _before_last(questions)
    return {
        "the question alone": np.full((len(everywhere), len(COLOURS)), 1 / len(COLOURS)),
        "the scene alone": _shares(questions, everywhere),
        "all but the last step": _shares(questions, ~before),
        "all but the last word": _shares(questions, _either_side(questions) & ~before),
    }


def _before_last(questions: Questions) -> np.ndarray:
    """[N, n] the objects of the chain but for the last."""
    objects = np.arange(questions.name.shape[1])
    before = np.arange(PLACES) < questions.depth[:, None]
    return np.any((questions.path[..., None] == objects) & before[..., None], axis=1)


def _either_side(questions: Questions) -> np.ndarray:
    """[N, n] the two objects that the last relation and its opposite lead to."""
    rows = np.arange(len(questions.depth))
    here = questions.path[rows, questions.depth - 1][:, None]
    across = questions.relations[rows, questions.depth - 1] < 2
    along = np.where(across[:, None], questions.column, questions.row)
    return np.abs(along - along[rows[:, None], here]) == 1


def _shares(questions: Questions, among: np.ndarray) -> np.ndarray:
    """[N, 4] shares of the colours among objects [N, n] bool."""
    is_colour = questions.colour[..., None] == np.arange(len(COLOURS))
    count = np.sum(is_colour & among[..., None], axis=1)
    return count / np.sum(count, axis=1, keepdims=True)
