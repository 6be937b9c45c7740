"""Chains of relations: an answer takes as many steps as is said; and ``experiments.relations``."""

import itertools
import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from experiments import relations
from experiments.datasets import relations as data
from experiments.datasets.relations import DEEPEST, RELATIONS
from experiments.training.run_directory import options_of, saved_config

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
    """{(name, relation): other name} of one scene's tokens."""
    parts = np.split(tokens, [OBJECTS, OBJECTS + 4], axis=1)
    assert all((part.sum(axis=1) == 1).all() for part in parts)
    words = zip(*(part.argmax(axis=1).tolist() for part in parts), strict=True)
    found = {(name, RELATIONS[relation]): other for name, relation, other in words}
    assert len(found) == len(tokens) == 4 * (OBJECTS - 1)
    return found


def read_question(tokens):
    """The name and the relations of one question's tokens, from the end to the beginning."""
    said, asked = {}, []
    for token in tokens[~np.isnan(tokens).any(axis=1)]:
        *parts, last = np.split(token, [4, 10 + OBJECTS, 16 + OBJECTS])
        assert all(part.sum() == 1 for part in parts)
        relation, of, label = (int(part.argmax()) for part in parts)
        said[label] = RELATIONS[relation], of
        asked += [label] * int(last[0])
    (label,), chain = asked, []
    while label >= 0:
        relation, of = said.pop(label)
        chain.insert(0, relation)
        label = of - OBJECTS
    assert not said, "a relation that leads nowhere"
    return of, chain


def uniform(counts):
    """Whether counts are those of equally likely cases; a false alarm in ten thousand."""
    return chisquare(counts).pvalue > 1e-4


class TestData:
    def test_following_the_chain_in_the_tokens_gives_every_answer(self, split):
        for scene, question, (answer, depth) in zip(
            *split.inputs.values(), split.labels, strict=True
        ):
            pairs, (name, chain) = read_scene(scene), read_question(question)
            assert len(chain) == depth
            path = [name]
            for relation in chain:
                name = pairs[name, relation]
                path.append(name)
            assert len(set(path)) == depth + 1, "an object comes twice"
            sideways = [relation in ("left", "right") for relation in chain]
            assert all(a != b for a, b in itertools.pairwise(sideways))
            assert name == answer

    def test_scenes_are_boards(self, split, questions):
        """The pairs tell one row of all objects from left to right, and one from top to bottom."""
        for scene, column, row in zip(
            split.inputs["scene"][:300], questions.column, questions.row, strict=False
        ):
            pairs = read_scene(scene)
            for ahead, back, place in (("right", "left", column), ("below", "above", row)):
                (name,) = {n for n in range(OBJECTS) if (n, back) not in pairs}
                seen = [name]
                while (name, ahead) in pairs:
                    before, name = name, pairs[name, ahead]
                    assert pairs[name, back] == before
                    seen.append(name)
                assert sorted(seen) == list(range(OBJECTS))
                np.testing.assert_array_equal(place[seen], np.arange(OBJECTS))

    def test_everything_is_drawn_alike(self, questions, split):
        depth, answer = questions.depth, questions.answer
        assert np.bincount(depth).tolist() == [0, *[1000] * DEEPEST]
        rows, there = np.arange(len(depth)), ~np.isnan(split.inputs["question"]).any(axis=2)
        np.testing.assert_array_equal(there.sum(axis=1), depth)
        for k in range(1, DEEPEST + 1):
            asked, last = depth == k, questions.path[rows, depth]
            assert uniform(np.bincount(answer[asked]))
            assert uniform(np.bincount(last[asked], minlength=OBJECTS))
            assert uniform(np.bincount(questions.relations[asked, 0], minlength=4))
            assert uniform(np.bincount(questions.labels[asked, k - 1], minlength=DEEPEST))
            assert k == DEEPEST or uniform(there[asked].sum(axis=0))

    def test_the_question_tells_nothing_but_that_it_is_another_name(self, questions):
        """Neither the name in it, nor the first relation, nor the number of steps tells more."""
        start = questions.path[:, 0]
        further = (questions.answer - start) % OBJECTS
        for said in (start, questions.depth, questions.relations[:, 0]):
            for value in np.unique(said):
                counts = np.bincount(further[said == value], minlength=OBJECTS)
                assert counts[0] == 0 and uniform(counts[1:])

    def test_without_the_last_word_both_sides_are_as_likely(self):
        questions = drawn(seed=1, rows=12_000)
        last = questions.relations[np.arange(len(questions.depth)), questions.depth - 1]
        known = data.bayes(questions)["all but the last word"]
        undecided = np.sum(known > 0, axis=1) == 2
        for k in range(1, DEEPEST + 1):
            asked = questions.depth == k
            assert undecided[asked].mean() > 0.3
            assert uniform(np.bincount(last[undecided & asked], minlength=4))

    def test_without_the_last_step_every_other_object_is_as_likely(self):
        """Change places of the last object and any that the chain does not come to: all steps but
        the last are as before, and the other is the answer. Both scenes are drawn as often."""
        questions = drawn(seed=3, rows=600)
        others = []
        column, row = questions.column.copy(), questions.row.copy()
        for i, (path, depth) in enumerate(zip(questions.path, questions.depth, strict=True)):
            other = next(n for n in range(OBJECTS) if n not in path[: depth + 1])
            for place in (column[i], row[i]):
                place[[path[depth], other]] = place[[other, path[depth]]]
            others.append(other)
        changed = data.split_of(questions._replace(column=column, row=row)).inputs
        for i, (scene, question) in enumerate(zip(*changed.values(), strict=True)):
            pairs, (name, chain) = read_scene(scene), read_question(question)
            path = [name, *(name := pairs[name, relation] for relation in chain)]
            assert path == [*questions.path[i, : len(chain)], others[i]]

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
        question, word = (np.mean(x.max(axis=1)) for x in data.bayes(questions).values())
        assert question == pytest.approx(1 / (OBJECTS - 1)) and 0.5 < word < 0.8

    def test_rows_follow_from_the_seed_and_splits_share_none(self):
        first, again, other = (data.split_of(drawn(seed, 300)) for seed in (0, 0, 1))
        for name, x in first.inputs.items():
            np.testing.assert_array_equal(x, again.inputs[name])
            assert not np.array_equal(x, other.inputs[name], equal_nan=True)
        dataset = relations.job(relations.Config(train=200, validation=200, test=200)).dataset
        parts = dataset.train, dataset.validation, dataset.test
        scenes = [x.tobytes() for part in parts for x in part.inputs["scene"]]
        assert len(set(scenes)) == len(scenes) == 600
        depths = [np.unique(part.labels[:, 1]).tolist() for part in parts]
        assert depths == [[1, 2, 3], [1, 2, 3], [1, 2, 3, 4, 5, 6]]
        assert dataset.description == "Relations sample (synthetic)"


