"""Questions about chains of relations, synthetic: who is above the one right of Eve? How many steps
an answer takes is known.

A scene has n objects on a board of n × n cells, one in every row and every column, each with a name
of its own. A question of depth k names an object and k relations, one after the other: the next
object to the left or right, or above or below, by columns or by rows. The two axes take turns, as
"right of left of" would lead nowhere; no object comes twice, and none is off the board. Scenes and
chains are drawn together, all that obey this alike. The answer is the name of the last object. Both
modalities are sets:

    scene     [4 (n - 1), 2n + 4]   a pair of neighbours a position, "b is right of a": one-hot a,
                                    relation and b
    question  [DEEPEST, n + 17]     a relation a position, "x is right of y": one-hot relation, y, x
                                    and whether x is asked for; NaN where there is none

Every x has one of DEEPEST labels, drawn at random, so that short questions show all of them; y is a
name in the first relation, and the x before it in the others.

Whoever follows the chain is always right, and whoever stops on the way never is: no object comes
twice. A question alone leaves all other names as likely, and a scene with all but the last word two
of them.
"""

from typing import NamedTuple

import numpy as np

from experiments.datasets import Dataset, Split

RELATIONS = ("left", "right", "above", "below")  # rows are counted from the top
DEEPEST = 6
FEWEST = DEEPEST + 2  # objects: on fewer hardly a chain is that long


class Questions(NamedTuple):
    """N questions, each about a scene of its own; a name is a number from 0 to n - 1.

    Attributes:
      column, row: [N, n] of the objects, by name.
      relations: [N, DEEPEST], of which the first `depth` are asked.
      path: [N, DEEPEST + 1] the names that the chain leads to, the start first; what comes after
        `depth` steps means nothing.
      depth: [N].
      order: [N, 4 (n - 1)] of the pairs of neighbours.
      labels: [N, DEEPEST] of what the relations lead to.
      positions: [N, DEEPEST] of the relations in the question.
    """

    column: np.ndarray
    row: np.ndarray
    relations: np.ndarray
    path: np.ndarray
    depth: np.ndarray
    order: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    @property
    def answer(self) -> np.ndarray:
        """[N], a name."""
        return self.path[np.arange(len(self.depth)), self.depth]


def dataset(train: Questions, validation: Questions, test: Questions) -> Dataset:
    parts = split_of(train), split_of(validation), split_of(test)
    return Dataset("Relations", "sample", (), *parts)


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

    def permutations(n: int) -> np.ndarray:
        return rng.permuted(np.tile(np.arange(n), (rows, 1)), axis=1)

    column, row = permutations(objects), permutations(objects)
    axis = (rng.integers(2, size=(rows, 1)) + np.arange(DEEPEST)) % 2
    relations = 2 * axis + rng.integers(2, size=(rows, DEEPEST))
    path = [rng.integers(objects, size=rows)]
    neighbours = _neighbours(column, row)
    for relation in relations.T:
        here = path[-1]
        path.append(np.where(here < 0, -1, neighbours[np.arange(rows), relation, here]))
    return Questions(
        column,
        row,
        relations,
        np.stack(path, axis=1),
        depth,
        permutations(len(RELATIONS) * (objects - 1)),
        permutations(DEEPEST),
        permutations(DEEPEST),
    )


def _neighbours(column: np.ndarray, row: np.ndarray) -> np.ndarray:
    """[N, 4, n] what is left of, right of, above and below each object; -1 off the board."""
    found = []
    for place in (column, row):
        ordered = np.pad(np.argsort(place, axis=1), ((0, 0), (1, 1)), constant_values=-1)
        found += [np.take_along_axis(ordered, place + shift, axis=1) for shift in (0, 2)]
    return np.stack(found, axis=1)


def _is_chain(questions: Questions) -> np.ndarray:
    """[N] whether the chain stays on the board and comes to no object twice."""
    path, steps = questions.path, np.arange(DEEPEST + 1)
    fresh = [(path[:, k] >= 0) & np.all(path[:, :k] != path[:, k : k + 1], axis=1) for k in steps]
    return np.all(np.stack(fresh, axis=1) | (steps > questions.depth[:, None]), axis=1)


def split_of(questions: Questions) -> Split:
    """Inputs as above, and labels [N, 2]: the answer, and the depth."""
    labels = np.stack([questions.answer, questions.depth], axis=1).astype(np.int32)
    return Split({"scene": _scene(questions), "question": _question(questions)}, labels)


def _scene(questions: Questions) -> np.ndarray:
    neighbours = _neighbours(questions.column, questions.row)
    rows, (_, kinds, n) = np.arange(len(neighbours))[:, None], neighbours.shape
    there = np.nonzero(neighbours >= 0)[1:]  # as many in every scene
    relation, one = np.reshape(there, (2, len(rows), -1))
    other = neighbours[rows, relation, one]
    pairs = [_one_hot(one, n), _one_hot(relation, kinds), _one_hot(other, n)]
    return np.concatenate(pairs, axis=-1)[rows, questions.order]


def _question(questions: Questions) -> np.ndarray:
    n, depth = questions.column.shape[1], questions.depth[:, None]
    steps, label = np.arange(DEEPEST), questions.labels
    of = np.concatenate([questions.path[:, :1], n + label[:, :-1]], axis=1)
    words = np.concatenate(
        [
            _one_hot(questions.relations, len(RELATIONS)),
            _one_hot(of, n + DEEPEST),
            _one_hot(label, DEEPEST),
            (steps == depth - 1)[..., None],
        ],
        axis=-1,
    )
    words = np.where((steps < depth)[..., None], words, np.float32(np.nan))
    return words[np.arange(len(words))[:, None], questions.positions]


def _one_hot(x: np.ndarray, length: int) -> np.ndarray:
    return np.eye(length, dtype=np.float32)[x]


# --- what can be known with less than everything -----------------------------------------------


def bayes(questions: Questions) -> dict[str, np.ndarray]:
    """{what is known: probabilities of the answers [N, n]}, exact.

    the question: any name but the one in it.
    all but the last word: the answer is next to the last object but one along the other axis, on
      one of two sides, or on the only one that obeys the rules.
    """
    names, steps = np.arange(questions.column.shape[1]), np.arange(DEEPEST + 1)
    passed = np.where(steps < questions.depth[:, None], questions.path, -1)
    others = np.all(passed[..., None] != names, axis=1)
    return {
        "the question": _any_of(names != questions.path[:, :1]),
        "all but the last word": _any_of(others & _either_side(questions)),
    }


def _either_side(questions: Questions) -> np.ndarray:
    """[N, n] the objects that the last relation and its opposite lead to."""
    rows, last = np.arange(len(questions.depth)), questions.depth - 1
    across = questions.relations[rows, last] < 2
    along = np.where(across[:, None], questions.column, questions.row)
    here = along[rows, questions.path[rows, last]]
    return np.abs(along - here[:, None]) == 1


def _any_of(likely: np.ndarray) -> np.ndarray:
    """[N, n] probabilities from [N, n] bool: those that are true are equally likely."""
    return likely / np.sum(likely, axis=1, keepdims=True)
