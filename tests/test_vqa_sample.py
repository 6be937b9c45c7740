"""The sample of `experiments.vqa`, and its reader, `experiments.datasets.vqa`."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import FusionOutput
from experiments.common.errors import InputError
from experiments.datasets import vqa as data
from experiments.datasets.vqa_answers import PEOPLE, vqa_accuracy
from experiments.datasets.vqa_json import read_questions
from experiments.datasets.vqa_sample import ask, draw_scenes, sample
from experiments.training.task import Prediction
from experiments.vqa import bce_of_accuracies, official_accuracy


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache):
    return data.load_sample(seed=0, cache_dir=cache)


def test_questions_are_answered_from_the_scene():
    scenes = draw_scenes(np.random.default_rng(0), 50)
    questions = {question.text: question for question in ask(scenes)}
    shapes, colours = ("ball", "cone", "cube", "ring"), ("blue", "green", "purple", "red")
    for picture in range(50):
        things = [
            (shapes[shape], colours[colour] if colour < 4 else "?")
            for shape, colour in zip(scenes.shape[picture], scenes.colour[picture], strict=True)
            if shape >= 0
        ]
        assert 3 <= len(things) <= 8

        def answer(text, picture=picture):
            question = questions[text]
            right = question.right[picture]
            return None if right < 0 else question.answers[right]

        is_there = ("cube", "red") in things
        assert answer("Is there a red cube?") == ("yes" if is_there else "no")
        cubes = [colour for shape, colour in things if shape == "cube"]
        only = cubes[0] if len(cubes) == 1 else None
        assert answer("How many cubes are there?") == (str(len(cubes)) if len(cubes) <= 3 else None)
        assert only in (None, "?") or answer("What color is the cube?") == only
        assert (answer("Is the cube red?") is None) == (len(cubes) != 1)


def test_a_question_alone_tells_nothing(found, cache):
    folder = sample(cache)
    for split in ("train2014", "val2014"):
        rows = read_questions(
            folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
            folder / f"v2_mscoco_{split}_annotations.json",
        )
        counts = Counter(zip(rows.texts, rows.answers.most, strict=True))
        for text in set(rows.texts):
            of_text = [count for (asked, _), count in counts.items() if asked == text]
            assert max(of_text) - min(of_text) <= 2  # most of ten people can be wrong, rarely


def test_pictures_of_the_three_parts_are_different(found):
    train, validation, test = found.dataset.train, found.dataset.validation, found.dataset.test
    pictures = [
        {np.nan_to_num(image).tobytes() for image in part.inputs["image"]}
        for part in (train, validation, test)
    ]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2]
    assert 0.08 < len(validation.labels) / (len(train.labels) + len(validation.labels)) < 0.12


def test_labels_are_worth_the_official_accuracy(found):
    labels = found.dataset.test.labels
    ten = found.questions.answers.ten
    for number, answer in enumerate(found.answers):
        expected = [vqa_accuracy(answer, answers) for answers in ten]
        np.testing.assert_array_equal(data.worth(labels, np.full(len(labels), number)), expected)


def test_floors_and_ceiling(found):
    floors, labels = data.floors(found), found.dataset.test.labels
    best = data.ceiling(found)
    texts = np.array(found.questions.texts)
    for text in np.unique(texts)[:5]:
        rows = texts == text
        each = [
            data.worth(labels[rows], np.full(rows.sum(), number)).mean()
            for number in range(len(found.answers))
        ]
        assert floors["at most, from the question alone"][rows].mean() == pytest.approx(max(each))
    assert all((worth <= best).all() for worth in floors.values())
    kinds = data.by_kind(labels)
    assert floors["the most frequent answer"][kinds["other"]].max() == 0


def test_the_loss_is_the_cross_entropy_of_every_answer(found):
    labels = found.dataset.test.labels[:6]
    logits = np.random.default_rng(0).standard_normal((6, len(found.answers)))
    p = 1 / (1 + np.exp(-logits))
    worth = [
        [data.worth(labels, np.full(6, c))[row] for c in range(p.shape[1])] for row in range(6)
    ]
    expected = -(worth * np.log(p) + (1 - np.array(worth)) * np.log(1 - p)).sum(1).mean()
    prediction = Prediction(jnp.asarray(logits), FusionOutput(jnp.zeros(6)))
    assert float(bce_of_accuracies(prediction, jnp.asarray(labels))) == pytest.approx(
        expected, 1e-5
    )
    one_by_one = jax.vmap(bce_of_accuracies)(
        Prediction(jnp.asarray(logits)[:, None], FusionOutput(jnp.zeros((6, 1)))),
        jnp.asarray(labels)[:, None],
    )
    assert float(one_by_one.mean()) == pytest.approx(expected, 1e-5)


def test_scores_are_of_the_likeliest_answers(found):
    labels = found.dataset.test.labels
    best = np.eye(len(found.answers))[
        labels[np.arange(len(labels)), labels[:, PEOPLE:-1].argmax(1)]
    ]
    assert official_accuracy(labels, best)["accuracy"] == pytest.approx(data.ceiling(found).mean())


def test_files_that_do_not_fit_together(found, cache, tmp_path):
    folder = sample(cache)
    for path in folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    regions = [folder / "train2014.tsv"], [folder / "val2014.tsv"]
    with pytest.raises(InputError, match=r"no features of .* pictures, .* first"):
        data.load(tmp_path, regions[1], regions[1], 0, cache)
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    rows = json.loads((tmp_path / name).read_text())
    rows["questions"][0]["image_id"] = 1
    (tmp_path / name).write_text(json.dumps(rows))
    with pytest.raises(InputError, match="picture 1 is in train2014 and in val2014"):
        data.load(tmp_path, *regions, 0, cache)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(InputError, match=r"cannot read .*val2014_annotations.json"):
        data.load(tmp_path, *regions, 0, cache)
