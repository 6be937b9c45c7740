"""Chains of relations: an answer takes as many steps as is said."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from experiments.datasets import relations as data
from experiments.datasets.relations import COLOURS, DEEPEST, PLACES, RELATIONS

OBJECTS = 9


def drawn(seed=0, rows=6000, deepest=DEEPEST):
    return data.draw(np.random.default_rng(seed), rows, deepest, OBJECTS)


@pytest.fixture(scope="module")
def questions():
    return drawn()


@pytest.fixture(scope="module")
def split(questions):
    return data.split_of(questions)


def read_scene(tokens):
    """[(column, row, name, colour)] of one scene's tokens [n, 3n + 4]."""
    n = len(tokens)
    parts = np.split(tokens, [n, 2 * n, 3 * n], axis=1)
    assert all((part.sum(axis=1) == 1).all() for part in parts)
    return list(zip(*(part.argmax(axis=1).tolist() for part in parts), strict=True))


def read_question(tokens):
    """The name and the relations of one question's tokens [PLACES, n + 12]."""
    words = {}
    for token in tokens[~np.isnan(tokens).any(axis=1)]:
        word, place, last = np.split(token, [OBJECTS + 4, OBJECTS + 4 + PLACES])
        assert word.sum() == place.sum() == 1
        words[place.argmax()] = word.argmax(), bool(last[0])
    name, *others = [words[place] for place in sorted(words)]
    assert [last for _, last in others] == [False] * (len(others) - 1) + [True]
    return int(name[0]), [RELATIONS[word - OBJECTS] for word, _ in others]


def walk(scene, name, chain):
    """The objects that a chain leads to, by looking for the nearest on the right side."""
    here = next(thing for thing in scene if thing[2] == name)
    found = [here]
    for relation in chain:
        axis = 0 if relation in ("left", "right") else 1
        ahead = relation in ("right", "below")
        on_side = [t for t in scene if (t[axis] > here[axis]) == ahead and t[axis] != here[axis]]
        here = min(on_side, key=lambda t, here=here, axis=axis: abs(t[axis] - here[axis]))
        found.append(here)
    return found


def uniform(counts):
    """Whether counts are those of equally likely cases; a false alarm in ten thousand."""
    return len(counts) == 1 or chisquare(counts).pvalue > 1e-4


class TestData:
    def test_following_the_chain_in_the_tokens_gives_every_answer(self, split):
        for scene, question, (colour, depth) in zip(
            *split.inputs.values(), split.labels, strict=True
        ):
            things = read_scene(scene)
            for position in range(3):  # in columns, in rows, by name: each once
                assert sorted(thing[position] for thing in things) == list(range(OBJECTS))
            name, chain = read_question(question)
            assert len(chain) == depth
            path = walk(things, name, chain)
            assert len(set(path)) == depth + 1, "an object comes twice"
            sideways = [relation in ("left", "right") for relation in chain]
            assert all(a != b for a, b in itertools.pairwise(sideways))
            assert path[-1][3] == colour

    def test_everything_is_drawn_alike(self, questions, split):
        depth, answer = questions.depth, questions.answer
        assert np.bincount(depth).tolist() == [0, *[1000] * DEEPEST]
        for k in range(1, DEEPEST + 1):
            rows = depth == k
            assert uniform(np.bincount(answer[rows]))
            assert uniform(np.bincount(questions.place[rows], minlength=PLACES - k))
            assert uniform(np.bincount(questions.relations[rows, 0]))
            last = questions.path[rows, k]
            assert uniform(np.bincount(last, minlength=OBJECTS)), "the order of objects tells"
        there = ~np.isnan(split.inputs["question"]).any(axis=2)
        np.testing.assert_array_equal(there.sum(axis=1), depth + 1)
        np.testing.assert_array_equal(there.argmax(axis=1), questions.place)

    def test_the_question_tells_nothing_of_the_answer(self, questions):
        """Neither the name, nor any relation, nor the number of steps."""
        answer = questions.answer
        named = questions.name[np.arange(len(answer)), questions.start]
        for said in (named, questions.depth, *questions.relations.T[:1]):
            for value in np.unique(said):
                assert uniform(np.bincount(answer[said == value], minlength=len(COLOURS)))

    def test_the_objects_before_the_last_tell_nothing_of_the_answer(self, questions):
        """Who stops anywhere on the way stands on a colour that is right one time in four."""
        rows = np.arange(len(questions.depth))
        for k in range(1, DEEPEST + 1):
            for step in range(k):
                asked = questions.depth == k
                here = questions.colour[rows, questions.path[:, step]][asked]
                pairs = here * len(COLOURS) + questions.answer[asked]
                assert uniform(np.bincount(pairs, minlength=len(COLOURS) ** 2))

    def test_without_the_last_word_both_sides_are_as_likely(self):
        questions = drawn(seed=1, rows=12_000)
        rows = np.arange(len(questions.depth))
        last = questions.relations[rows, questions.depth - 1]
        known = data.bayes(questions)["all but the last word"]
        free = (known < 1).all(axis=1)  # both sides obey the rules, and have two colours
        for k in range(1, DEEPEST + 1):
            assert uniform(np.bincount(last[free & (questions.depth == k)], minlength=4))

    def test_bayes_rules_are_as_good_as_they_say(self):
        """A rule that is right in p of the cases where it says p, on rows of every depth."""
        questions = drawn(seed=2, rows=12_000)
        for name, known in data.bayes(questions).items():
            np.testing.assert_allclose(known.sum(axis=1), 1)
            for k in range(1, DEEPEST + 1):
                rows = questions.depth == k
                likely = known[rows].max(axis=1)
                right = known[rows].argmax(axis=1) == questions.answer[rows]
                error = np.sqrt((likely * (1 - likely)).mean() / rows.sum()) + 1e-9
                assert abs(right.mean() - likely.mean()) < 4 * error, (name, k)
                assert (known[rows, questions.answer[rows]] > 0).all(), "the answer was ruled out"

    def test_who_knows_more_is_right_more_often(self, questions):
        expected = [np.mean(known.max(axis=1)) for known in data.bayes(questions).values()]
        assert expected[0] == 0.25 and expected == sorted(expected) and expected[-1] < 0.85

    def test_rows_follow_from_the_seed_and_splits_share_none(self):
        first, again, other = (data.split_of(drawn(seed, 300)) for seed in (0, 0, 1))
        for name, x in first.inputs.items():
            np.testing.assert_array_equal(x, again.inputs[name])
            assert not np.array_equal(x, other.inputs[name], equal_nan=True)