SMALL = "--train 96 --validation 48 --test 96 --epochs 1 --batch-size 32 --features 8 --hidden 8"


@pytest.fixture
def main(run_command):
    return partial(run_command, relations.main, *SMALL.split())


class TestExperiment:
    @pytest.mark.slow
    def test_scores_and_solves_are_told_by_depth(self, main, tmp_path):
        status, out, _ = main("--run-dir", tmp_path / "run")
        assert status == 0 and "relations: tokens, seed 0, Relations sample (synthetic)" in out
        found = json.loads((tmp_path / "run/results.json").read_text())
        depths = [f"depth {depth}" for depth in range(1, 7)]
        scores, solver = found["test"], found["solver"]
        assert list(scores) == ["accuracy", *depths]
        assert list(found["validation"]) == ["accuracy", *depths[:3]]
        # sixteen rows of each depth, and so the mean over depths is that over rows
        assert np.mean([scores[depth] for depth in depths]) == pytest.approx(scores["accuracy"])
        for what in ("mean_steps", "converged"):
            assert np.mean([solver[f"{what}, {depth}"] for depth in depths]) == pytest.approx(
                solver[what]
            )
        assert list(found["floors"]) == ["the question", "all but the last word"]
        report = (tmp_path / "run/report.md").read_text(encoding="utf-8")
        assert re.search(r"steps on average \(depth 1 [\d.]+, depth 2 ", report)

    @pytest.mark.parametrize(
        "fusion",
        [
            "concat",
            *(
                pytest.param(f, marks=pytest.mark.slow)
                for f in ("tokens_unrolled", "cross_attention", "scene")
            ),
        ],
    )
    def test_other_fusions_train(self, main, tmp_path, fusion):
        options = ("--fusion", fusion, "--jacobian-weight", 0)
        status, _, err = main("--run-dir", tmp_path / "run", *options)
        assert status == 0, err

    def test_it_goes_on_from_the_weights_of_another_run(self, main, tmp_path):
        """Not a step of its own: it scores on its rows what the other one's weights do."""
        options = "--fusion", "concat", "--jacobian-weight", 0
        assert main("--run-dir", tmp_path / "a", "--deepest", 1, *options)[0] == 0
        start = "--start", tmp_path / "a"
        status, _, err = main("--run-dir", tmp_path / "b", *options, *start, "--epochs", 0)
        assert status == 0, err
        scores = [json.loads((tmp_path / run / "results.json").read_text())["test"] for run in "ab"]
        assert scores[0] == scores[1]  # the test rows are the same
        (tmp_path / "a").rename(tmp_path / "gone")  # what was begun with is not needed again
        exported = relations.parse_args(options_of(saved_config(tmp_path / "b")))
        assert relations.job(exported).start is not None
        start = "--start", tmp_path / "gone"
        for wrong in (["--features", 12], ["--fusion", "sum"]):
            status, _, err = main("--run-dir", tmp_path / "c", *options, *start, *wrong)
            assert status == 2 and "its weights, of --fusion concat --features 8" in err
            assert err.count("\n") == 1

    def test_positions_without_a_relation_do_not_count_in_the_mean(self):
        config = relations.Config(fusion="concat", train=8, validation=8, test=8, features=8)
        job = relations.job(config)
        row = {name: x[:1] for name, x in job.dataset.train.inputs.items()}
        there = ~np.isnan(row["question"]).any(axis=-1)
        short = row | {"question": row["question"][there][None]}
        model, run = job.task.model, jax.jit(job.task.model.apply)
        variables = jax.jit(model.init)(jax.random.key(0), row)
        whole, shorter = (run(variables, x).logits for x in (row, short))
        np.testing.assert_allclose(whole, shorter, atol=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--objects", 7], "--objects 7: expected 8 or more"),
            (["--deepest", 7], "--deepest 7: expected 1 to 6"),
            (["--train", 0], "--train 0: expected 1 or more"),
            (["--data-seed", -1], "--data-seed -1: expected 0 or more"),
            (["--fusion", "audio"], "'audio'; choose from "),
            (["--start", "nowhere"], "--start nowhere: expected the directory of a run of this"),
        ],
    )
    def test_bad_options_are_refused_in_a_line(self, refuses, options, message):
        refuses(message, *options)
