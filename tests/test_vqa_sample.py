"""The sample of `experiments.vqa`, and its reader, `experiments.datasets.vqa`."""

import http.server
import json
import threading
import zipfile
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import FusionOutput
from experiments.common.errors import InputError
from experiments.datasets import vqa as data
from experiments.datasets.download import sha256
from experiments.datasets.preprocess import take
from experiments.datasets.vqa_answers import PEOPLE, vqa_accuracy
from experiments.datasets.vqa_json import read_questions
from experiments.datasets.vqa_sample import ask, draw_scenes, sample
from experiments.training.task import Prediction
from experiments.vqa import bce_of_accuracies, likeliest, official_accuracy, parse_args, run


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def found(cache):
    return data.load(None, seed=0, cache_dir=cache)


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
    ten = found.tested.answers.ten
    for number, answer in enumerate(found.answers):
        expected = [vqa_accuracy(answer, answers) for answers in ten]
        np.testing.assert_array_equal(data.worth(labels, np.full(len(labels), number)), expected)


def test_floors_and_ceiling(found):
    floors, labels = data.floors(found), found.dataset.test.labels
    best = data.ceiling(found)
    texts = np.array(found.tested.texts)
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
    best = labels[np.arange(len(labels)), labels[:, PEOPLE:-1].argmax(axis=1)]
    logits = np.full((len(labels), len(found.answers)), -1.0)
    logits[np.arange(len(labels)), best] = 2.0
    predicted = np.asarray(likeliest(jnp.asarray(logits)))
    assert (predicted[:, 0] == best).all()
    np.testing.assert_allclose(predicted[:, 1], 1 / (1 + np.exp(-2)), rtol=1e-6)
    scores = official_accuracy(labels, predicted)
    assert scores["accuracy"] == pytest.approx(data.ceiling(found).mean())


@pytest.fixture
def folder(cache, tmp_path):
    """A copy of the sample, as a user's own."""
    for path in sample(cache).glob("v2_*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in sample(cache).glob("*.tsv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_rows_on_disk_are_those_in_memory(found, folder, cache, monkeypatch):
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    streamed = data.load(folder, seed=0, cache_dir=cache)
    one, other = found.dataset, streamed.dataset
    assert (one.data, other.data) == ("sample", "real")
    assert "stay on disk" in streamed.notes[-1]
    rows = np.random.default_rng(0).permutation(len(one.train.labels))[:50]
    pairs = [
        (take(one.train, rows), other.stream.read(rows)),
        (take(one.validation, rows[:9] % 900), take(other.validation, rows[:9] % 900)),
        (take(one.test, rows % 2000), take(other.test, rows % 2000)),
    ]
    for in_memory, on_disk in pairs:
        jax.tree.map(np.testing.assert_array_equal, in_memory, on_disk)
    assert len(other.stream) == len(one.train.labels) and len(other.train.labels) == 2


@pytest.mark.slow
def test_a_run_from_disk_is_the_run_in_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DEQ_FUSION_CACHE", str(tmp_path / "cache"))
    words = "--data-dir", str(folder), "--epochs", "1", "--features", "8", "--layers", "1"
    words += "--fusion", "sum", "--heads", "2", "--batch-size", "512"
    results = []
    for name, limit in (("memory", 10**9), ("disk", 0)):
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        results.append(run(parse_args([*words, "--run-dir", str(tmp_path / name)])))
    memory, disk = results
    assert memory["dataset"] == disk["dataset"] == "VQA v2" and disk["data"] == "real"
    for part in ("test", "validation"):
        assert memory[part] == pytest.approx(disk[part], abs=2e-3)


def changed(folder, name, change):
    path = folder / name
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def in_both(folder):
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    changed(folder, name, lambda rows: rows["questions"][0].update(image_id=1))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (in_both, "picture 1 is in train2014 and in val2014"),
        (lambda folder: (folder / "val2014.tsv").unlink(), r"no features of \d+ of \d+ pictures"),
        (lambda folder: [x.unlink() for x in folder.glob("*.tsv")], "has no features of regions"),
        (
            lambda folder: (folder / "v2_mscoco_val2014_annotations.json").unlink(),
            "cannot read .*val2014_annotations.json",
        ),
    ],
)
def test_files_that_do_not_fit_together(folder, cache, spoil, complaint):
    spoil(folder)
    with pytest.raises(InputError, match=complaint):
        data.load(folder, 0, cache)


def test_other_answers_are_other_data(folder):
    before = data.checksum(folder)
    assert data.checksum(folder) == before
    changed(folder, "v2_mscoco_val2014_annotations.json", lambda rows: rows.update(info={}))
    assert data.checksum(folder) != before


@pytest.fixture
def server(tmp_path):
    """Serves a folder with one archive of a questions file: (address, SHA-256)."""
    home = tmp_path / "served"
    home.mkdir()
    with zipfile.ZipFile(home / "questions.zip", "w") as file:
        file.writestr("v2_OpenEnded_mscoco_train2014_questions.json", "{}")
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=home)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", sha256(home / "questions.zip")
        serving.shutdown()


def test_download(server, tmp_path, monkeypatch):
    address, checksum = server
    monkeypatch.setattr(data, "_URL", address)
    monkeypatch.setattr(data, "FILES", {"questions.zip": checksum})
    data.download(tmp_path / "data")
    path = tmp_path / "data" / "v2_OpenEnded_mscoco_train2014_questions.json"
    assert path.read_text() == "{}"
    monkeypatch.setattr(data, "FILES", {"questions.zip": "0" * 64})
    with pytest.raises(InputError, match="what arrived is not the published file"):
        data.download(tmp_path / "other")
