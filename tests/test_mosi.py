"""``python -m experiments.mosi`` in both forms, on CMU-MOSI and on made-up files of its form."""

import json
import pickle
import re
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax.baselines import Sum
from experiments import mosi
from experiments.datasets import Split, mosi_aligned
from experiments.datasets import mosi as data
from experiments.models import mosi as mosi_models
from tests.test_datasets_mosi import shared, write_aligned, write_utterances


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("mosi")


@pytest.fixture(scope="module")
def made_up(home):
    return write_utterances(home / "utterances", train=(6,) * 12, test=(5,) * 4)


@pytest.fixture(scope="module")
def aligned(home):
    return write_aligned(home / "aligned", rows={"train": 21, "dev": 7, "test": 14})


@pytest.fixture
def main(run_command, home):
    return partial(run_command, mosi.main, "--features", 16, "--cache-dir", home / "cache")


def results_of(run_dir):
    return json.loads((run_dir / "results.json").read_text())


def floor_of(run_dir, name):
    """The numbers of a row of the tables of scores; a dash, where there is none, is NaN."""
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| {name} +\|(.+)\|$", report, re.MULTILINE)
    return [float(cell.replace("–", "nan")) for row in rows for cell in row.split("|")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["utterances", "aligned"])
def test_positions_are_fused(main, made_up, aligned, tmp_path, form):
    folder, options = made_up, ("--context", 2)
    if form == "aligned":
        folder, options = aligned, ("--form", "aligned")
    status, _, err = main(
        "--data-dir", folder, *options, "--fusion", "tokens", "--epochs", 1, "--run-dir",
        tmp_path / "run",
    )  # fmt: skip
    assert status == 0, err
    results = results_of(tmp_path / "run")
    assert results["fusion"] == "tokens" and results["solver"]["converged"] == 1


