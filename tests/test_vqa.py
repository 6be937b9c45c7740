"""experiments.vqa: the package's questions are read as they are, and every fusion has its place."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, FusionOutput, SolveStats, TokenFusion
from deq_fusion_jax.baselines import WeightTied
from experiments import export, vqa
from experiments.datasets import Split, easy_vqa
from experiments.datasets.easy_vqa import CLASSES
from experiments.models.vqa import VQAModel, of_pictures
from experiments.training.warm import cold_start

SMALL = "--easy-vqa", "--images", 8, "--epochs", 1, "--features", 8


@pytest.fixture
def main(run_command):
    return lambda *args: run_command(vqa.main, *args)


@pytest.fixture(scope="module")
def data():
    return easy_vqa.load(images=30, seed=0)


class TestData:
    def test_sizes_are_the_package_s(self, data):
        dataset, vocabulary = data
        assert len(dataset.test.labels) == 9673 and vocabulary == 26 + 2
        assert dataset.train.inputs["image"].shape[1:] == (32, 32, 3)
        assert set(np.unique(dataset.test.labels)) == set(range(len(CLASSES)))
        every, _ = easy_vqa.load(easy_vqa.MOST, seed=1)
        assert len(every.train.labels) + len(every.validation.labels) == 38575

    def test_a_row_is_a_question_of_the_package(self, data):
        import easy_vqa as package
        from PIL import Image

        test, number = data[0].test, 4321
        texts, answers, about = package.get_test_questions()
        assert CLASSES[test.labels[number]] == answers[number]
        alike = [i for i, text in enumerate(texts) if text == texts[number]]
        rows = test.inputs["question"]
        assert np.flatnonzero((rows == rows[number]).all(1)).tolist() == alike
        with Image.open(package.get_test_image_paths()[about[number]]) as image:
            pixels = np.asarray(image.convert("RGB"), float)
        means = pixels.reshape(32, 2, 32, 2, 3).mean((1, 3))
        np.testing.assert_allclose(test.inputs["image"][number], means, atol=0.51)

    def test_no_picture_is_in_two_parts(self, data):
        parts = [
            {image.tobytes() for image in part.inputs["image"]}
            for part in (data[0].train, data[0].validation)
        ]
        assert len(parts[0]) == 30 and not parts[0] & parts[1]

    def test_another_seed_draws_other_pictures(self, data):
        other = easy_vqa.load(30, seed=1)[0].train
        assert other.inputs["image"].tobytes() != data[0].train.inputs["image"].tobytes()

    def test_the_question_alone(self):
        questions, labels = np.array([[1], [1], [1], [2], [2]]), np.array([0, 3, 3, 1, 1])
        train = Split({"question": questions}, labels)
        test = Split({"question": np.array([[1], [2], [9]])}, np.zeros(3, int))
        assert easy_vqa.question_alone(train, test).argmax(1).tolist()[:2] == [3, 1]

    def test_the_package_is_asked_for(self, main, monkeypatch):
        monkeypatch.setitem(sys.modules, "easy_vqa", None)
        status, _, err = main(*SMALL)
        assert status == 2 and err == "error: easy-VQA needs pip install -e '.[vqa]'\n"


def test_accuracies_by_kind():
    labels = np.array([CLASSES.index(answer) for answer in ("yes", "no", "circle", "red", "red")])
    guess = np.eye(len(CLASSES))[
        [CLASSES.index(a) for a in ("yes", "yes", "circle", "red", "teal")]
    ]
    expected = {"accuracy": 0.6, "yes/no": 0.5, "shape": 1.0, "colour": 0.5}
    assert vqa.scores(labels, guess) == expected


class TestModel:
    def inputs(self, rows=3):
        rng = np.random.default_rng(0)
        question = np.array([[3, 4, 5, 0], [6, 0, 0, 0], [2, 9, 9, 3]], np.int32)[:rows]
        return {
            "image": rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8),
            "question": question,
        }

    def model(self, *args, fusion=None):
        fusion = fusion or DEQFusion(16, solver=Anderson(tol=1e-3, max_steps=100))
        return VQAModel(fusion, 13, 10, 16, 0.0, *args)

    @pytest.mark.parametrize(
        ("place", "cells"), [(("late",), ()), (("middle",), (4, 4)), (("early",), (8, 8))]
    )
    def test_where_they_meet(self, place, cells):
        model, inputs = self.model(*place), self.inputs()
        out = model.apply(model.init(jax.random.key(0), inputs), inputs)
        assert out.logits.shape == (3, 13) and out.fusion.fused.shape == (3, *cells, 16)
        assert out.fusion.stats.converged.all()

    @pytest.mark.slow
    @pytest.mark.parametrize("place", ["middle", "early"])
    def test_cells_alone_stay_with_their_picture(self, place):
        inputs, model = self.inputs(), self.model(place, True, fusion=WeightTied(16, steps=3))
        variables = model.init(jax.random.key(0), inputs)
        out = model.apply(variables, inputs)
        for row in range(3):
            one = model.apply(variables, {name: x[row : row + 1] for name, x in inputs.items()})
            np.testing.assert_allclose(out.logits[row], one.logits[0], rtol=1e-4, atol=1e-5)
            gates = (x.fusion.gates["image"] for x in (out, one))
            np.testing.assert_allclose(next(gates)[row], next(gates)[0], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("place", ["middle", "early"])
    def test_solves_of_cells_are_told_by_picture(self, place):
        inputs, model = self.inputs(), self.model(place, True)
        variables = model.init(jax.random.key(0), inputs)
        out = model.apply(variables, inputs).fusion
        assert out.stats.steps.shape == out.stats.converged.shape == (3,)
        assert (out.stats.converged == (out.stats.residual <= 1e-3)).all()
        start = cold_start(model, variables, inputs)  # by cell, as the backward solve is
        assert len(start.adjoint0.steps) == len(start.z0.fused) == len(out.fused)

    def test_the_worst_cell_speaks_for_its_picture(self):
        steps, residual = jnp.array([3, 9, 4, 5]), jnp.array([0.1, 0.2, 0.7, 0.3])
        trace = jnp.array([[0.9, 0.8, 0.7, 0.3], [jnp.nan, 0.2, 0.7, jnp.nan], [jnp.nan] * 4])
        stats = SolveStats(steps, residual, residual < 0.5, trace, steps % 3)
        out = FusionOutput(jnp.zeros((4, 1)), stats=stats, spectral_radius=residual)
        found = of_pictures(out, 2)
        stats, radius = found.stats, found.spectral_radius
        np.testing.assert_allclose(stats.trace, [[0.9, 0.7], [0.2, 0.7], [np.nan] * 2])
        np.testing.assert_allclose(radius, [0.2, 0.7])
        assert stats.steps.tolist() == [9, 5] and stats.converged.tolist() == [True, False]
        np.testing.assert_allclose(stats.residual, [0.2, 0.7])
        assert stats.status.tolist() == [0, 2]

    @pytest.mark.slow
    def test_padding_and_batch_mates_change_nothing(self):
        model, inputs = self.model(fusion=TokenFusion(16, solver=Anderson(tol=1e-5))), self.inputs()
        variables = model.init(jax.random.key(0), inputs)
        logits = model.apply(variables, inputs).logits
        longer = inputs | {"question": np.pad(inputs["question"], ((0, 0), (0, 3)))}
        np.testing.assert_allclose(model.apply(variables, longer).logits, logits, atol=1e-5)
        one = {name: x[1:2] for name, x in inputs.items()}
        np.testing.assert_allclose(model.apply(variables, one).logits, logits[1:2], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--fusion", "deq", "--place", "middle"),
        ("--fusion", "deq", "--place", "early", "--alone", "--max-steps", 5),
        ("--fusion", "gmu", "--place", "middle"),
        ("--fusion", "weight_tied", "--place", "middle", "--alone"),
        ("--fusion", "question"),
        ("--fusion", "tokens"),
        ("--fusion", "cross_attention"),
    ],
)
def test_every_place_trains(main, tmp_path, options):
    status, _, err = main(*SMALL, *options, "--run-dir", tmp_path / "run")
    assert status == 0, err
    assert 0 <= json.loads((tmp_path / "run" / "results.json").read_text())["test"]["accuracy"] <= 1


def test_easy_vqa(main, tmp_path):
    status, out, err = main(*SMALL, "--fusion", "concat", "--run-dir", tmp_path / "run")
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"] == "easy-VQA" and results["data"] == "real"
    assert set(results["test"]) == {"accuracy", "yes/no", "shape", "colour"}
    assert results["solver"] is None
    assert results["floors"]["the question alone"]["colour"] < 0.2
    assert "the question alone" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--fusion", "deq", "--layers", 1),
        ("--fusion", "sum", "--place", "middle", "--layers", 1),
        ("--fusion", "tokens"),
    ],
)
def test_the_sample(main, run_command, tmp_path, options):
    small = "--epochs", 1, "--features", 16, "--run-dir", tmp_path / "run"
    status, out, err = main(*options, *small)
    assert status == 0, err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"] == "VQA v2 sample (synthetic)" and results["data"] == "sample"
    assert set(results["test"]) == {"accuracy", "yes/no", "number", "other"}
    floors = results["floors"]
    assert floors["the most frequent answer"]["accuracy"] < 0.3
    assert floors["at most, from the question alone"]["accuracy"] < 0.5
    assert "have an accuracy of 1.000 on test" in out
    table = (tmp_path / "run" / "report.md").read_text().split("## Examples")[1]
    assert table.split("##")[0].count("?") == 10  # questions
    status, _, err = run_command(export.main, tmp_path / "run")
    assert status == 2 and "a run of vqa cannot be exported" in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--easy-vqa", "--images", 0], "--images 0: expected 1 to 3800"),
        (["--easy-vqa", "--images", 4000], "--images 4000: expected 1 to 3800"),
        (["--images", 400], "--images is for easy-VQA; add --easy-vqa"),
        (["--place", "middle", "--alone"], "--alone is for easy-VQA; add --easy-vqa"),
        (["--easy-vqa", "--layers", 2], "--layers is of the model for the sample"),
        (["--easy-vqa", "--alone"], "--alone with --place late: expected --place middle or early"),
        (["--fusion", "tokens", "--place", "early"], "--place early: expected none with --fusion"),
        (["--fusion", "tokens", "--layers", 2], "--layers 2: expected none with --fusion tokens"),
        (["--easy-vqa", "--cache-dir", "x"], "--cache-dir is for VQA v2; leave out --easy-vqa"),
        (["--place", "middle", "--warm-start"], "--warm-start keeps one solve a row"),
        (["--heads", 3], "--features 64: expected a multiple of --heads 3"),
        (["--batch-size", 0], "--batch-size 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_used_is_refused(refuses, options, complaint):
    refuses(complaint, *options)
