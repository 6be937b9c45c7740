"""The options of a run, the directory that it leaves behind, and going on with it."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import features, mmimdb, mosi, multiomics
from experiments.common.cli import parse
from experiments.common.errors import InputError
from experiments.common.lock import folder_alone
from experiments.datasets import Dataset, Split
from experiments.run import Job, execute
from experiments.training.config import CommonConfig, PublishedConfig, build_fusion
from experiments.training.folds import select
from experiments.training.metrics import multiclass_metrics
from experiments.training.results import Results
from experiments.training.run_directory import begin_run, command_line, opened_run
from experiments.training.schedule import Schedule
from experiments.training.task import Prediction, Task, evaluate, softmax
from experiments.training.train import fit, refit

ROOT = Path(__file__).resolve().parents[1]


class Model(nn.Module):
    fusion: nn.Module

    @nn.compact
    def __call__(self, inputs, train=False, **start):
        encoded = {name: nn.Dense(8)(x) for name, x in inputs.items()}
        out = self.fusion(encoded, train=train, **start)
        return Prediction(nn.Dense(3)(out.fused), out)


def loss(prediction, labels):
    return optax.softmax_cross_entropy_with_integer_labels(prediction.logits, labels).mean()


@pytest.fixture(scope="module", autouse=True)
def a_save_after_every_epoch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.training.recording.SAVE_SECONDS", 0)
        yield


def rows(n, seed):
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3).astype(np.int32)
    inputs = {name: rng.standard_normal((n, 4)).astype(np.float32) for name in ("a", "b")}
    inputs["a"][:, 0] += labels
    return Split(inputs, labels)


DATASET = Dataset("Toy", "real", ("x", "y", "z"), rows(24, 0), rows(12, 1), rows(12, 2))
FLOORS = {"the floor": {"accuracy": 0.123, "weighted_f1": 0.234, "macro_f1": 0.345}}


class Run:
    """A small job and its run directory; the job is one object, so it compiles once."""

    def __init__(self, run_dir, fusion):
        self.run_dir = run_dir
        self.config = PublishedConfig(
            fusion=fusion, features=8, epochs=2, seed=5, run_dir=run_dir, max_steps=30
        )
        model = Model(build_fusion(self.config, ("a", "b")))
        task = Task(model, loss, multiclass_metrics, softmax, monitor="macro_f1")
        self.job = Job("toy", DATASET, task, optax.adam(1e-2), Schedule(2, 12))
        self.job = self.job._replace(floors=lambda seconds: (FLOORS, ()))

    def execute(self, **changes):
        config = dataclasses.replace(self.config, **changes)
        schedule = self.job.schedule._replace(epochs=config.epochs)
        return execute("toy", lambda _: self.job._replace(schedule=schedule), config)

    def json(self, name):
        return json.loads((self.run_dir / name).read_text(encoding="utf-8"))

    def history(self):
        text = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def report(self):
        return (self.run_dir / "report.md").read_text(encoding="utf-8")


def finished_run(folder, fusion):
    run = Run(folder / "run", fusion)
    run.results = run.execute()
    run.untouched = folder / "untouched"  # as the first run left it
    shutil.copytree(run.run_dir, run.untouched)
    return run


@pytest.fixture(scope="module")
def deq(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("deq"), "deq")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("sum"), "sum")


@pytest.fixture
def run(plain):
    """The finished run of `sum`, as it was; only its directory is new."""
    shutil.rmtree(plain.run_dir)
    shutil.copytree(plain.untouched, plain.run_dir)
    return plain


def test_a_refit_is_tested_and_the_first_training_reported(plain, tmp_path):
    """As long as the first, on the validation rows too: what `refit` returns, and said so."""
    run_dir = tmp_path / "run"
    results = plain.execute(run_dir=run_dir, refit=True)
    assert results["selection"] == "refit" and results["validation"] == plain.results["validation"]
    what = plain.job.task, plain.job.optimiser
    chosen = fit(*what, DATASET.train, DATASET.validation, plain.job.schedule, 5)
    again = refit(chosen, *what, DATASET, plain.job.schedule, 5)
    expected = [evaluate(plain.job.task, v, DATASET.test) for v in (again.best, chosen.best)]
    assert results["test"] == expected[0].metrics
    assert np.abs(expected[0].probabilities - expected[1].probabilities).max() > 1e-3
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "trained on those rows too" in report and "second training" in report
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    again = plain.execute(run_dir=run_dir, refit=True, resume=True)
    assert {**again, "seconds": 0} == {**results, "seconds": 0}


class TestDirectory:
    def test_config(self, deq):
        saved = deq.json("config.json")
        assert set(saved) == {"experiment", "command", "config", "schedule", "versions"}
        assert saved["experiment"] == "toy"
        assert saved["schedule"]["epochs"] == saved["config"]["epochs"]
        assert saved["config"] == {
            **dataclasses.asdict(deq.config),
            "run_dir": str(deq.run_dir),
        }
        assert saved["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))

    def test_metrics(self, deq):
        history = deq.history()
        assert [row["epoch"] for row in history] == [0, 1, 2]
        assert history[0]["loss"] is None and all(row["loss"] > 0 for row in history[1:])
        for row in history:
            assert set(row["validation"]) == {"accuracy", "weighted_f1", "macro_f1"}
            assert 0 <= row["solver"]["converged"] <= 1

    def test_results(self, deq):
        results = deq.json("results.json")
        assert results == deq.results
        assert set(results) == set(Results.__annotations__) == {
            "experiment", "dataset", "data", "fusion", "seed", "selection", "test", "validation",
            "last_epoch", "best_on_test", "classes", "floors", "solver", "parameters", "seconds",
        }  # fmt: skip
        about = {key: results[key] for key in ("experiment", "dataset", "data", "fusion", "seed")}
        assert about == {
            "experiment": "toy", "dataset": "Toy", "data": "real", "fusion": "deq", "seed": 5,
        }  # fmt: skip
        assert results["selection"] == "validation"
        assert set(results["solver"]) == {"converged", "mean_steps", "residual"}
        best = max(deq.history(), key=lambda row: row["validation"]["macro_f1"])
        assert results["validation"].items() <= best["validation"].items()
        # d = 8: two encoders, in the cell two ModalityBlocks and the FusionBlock, w_i and b, head.
        dense, norm = 8 * 8 + 8, 2 * 8
        cell = 2 * (2 * dense + 3 * norm) + 2 * dense + norm
        assert results["parameters"] == 2 * (4 * 8 + 8) + cell + 3 + (8 * 3 + 3)

    def test_results_without_a_solver(self, plain):
        results = json.loads((plain.untouched / "results.json").read_text(encoding="utf-8"))
        assert results["solver"] is None
        assert all(row["solver"] is None for row in plain.history())
        figures = {path.name for path in (plain.untouched / "figures").iterdir()}
        assert figures == {"learning_curve.png", "confusion.png"}

    def test_figures_open_and_the_report_shows_each(self, deq):
        names = {path.name for path in (deq.run_dir / "figures").iterdir()}
        assert names == {
            "learning_curve.png", "confusion.png", "solver_health.png", "residuals.png",
            "spectral_radius.png", "gates.png",
        }  # fmt: skip
        for name in names:
            with Image.open(deq.run_dir / "figures" / name) as image:
                image.load()
                assert image.format == "PNG" and min(image.size) > 200
                assert len(image.convert("RGB").getcolors(1 << 20)) > 10  # something is drawn
        shown = re.findall(r"!\[.+\]\((.+)\)", deq.report())
        assert sorted(shown) == sorted(f"figures/{name}" for name in names)

    def test_report(self, deq):
        report = deq.report()
        assert report.startswith("# toy: deq, seed 5, Toy data\n")
        for name, scores in (("test", deq.results["test"]), ("the floor", FLOORS["the floor"])):
            cells = rf"\| {name} +" + "".join(rf"\| +{value:.3f} " for value in scores.values())
            assert re.search(cells, report), name
        assert "| max_steps " in report and "macro_f1 is" in report

    def test_nothing_went_wrong_is_said_of_a_run_without_trouble(self, deq):
        assert all(np.isfinite(row["loss"]) for row in deq.history()[1:])
        assert "not finite" not in deq.report()

    def test_two_newest_checkpoints(self, deq):
        steps = {p.name for p in (deq.run_dir / "checkpoints").iterdir() if p.is_dir()}
        assert steps == {"2", "4"}  # two batches an epoch


class TestResume:
    def test_goes_on_to_more_epochs(self, run, tmp_path):
        before = run.history()
        results = run.execute(epochs=4, resume=True)
        assert [row["epoch"] for row in run.history()] == [0, 1, 2, 3, 4]
        assert run.history()[:3] == before
        assert run.json("results.json") == results
        assert run.json("config.json")["config"]["epochs"] == 4
        at_once = dataclasses.replace(run.config, run_dir=tmp_path / "at-once", epochs=4)
        schedule = run.job.schedule._replace(epochs=4)
        expected = execute("toy", lambda _: run.job._replace(schedule=schedule), at_once)
        assert {**results, "seconds": 0} == {**expected, "seconds": 0}

    def test_nothing_left_to_do_changes_nothing(self, run):
        before = run.json("results.json"), run.history()
        run.execute(resume=True)
        assert (run.json("results.json"), run.history()) == before

    def test_a_second_run_without_resume_is_refused_and_harms_nothing(self, run):
        before = {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()}
        with pytest.raises(InputError, match="holds a run already; add --resume"):
            run.execute()
        assert {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()} == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"seed": 6}, "was run with seed = 5, not 6"),
            ({"fusion": "deq"}, "was run with fusion = sum, not deq"),
            ({"features": 16}, "features = 8, not 16"),
            ({"tol": 1e-4}, "tol = 0.001, not 0.0001"),
            ({"epochs": 1}, "run with 2, which may only grow"),
        ],
    )
    def test_another_option_is_refused_by_name(self, run, changes, message):
        before = run.json("config.json")
        with pytest.raises(InputError, match=message):
            run.execute(resume=True, **changes)
        assert run.json("config.json") == before

    def test_a_run_on_the_sample_does_not_go_on_with_real_data(self, run):
        """Else results.json would call "real" what was trained on synthetic rows."""
        sample = DATASET._replace(data="sample")
        config = dataclasses.replace(run.config, run_dir=run.run_dir.parent / "sample")
        execute("toy", lambda _: run.job._replace(dataset=sample), config)
        real = dataclasses.replace(config, resume=True, epochs=3, data_dir=Path("elsewhere"))
        with pytest.raises(InputError, match="data"):
            execute("toy", lambda _: run.job, real)

    def test_damaged_checkpoints_are_named_and_what_there_is_is_kept(self, run):
        for file in (run.run_dir / "checkpoints").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")
        before, results = run.history(), run.json("results.json")
        with pytest.raises(InputError, match=r"no whole checkpoint: step 4 differs .* step 2"):
            run.execute(epochs=4, resume=True)
        assert run.history() == before
        assert run.json("results.1.json") == results  # of the shorter training, so not results.json
        assert not (run.run_dir / "results.json").exists()

    def test_without_a_checkpoint_it_begins_anew_and_keeps_what_there_was(self, run, capsys):
        shutil.rmtree(run.run_dir / "checkpoints")
        names = ("metrics.jsonl", "results.json", "report.md", "report.html")
        before = {name: (run.run_dir / name).read_bytes() for name in names}
        (run.run_dir / "metrics.1.jsonl").write_text("of once before")
        capsys.readouterr()
        assert {**run.execute(resume=True), "seconds": 0} == {**run.results, "seconds": 0}
        out = capsys.readouterr().out
        assert "checkpoints holds no checkpoint, so training begins at epoch 0; kept: " in out
        for name, content in before.items():
            stem, suffix = name.split(".")
            kept = f"{stem}.{2 if stem == 'metrics' else 1}.{suffix}"
            assert (run.run_dir / kept).read_bytes() == content and f"{name} as {kept}" in out
        assert (run.run_dir / "metrics.1.jsonl").read_text() == "of once before"
        assert [row["epoch"] for row in run.history()] == [0, 1, 2]

    def test_the_history_is_never_shorter_than_that_of_the_checkpoint(self, run, monkeypatch):
        """A crash while a resumed run hands its old rows over finds every one in the file."""
        path = run.run_dir / "metrics.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"epoch": 3, "loss": 0.2')  # killed within a write
        lengths = []

        def select_and_look(*args, **options):
            *how, report = args

            def looking(row):
                report(row)
                lengths.append(len(path.read_bytes().splitlines()))

            return select(*how, looking, **options)

        monkeypatch.setattr("experiments.run.select", select_and_look)
        run.execute(epochs=4, resume=True)
        assert lengths == [4, 4, 4, 4, 5]
        assert path.read_bytes().startswith(whole)
        assert [row["epoch"] for row in run.history()] == [0, 1, 2, 3, 4]


class TestInUse:
    def test_a_second_run_is_refused_before_it_reads_data(self, run):
        def read(config):
            pytest.fail("it reads the data")

        before = {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()}
        with folder_alone(run.run_dir, run.run_dir):
            for resume in (True, False):
                config = dataclasses.replace(run.config, resume=resume)
                who = f"in use by process {os.getpid()} on {socket.gethostname()} since "
                with pytest.raises(InputError, match=who):
                    execute("toy", read, config)
        assert {p: p.read_bytes() for p in run.run_dir.rglob("*") if p.is_file()} == before

    def test_a_run_has_it_while_it_trains_and_not_after(self, run, monkeypatch):
        seen = []

        def select_and_look(*args, **options):
            seen.append(run.json("running.json")["process"])
            return select(*args, **options)

        monkeypatch.setattr("experiments.run.select", select_and_look)
        run.execute(resume=True)
        assert seen == [os.getpid()]
        assert not [name for name in (".lock", "running.json") if (run.run_dir / name).exists()]

    def test_data_that_cannot_be_read_leave_no_directory(self, tmp_path):
        def read(config):
            raise InputError("no such data")

        with pytest.raises(InputError, match="no such data"):
            execute("toy", read, CommonConfig(run_dir=tmp_path / "new" / "run"))
        assert not (tmp_path / "new").exists()


def open_run(experiment, config):
    """Opens a run directory, begins, and leaves it."""
    with opened_run(experiment, config) as run_dir:
        begin_run(run_dir, experiment, config)
    return run_dir


class TestOpenRun:
    def refuse(self, message, **options):
        with pytest.raises(InputError, match=message):
            open_run("toy", CommonConfig(**options))

    def test_default_is_a_new_folder_under_runs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        run_dir = open_run("toy", CommonConfig(fusion="sum", seed=3))
        assert run_dir.parent == Path("runs/toy")
        assert re.fullmatch(r"\d{8}-\d{6}-sum-seed3", run_dir.name)
        assert (run_dir / "config.json").is_file() and (run_dir / "figures").is_dir()

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert open_run("toy", CommonConfig(run_dir=Path("~/mine"))) == tmp_path / "mine"

    def test_resume_of_a_run_that_was_not_begun_begins_it(self, tmp_path, capsys):
        """As a scheduler does that gives the same command every time."""
        self.refuse("--resume needs --run-dir", resume=True)
        (tmp_path / "killed").mkdir()
        for name in (".lock", "running.json", ".config.json.123.partial"):  # while it began
            (tmp_path / "killed" / name).write_text("")
        for name in ("nowhere", "killed"):
            options = CommonConfig(resume=True, run_dir=tmp_path / name)
            assert open_run("toy", options) == tmp_path / name
            note = f"Note: there is nothing to resume in {tmp_path / name}; a new run begins.\n"
            assert capsys.readouterr().out == note
            assert open_run("toy", options) and capsys.readouterr().out == ""
            assert sorted(p.name for p in options.run_dir.iterdir()) == ["config.json", "figures"]

    def test_a_file_and_a_path_through_a_file(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        self.refuse("file is a file; give a directory", run_dir=tmp_path / "file")
        self.refuse("file", run_dir=tmp_path / "file" / "run")
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_directory_with_other_things(self, tmp_path):
        (tmp_path / "photo").write_text("mine")
        self.refuse("is not empty and holds no run", run_dir=tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["photo"]

    def test_an_empty_directory_will_do(self, tmp_path):
        assert open_run("toy", CommonConfig(run_dir=tmp_path)) == tmp_path

    def test_another_experiment(self, tmp_path):
        open_run("other", CommonConfig(run_dir=tmp_path))
        for resume in (False, True):
            self.refuse("run of experiment 'other', not 'toy'", run_dir=tmp_path, resume=resume)

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": 3}', b"\xff\xfe"])
    def test_a_config_that_is_none(self, tmp_path, text):
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "config.json").write_bytes(content)
        self.refuse(r"config\.json (cannot be read|does not describe)", run_dir=tmp_path)
        assert (tmp_path / "config.json").read_bytes() == content

    def test_a_run_killed_before_its_first_checkpoint_can_be_resumed(self, tmp_path):
        options = CommonConfig(run_dir=tmp_path / "run")
        open_run("toy", options)
        assert open_run("toy", dataclasses.replace(options, resume=True, epochs=200))


COMMANDS = [
    (mmimdb, []),
    (mmimdb, ["--fusion", "gmu", "--seed", "3", "--epochs", "7"]),
    (mmimdb, ["--epochs", "100", "--features", "512"]),  # the defaults of the real data
    (mmimdb, ["--hidden", "512", "1024", "--batch-size", "256", "--patience", "6"]),
    (mmimdb, ["--data-dir", "/some where/it's", "--hidden", "16", "24", "--variant", "raw"]),
    (mmimdb, ["--data-dir", "d", "--features", "128", "--epochs", "40", "--tol", "1e-05"]),
    (mmimdb, ["--download", "--features-npz", "f.npz", "--cache-dir", "c", "--dropout", "0.0"]),
    (multiomics, ["--dataset", "brca", "--download", "--evaluate-every", "5"]),
    (multiomics, ["--data-dir", "d", "--jacobian-weight", "0", "--learning-rate", "3e-4"]),
]  # fmt: skip


class TestOptions:
    @pytest.mark.parametrize(("experiment", "args"), COMMANDS)
    def test_the_command_of_the_report_repeats_the_run(self, experiment, args):
        config = experiment.parse_args(args)
        name = experiment.__name__.split(".")[-1]
        python, module, target, *words = shlex.split(command_line(name, config))
        assert (python, module, target) == ("python", "-m", f"experiments.{name}")
        assert experiment.parse_args(words) == config

    def test_run_directory_and_resume_are_left_out_of_the_command(self):
        config = mmimdb.parse_args(["--run-dir", "here", "--resume", "--seed", "4"])
        assert "here" not in command_line("mmimdb", config)
        assert "resume" not in command_line("mmimdb", config)

    def test_defaults_depend_on_the_data(self):
        assert mmimdb.parse_args([]) == mmimdb.SAMPLE
        assert mmimdb.parse_args(["--data-dir", "d"]) == mmimdb.Config(data_dir=Path("d"))
        assert mmimdb.parse_args(["--download"]) == mmimdb.Config(download=True)
        assert mmimdb.parse_args(["--epochs", "3", "--data-dir", "d"]).features == 512

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--nope"], "--nope"),
            (["stray"], "stray"),
            (["--seed", "x"], "seed.*'x'"),
            (["--seed", "1.5"], "seed.*'1.5'"),
            (["--seed"], "seed"),
            (["--tol", "small"], "tol.*'small'"),
            (["--resume", "maybe"], "maybe"),
        ],
    )
    def test_bad_options_are_named_on_one_line(self, args, message, monkeypatch):
        for width in ("200", "20"):
            monkeypatch.setenv("COLUMNS", width)
            with pytest.raises(InputError, match=message) as caught:
                parse(CommonConfig(), args, "prog")
            assert "\n" not in str(caught.value) and "│" not in str(caught.value)
            assert str(caught.value).endswith("; --help lists the options")

    def test_an_unknown_fusion_lists_the_known(self):
        with pytest.raises(InputError, match=r"--fusion nonsense: .*'deq'.*'lmf'.*'plot'"):
            build_fusion(CommonConfig(fusion="nonsense"), ("plot", "poster"))

    @pytest.mark.parametrize("name", ["deq", "weight_tied", "concat", "sum", "gmu", "lmf", "b"])
    def test_the_options_reach_the_fusion(self, name):
        config = CommonConfig(fusion=name, features=24, tol=0.02, max_steps=7)
        fusion = build_fusion(config, ("a", "b"))
        assert fusion.features == 24
        if name == "deq":
            assert (fusion.solver.tol, fusion.solver.max_steps) == (0.02, 7)
        if name == "weight_tied":
            assert fusion.tol == 0.02


def command(*args, **environment):
    """A command line as its user meets it."""
    return subprocess.run(
        [sys.executable, "-m", *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


class TestRefusedFirst:
    """Before the data are read, so nobody waits for them; and nothing is printed or left."""

    @pytest.mark.parametrize(
        ("main", "more"),
        [
            (mmimdb.main, ["--data-dir", "nowhere"]),
            (multiomics.main, ["--data-dir", "nowhere"]),
            (mosi.main, ["--data-dir", "nowhere"]),
            (mosi.main, ["--data-dir", "nowhere", "--form", "aligned"]),
            (features.main, ["data.npz"]),
        ],
    )
    def test_options_of_the_fusion(self, main, more, tmp_path, monkeypatch, run_command):
        monkeypatch.chdir(tmp_path)
        train = DATASET.train
        np.savez("data.npz", **train.inputs, labels=train.labels)
        for words, message in [
            (["--fusion", "nonsense"], "--fusion nonsense: no fusion is called"),
            (["--features", "18"], "--features 18: --fusion deq needs a multiple of 4"),
            (["--warm-start", "--fusion", "sum"], "--warm-start: --fusion sum solves nothing"),
        ]:
            status, out, err = run_command(main, *more, *words, "--run-dir", "run")
            assert (status, out, err.count("\n")) == (2, "", 1) and message in err
        assert [path.name for path in tmp_path.iterdir()] == ["data.npz"]

    def test_the_run_directory(self, tmp_path, run_command):
        (tmp_path / "photo").write_text("mine")
        words = ["--data-dir", tmp_path / "nowhere", "--run-dir", tmp_path]
        status, out, err = run_command(mmimdb.main, *words)
        assert (status, out) == (2, "") and "is not empty and holds no run" in err
        assert [path.name for path in tmp_path.iterdir()] == ["photo"]


class TestCommandLine:
    def test_a_terminal_without_utf8_gets_the_message_too(self):
        done = command("experiments.mmimdb", "--nope", PYTHONIOENCODING="ascii")
        assert done.returncode == 2 and done.stdout == ""
        assert "--nope" in done.stderr and done.stderr.count("\n") == 1

    @pytest.mark.parametrize("experiment", [mmimdb, multiomics])
    def test_help(self, experiment, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["x", "--help"])
        with pytest.raises(SystemExit) as stop:
            experiment.main()
        out, err = capsys.readouterr()
        assert not stop.value.code and err == ""
        for option in ("--data-dir", "--fusion", "--seed", "--epochs", "--run-dir", "--resume"):
            assert option in out
