"""``python -m experiments.compare``: the table, what is reused, what is refused."""

import json
import os
import re
import shutil
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest

from experiments import compare, mmimdb
from experiments.common.errors import InputError
from experiments.common.lock import folder_alone
from experiments.datasets.mmimdb_sample import sample_file

FUSIONS, SEEDS = ("sum", "text"), (0, 1)
NAMES = [f"{fusion}-seed{seed}" for fusion in FUSIONS for seed in SEEDS]


class Comparison:
    """A folder of runs on a small file in the real layout."""

    def __init__(self, home):
        self.folder = home / "comparison"
        self.data = sample_file(home / "a", train=32, validation=12, test=12, seed=1)
        self.other_data = sample_file(home / "b", train=32, validation=12, test=12, seed=2)
        self.options = ("--features", "16", "--hidden", "16", "16", "--epochs", "1")
        self.options += ("--cache-dir", str(home / "cache"))

    def args(self, *more, data=None, fusions=FUSIONS, seeds=2, folder=None):
        args = ["mmimdb", "--fusions", *fusions, "--seeds", seeds, "--run-dir"]
        args += [folder or self.folder, "--data-dir", data or self.data, *self.options, *more]
        return [str(arg) for arg in args]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    comparison = Comparison(tmp_path_factory.mktemp("compare"))
    comparison.rows = compare.compare(*compare.parse_args(comparison.args()))
    return comparison


@pytest.fixture
def copied(done, tmp_path):
    """A copy of the finished comparison, to go on with."""
    return shutil.copytree(done.folder, tmp_path / "copy")


def result(folder, name):
    return json.loads((folder / name / "results.json").read_text())


@pytest.fixture
def main(run_command):
    return partial(run_command, compare.main)


PROCESSES = ("--parallel", "processes")


class TestTable:
    def test_rows_are_the_results_of_the_runs(self, done):
        written = json.loads((done.folder / "compare.json").read_text())
        assert set(written) == {"rows", "fusions", "floors"} and written["rows"] == done.rows
        expected = [result(done.folder, name) for name in NAMES]
        assert sorted(written["rows"], key=lambda r: (r["fusion"], r["seed"])) == expected
        assert {(row["fusion"], row["seed"]) for row in expected} == {
            (fusion, seed) for fusion in FUSIONS for seed in SEEDS
        }
        assert len({row["test"]["micro_f1"] for row in expected}) > 1

    def test_mean_and_deviation_are_numpy_s(self, done):
        written = json.loads((done.folder / "compare.json").read_text())["fusions"]
        table = (done.folder / "compare.md").read_text(encoding="utf-8")
        assert [group["fusion"] for group in written] == list(FUSIONS)
        for group in written:
            assert group["n"] == 2 and group["seeds"] == [0, 1]
            runs = [result(done.folder, f"{group['fusion']}-seed{seed}") for seed in SEEDS]
            cells = []
            for name in ("micro_f1", "macro_f1", "weighted_f1", "samples_f1"):
                values = [run["test"][name] for run in runs]
                mean, std = np.mean(values), np.std(values, ddof=1)
                assert group["test"][name] == pytest.approx({"mean": mean, "std": std})
                cells.append(rf" +{mean:.3f} ± {std:.3f} \|")
            assert re.search(rf"\| {group['fusion']} +\| +2 \|{''.join(cells[:2])}", table)
            seconds = np.mean([run["seconds"] for run in runs])
            assert group["seconds"]["mean"] == pytest.approx(seconds)

    def test_every_run_is_a_whole_one_with_its_own_options(self, done):
        for name in NAMES:
            fusion, seed = name.split("-seed")
            config = json.loads((done.folder / name / "config.json").read_text())["config"]
            assert (config["fusion"], config["seed"]) == (fusion, int(seed))
            assert (config["epochs"], config["features"]) == (1, 16)
            report = (done.folder / name / "report.md").read_text(encoding="utf-8")
            assert "--features 16" in report