class TestUtterances:
    @pytest.mark.slow
    def test_real(self, main, tmp_path):
        run_dir = tmp_path / "run"
        status, out, _ = main(
            "--data-dir", shared("mosi_bclstm"), "--run-dir", run_dir, "--epochs", 1,
            "--context", 2, "--fusion", "sum",
        )  # fmt: skip
        assert status == 0 and "mosi: sum, seed 0, CMU-MOSI" in out
        results = results_of(run_dir)
        assert (results["data"], results["dataset"]) == ("real", "CMU-MOSI")
        assert set(results["test"]) == {"accuracy", "f1", "auc"}
        accuracy, *_ = floor_of(run_dir, "logistic regression")
        assert 0.7 < accuracy < 0.8
        assert floor_of(run_dir, "logistic regression, context")[0] > 0.7

    def test_the_linear_model_reads_what_a_fusion_reads(self):
        """Where the class shows in the utterance before, and there alone."""
        rng = np.random.default_rng(0)

        def recordings(count):
            labels = rng.integers(0, 2, (count, 6))
            shown = np.roll(labels, -1, axis=1).reshape(-1, 1)  # by the one before
            inputs = {
                name: (shown * 2.0 + 0.3 * rng.standard_normal((6 * count, 4))).astype(np.float32)
                for name in data.MODALITIES
            }
            places = np.arange(6 * count)
            rows = Split(inputs, labels.ravel().astype(np.int32))
            return data.Utterances(rows, places // 6, places % 6)

        found = mosi.linear_models(recordings(30), recordings(30), context=1)
        assert found["logistic regression"]["auc"] < 0.7
        assert found["logistic regression, context"]["auc"] > 0.85

    @pytest.mark.slow
    def test_files_of_the_same_form(self, main, made_up, tmp_path):
        """The first features of every modality tell the class: a few epochs learn it."""
        status, _, err = main(
            "--data-dir", made_up, "--epochs", 20, "--context", 1, "--fusion", "concat",
            "--learning-rate", 1e-2, "--run-dir", tmp_path / "run", "--corruption", 0.1, 0.1, 0.1,
        )  # fmt: skip
        assert status == 0 and "Traceback" not in err
        results = results_of(tmp_path / "run")
        assert results["test"]["auc"] > 0.9 and results["solver"] is None

    def test_parts(self, made_up, home):
        train, test = data.load(made_up, home / "cache")
        config = mosi.Config(context=1, validation=0.25, corruption=(0.5, 0.0, 1.0), seed=3)
        dataset = mosi.prepare(train, test, config)
        rest, held = data.hold_out(train, 0.25, 3)
        for part, source in ((dataset.train, rest), (dataset.test, test)):
            own = part.inputs["text"][:, 1]
            x = source.rows.inputs["text"].astype(np.float64)
            mean, deviation = (f(rest.rows.inputs["text"], axis=0) for f in (np.mean, np.std))
            np.testing.assert_allclose(own, (x - mean) / deviation, rtol=1e-3, atol=1e-3)
            np.testing.assert_array_equal(part.labels, source.rows.labels)
        # The validation rows: of other recordings, and mixed with each other as the shares say.
        assert len(dataset.validation.labels) == len(held.positions) == 18
        for name, same in (("text", False), ("audio", True), ("video", False)):
            original, other = held.rows.inputs[name], rest.rows.inputs[name]
            scaled = (original - other.mean(axis=0)) / other.std(axis=0)
            got = dataset.validation.inputs[name][:, 1]
            assert np.allclose(got, scaled, atol=1e-3) == same

    def test_corruption_is_for_training_only(self, made_up, home):
        _, test = data.load(made_up, home / "cache")
        inputs = data.windows(test, 0).inputs
        model = mosi_models.UtterancesModel(Sum(4), (0.5, 0.0, 0.0), 4, 4, 0.0)
        variables = model.init(jax.random.key(0), inputs)
        quiet, again = (model.apply(variables, inputs).logits for _ in range(2))
        np.testing.assert_array_equal(quiet, again)
        rngs = {"dropout": jax.random.key(1)}
        trained = model.apply(variables, inputs, train=True, rngs=rngs).logits
        assert not np.allclose(quiet, trained)


class TestAligned:
    def test_text_alone_on_the_real_rows(self, main, tmp_path):
        run_dir, folder = tmp_path / "run", shared("mosi_cmbert_text")
        status, out, _ = main(
            "--form", "aligned", "--data-dir", folder, "--fusion", "text", "--epochs", 1,
            "--batch-size", 256, "--run-dir", run_dir,
        )  # fmt: skip
        assert status == 0 and "mosi: text, seed 0, CMU-MOSI aligned" in out
        results = results_of(run_dir)
        names = ["acc7", "acc2", "f1", "acc2_nonzero", "f1_nonzero", "mae", "pearson"]
        assert list(results["test"]) == names and results["solver"] is None
        rows = mosi_aligned.load(folder)
        mean, labels = rows.train.labels.mean(), rows.test.labels
        floor = floor_of(run_dir, "mean of the training labels")
        assert floor[5] == pytest.approx(np.abs(labels - mean).mean(), abs=5.1e-4)
        assert floor[0] == pytest.approx(np.mean(np.round(labels) == np.round(mean)), abs=5.1e-4)

    @pytest.mark.slow
    def test_states_and_audio(self, main, aligned, tmp_path):
        rng = np.random.default_rng(0)
        sizes = {"train": 21, "validation": 7, "test": 14}
        states = {name: rng.standard_normal((n, 50, 6)) for name, n in sizes.items()}
        np.savez(tmp_path / "states.npz", **states)
        status, _, _ = main(
            "--form", "aligned", "--data-dir", aligned, "--epochs", 1, "--run-dir", tmp_path / "r",
            "--features", 8, "--text-npz", tmp_path / "states.npz",
        )  # fmt: skip
        results = results_of(tmp_path / "r")
        assert status == 0 and results["solver"]["converged"] == 1
        assert results["parameters"] < 2000, "no word embeddings"
        settings = json.loads((tmp_path / "r" / "config.json").read_text())["config"]
        assert settings["jacobian_weight"] == 0.01

    @pytest.mark.parametrize("form", ["tokens", "states"])
    def test_model_is_a_mean_over_tokens(self, form):
        """What stands at positions without a token changes nothing; written out in NumPy."""
        rng = np.random.default_rng(0)
        there = np.arange(6) < np.array([[3], [6], [1]])
        text = np.where(there, rng.integers(1, 9, (3, 6)), 0).astype(np.int32)
        if form == "states":
            text = np.where(there[..., None], rng.standard_normal((3, 6, 4)), 0).astype(np.float32)
        audio = rng.standard_normal((3, 6, 5)).astype(np.float32)
        model = mosi_models.AlignedModel(Sum(8), 9, 8, 0.0)
        variables = model.init(jax.random.key(0), {"text": text, "audio": audio})
        apply = partial(model.apply, variables)
        prediction = apply({"text": text, "audio": audio})
        other = np.where(there[..., None], audio, 100)
        np.testing.assert_allclose(apply({"text": text, "audio": other}).logits, prediction.logits)
        fused = np.asarray(prediction.fusion.fused)
        mean = np.stack([row[own].mean(axis=0) for row, own in zip(fused, there, strict=True)])
        head = variables["params"]["head"]
        np.testing.assert_allclose(
            prediction.logits, mean @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-6
        )
        labels = jnp.array([1.0, -2.0, 3.0])
        expected = 0.5 * np.mean((np.asarray(prediction.logits)[:, 0] - labels) ** 2)
        assert float(mosi_models.half_squared_error(prediction, labels)) == pytest.approx(expected)

    def test_tokens_start_where_bert_s_do(self, aligned):
        dataset, vocabulary = mosi.aligned_data(
            mosi.Config(form="aligned", data_dir=aligned, vocabulary=6)
        )
        assert vocabulary == 6
        for part in (dataset.train, dataset.validation, dataset.test):
            tokens = part.inputs["text"]
            assert tokens.shape == (len(part.labels), 50) and (tokens[:, 0] == 1).all()
            assert (tokens[:, 1:5] > 0).all() and (tokens[:, 7:] == 0).all()
        audio = dataset.train.inputs["audio"]
        np.testing.assert_allclose(audio.mean(axis=(0, 1)), 0, atol=1e-5)
        np.testing.assert_allclose(audio.std(axis=(0, 1)), 1, atol=1e-5)


class TestBadInput:
    @pytest.mark.slow
    def test_without_data_says_how_to_get_it_on_one_line(self, refused_alone, tmp_path):
        line = refused_alone("experiments.mosi", "--cache-dir", tmp_path)
        assert "transcripts.csv of CMU-MOSI; ask for the download" in line

    def test_aligned_without_data(self, refuses, tmp_path):
        refuses("train.tsv is not there; ask for the download", "--form", "aligned")
        refuses("is not there", "--form", "aligned", "--data-dir", tmp_path / "nowhere")

    @pytest.mark.parametrize("fusion", ["deq", "concat", "audio"])
    def test_without_audio_only_text_can_be_used(self, refuses, aligned, tmp_path, fusion):
        folder = shutil.copytree(aligned, tmp_path / "data")
        (folder / mosi_aligned.AUDIO).unlink()
        args = ("--form", "aligned", "--data-dir", folder, "--fusion", fusion)
        refuses(f"--fusion {fusion} needs MOSI_cmu_audio_CLS.pickle, which is not there", *args)
        refuses("github.com/thuiar/Cross-Modal-BERT", *args)

    def test_a_pickle_that_calls_is_refused(self, refuses, aligned, tmp_path):
        folder = shutil.copytree(aligned, tmp_path / "data")
        (folder / mosi_aligned.AUDIO).write_bytes(pickle.dumps([print, print, print]))
        refuses("asks for", "--form", "aligned", "--data-dir", folder)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--form", "video"], "video"),
            (["--nope"], "--nope"),
            (["--fusion", "nonsense"], "'audio'"),
            (["--form", "aligned", "--fusion", "video"], "'audio'"),
            (["--features", 18, "--fusion", "deq"], "multiple of 4"),
            (["--context", -1], "--context -1: expected 0 or more"),
            (["--form", "aligned", "--context", 2], "--context 2: expected 0 with --form aligned"),
            (["--text-npz", "x.npz"], "--text-npz x.npz: expected --form aligned"),
            (["--form", "aligned", "--text-npz", "x.npz"], "x.npz cannot be read"),
            (["--corruption", 0.5, 1.5, 0], "--corruption 0.5 1.5 0.0: expected three shares"),
            (["--corruption", "nan", 0, 0], "--corruption nan 0.0 0.0: expected three shares"),
            (["--corruption", 0.5], "corruption"),
            (["--validation", 1.0], "--validation 1.0: expected a share"),
            (["--hidden", 0], "--hidden 0: expected 1 or more"),
            (["--batch-size", 0], "--batch-size 0: expected 1 or more"),
            (["--vocabulary", 2], "--vocabulary 2: expected 3 or more"),
            (["--resume"], "--resume needs --run-dir"),
        ],
    )
    def test_bad_options(self, refuses, made_up, aligned, args, message):
        folder = aligned if "aligned" in args else made_up
        fusion = [] if "--fusion" in args else ["--fusion", "sum"]
        refuses(message, "--data-dir", folder, "--epochs", 1, *fusion, *args)