class TestReuse:
    def test_finished_runs_are_taken_as_they_are(self, done, copied, main):
        before = {p: p.stat().st_mtime_ns for p in copied.glob("*/**/*") if p.is_file()}
        status, out, _ = main(*done.args(folder=copied))
        assert status == 0 and "fusions compared" in out and "mmimdb: sum, seed 0" not in out
        assert {p: p.stat().st_mtime_ns for p in copied.glob("*/**/*") if p.is_file()} == before
        assert json.loads((copied / "compare.json").read_text())["rows"] == done.rows

    def test_missing_and_unfinished_runs_are_completed(self, done, copied, main):
        """One was never begun, one died after its last checkpoint."""
        shutil.rmtree(copied / "text-seed1")
        (copied / "sum-seed0" / "results.json").unlink()
        kept = (copied / "text-seed0" / "results.json").stat().st_mtime_ns
        assert main(*done.args(folder=copied))[0] == 0
        for name in NAMES:
            again, before = result(copied, name), result(done.folder, name)
            assert {**again, "seconds": 0} == {**before, "seconds": 0}
        assert (copied / "text-seed0" / "results.json").stat().st_mtime_ns == kept
        # Resumed, not begun again: its time is that of the checkpoint.
        assert result(copied, "sum-seed0")["seconds"] == result(done.folder, "sum-seed0")["seconds"]

    def test_runs_with_another_option_are_refused(self, done, copied, refuses):
        refuses("dropout", *done.args("--dropout", "0.1", folder=copied))

    def test_runs_on_other_data_are_refused(self, done, copied, refuses):
        """Else one table would hold two data sets."""
        refuses("data", *done.args(data=done.other_data, folder=copied))

    def test_runs_of_fewer_epochs_are_not_taken_for_finished(self, done, copied, main):
        args = done.args("--epochs", "2", folder=copied, fusions=["sum"], seeds=1)
        assert main(*args)[0] == 0
        lines = (copied / "sum-seed0" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["epoch"] == 2

    def test_damaged_results_are_refused(self, done, copied, refuses):
        (copied / "sum-seed0" / "results.json").write_text('{"experiment": "mm')
        refuses("results.json", *done.args(folder=copied))


class TestAtOnce:
    def test_the_second_comparison_in_a_folder_is_refused(self, done, copied, refuses):
        with folder_alone(copied, copied):
            refuses(f"{copied} is in use by process", *done.args(folder=copied))

    def test_a_run_that_another_process_trains_is_left_to_it(self, done, copied, refuses):
        (copied / "sum-seed0" / "results.json").unlink()
        with folder_alone(copied / "sum-seed0", copied):
            refuses("sum-seed0 is in use by process", *done.args(folder=copied))

    def test_a_stopped_run_says_how_to_go_on_with_the_comparison(self, done, main, tmp_path):
        """SIGTERM, here Python's own, comes with the first row of the first run."""
        folder = tmp_path / "long"
        args = done.args("--epochs", "4000", "--patience", "4000", folder=folder)

        def send():
            while not (folder / "sum-seed0" / "metrics.jsonl").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        sender = threading.Thread(target=send)
        sender.start()
        status, _, err = main(*args)
        sender.join()
        answer, end = err.splitlines()[-2:]
        assert status == 143 and answer.startswith("stopping: saving after this epoch")
        assert end.startswith(f"stopped: {folder / 'sum-seed0'}: epoch ")
        assert end.endswith(f" is saved; the same command with --run-dir {folder} goes on")
        assert list((folder / "sum-seed0" / "checkpoints").glob("*.sha256"))
        assert not (folder / "text-seed0").exists() and not (folder / "compare.json").exists()


class TestBadUsage:
    def test_unknown_experiment_on_one_line(self, refused_alone):
        line = refused_alone("experiments.compare", "nonsense", "--fusions", "deq")
        assert "nonsense" in line and "multiomics" in line

    def test_usage(self, done, refuses, tmp_path):
        fresh = tmp_path / "runs"
        refuses("fusions", "mmimdb")
        refuses("--seeds 0: at least 1", *done.args(seeds=0, folder=fresh))
        refuses("seeds", *done.args(seeds="many", folder=fresh))
        refuses("--nope", *done.args("--nope", folder=fresh))
        refuses("--parallel processes: expected none", *done.args(*PROCESSES, folder=fresh))
        refuses("does not exist", *done.args(data=tmp_path / "nowhere", folder=fresh))
        refuses("nonsense", *done.args(fusions=["nonsense"], folder=fresh))
        assert not fresh.exists()

    def test_fusions_are_looked_at_before_anything_is_trained(self, done, refuses, tmp_path):
        refuses("nonsense", *done.args(fusions=["sum", "nonsense"], seeds=1, folder=tmp_path / "r"))
        assert not list(tmp_path.glob("r/*/results.json"))

    def test_so_are_the_options_of_every_fusion(self, done, refuses, tmp_path):
        options = ("--features", "18")
        args = done.args(*options, fusions=["sum", "deq"], seeds=1, folder=tmp_path / "r")
        refuses("--features 18: --fusion deq needs a multiple of 4", *args)
        assert not (tmp_path / "r").exists()

    def test_a_fusion_named_twice(self, done, refuses, copied):
        refuses("sum", *done.args(fusions=["sum", "sum"], folder=copied))

    def test_run_directory_that_is_a_file(self, done, refuses, tmp_path):
        (tmp_path / "file").write_text("mine")
        refuses("file", *done.args(folder=tmp_path / "file"))

    @pytest.mark.parametrize("option", ["--seed", "--fusion", "--resume"])
    def test_options_that_the_comparison_sets_itself_are_not_ignored(self, done, option):
        value = {"--seed": ["3"], "--fusion": ["text"], "--resume": []}[option]
        options, rest = None, None
        with pytest.raises(InputError, match=option):
            options, rest = compare.parse_args(["mmimdb", "--fusions", "sum", option, *value])
            mmimdb.parse_args(rest)
        assert options is None

    def test_help(self, main):
        status, out, err = main("--help")
        assert not status and err == "" and "--fusions" in out and "--seeds" in out
