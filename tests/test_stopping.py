"""Ctrl-C, SIGTERM and SIGKILL: nothing is lost, and the message says how to go on.

python -m pytest tests/test_stopping.py -m endurance      (kills a run twenty times)
"""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import experiments.training.recording
from experiments import features
from experiments.common.errors import exit_cleanly
from experiments.common.stopping import StoppedError, StopRequest

ROOT = Path(__file__).resolve().parents[1]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def not_ignored():
    """Ctrl-C as in a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("not_ignored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_answered_once_there_is_something_to_save(number, capsys):
    before = signal.getsignal(number)
    with StopRequest("saving after this epoch") as asked:
        assert signal.getsignal(number) == before
        asked.begin()
        asked.begin()  # a resumed run has many rows
        assert not asked()
        signal.raise_signal(number)
        assert asked() and asked.number == number
    assert signal.getsignal(number) == before
    assert capsys.readouterr().err == "stopping: saving after this epoch\n"


# One call that hears of no Python handler for minutes, as a compiled epoch.
ONE_LONG_CALL = """
import hashlib
from experiments.common.stopping import StopRequest

with StopRequest("saving after this epoch") as asked:
    asked.begin()
    print("begun", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("interruptible")
def test_within_a_long_call_the_answer_comes_at_once_and_a_second_signal_kills(number, status):
    words = [sys.executable, "-c", ONE_LONG_CALL]
    with subprocess.Popen(words, cwd=ROOT, **PIPES) as running:
        assert running.stdout.readline() == "begun\n"
        running.send_signal(number)
        assert running.stderr.readline() == "stopping: saving after this epoch\n"
        assert running.poll() is None
        running.send_signal(number)
        assert running.wait(timeout=60) == status and running.stderr.read() == ""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_ends_with_one_line(number, status, capsys):
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        raise StoppedError("epoch 3 is saved", "the same command with --resume", number)
    assert stop.value.code == status
    line = "stopped: epoch 3 is saved; the same command with --resume goes on\n"
    assert capsys.readouterr().err == line


def test_a_full_disk_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        raise OSError(28, "No space left on device", "report.md")
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: no space is left on the disk for report.md")


def command(tmp_path, run_dir, *more):
    path = tmp_path / "data.npz"
    if not path.exists():
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 4000)
        np.savez(path, a=rng.standard_normal((4000, 16)) + labels[:, None], labels=labels)
    words = ["-m", "experiments.features", path, "--run-dir", run_dir, "--fusion", "sum"]
    # Batches so small that every epoch is evaluated.
    return [sys.executable, *map(str, [*words, "--batch-size", 64, "--epochs", 4000, *more])]


def wait_for_rows(path, count, process, seconds=120):
    """Until a file has so many lines."""
    deadline = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


@pytest.mark.parametrize(
    "signals",
    [
        {signal.SIGINT: 130},
        pytest.param({signal.SIGINT: 130, signal.SIGTERM: 143}, marks=pytest.mark.slow),
    ],
    ids=["once", "twice"],
)
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_from_there(signals, tmp_path, interruptible):
    run_dir, saved = tmp_path / "run", 0
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for number, status in signals.items():
        more = ["--patience", 4000, "--resume"]  # or it may be over before
        words = command(tmp_path, run_dir, *more)
        start = {"cwd": ROOT, "env": environment}
        with subprocess.Popen(words, **start, **PIPES) as running:
            wait_for_rows(run_dir / "metrics.jsonl", saved + 2, running)
            running.send_signal(number)
            _, err = running.communicate(timeout=120)
        answer, end = err.splitlines()
        assert running.returncode == status
        assert answer.startswith("stopping: saving after this epoch; once more ends at once")
        epoch = int(end.removeprefix("stopped: epoch ").split()[0])
        assert end.endswith(f"; the same command with --resume --run-dir {run_dir} goes on")
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [*range(epoch + 1)]
        assert epoch > saved and any((run_dir / "checkpoints").glob("*.sha256"))
        saved = epoch
    assert {p.name for p in run_dir.iterdir()} == {
        "config.json", "metrics.jsonl", "checkpoints", "figures",
    }  # fmt: skip


STEADY = """
import sys
import experiments.training.recording
from experiments import features

# A checkpoint after every epoch: most of the time it is saving.
experiments.training.recording.SAVE_SECONDS = 0
features.main()
"""


def arrays_of(folder):
    """{name: array} of the newest checkpoint."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=args).state


def steady(tmp_path, run_dir, *more):
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    words = command(tmp_path, run_dir, "--epochs", 300, "--patience", 300, *more)
    words = [sys.executable, "-c", STEADY, *words[3:]]
    pipes = PIPES | {"stdout": subprocess.DEVNULL}
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


def rows_of(run_dir):
    """The lines of metrics.jsonl, each of them whole."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def assert_same_run(whole, other):
    """The last checkpoint, the history and the results, bit for bit, but for the seconds."""
    expected, found = arrays_of(whole / "checkpoints"), arrays_of(other / "checkpoints")
    assert expected.keys() == found.keys() and len(expected) > 5
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    assert timeless(rows_of(whole)) == timeless(rows_of(other))
    results = [[json.loads((d / "results.json").read_text())] for d in (whole, other)]
    assert timeless(results[0]) == timeless(results[1])


def timeless(rows):
    return [{**row, "seconds": 0} for row in rows]


@pytest.mark.endurance
def test_killed_twenty_times_is_the_uninterrupted_run(tmp_path):
    """By SIGKILL at random moments, every second time while a checkpoint is being written."""
    rng = np.random.default_rng(0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with steady(tmp_path, whole) as running:
        assert running.wait() == 0
    kills = while_saving = 0
    while kills < 20:
        running = steady(tmp_path, killed, "--resume")
        if kills:
            path = killed / "metrics.jsonl"
            lines = len(path.read_text().splitlines()) if path.exists() else 0
            wait_for_rows(path, lines + 1, running)  # it has trained an epoch more
        time.sleep(rng.uniform(0, 1.0 if kills else 8.0))
        if kills % 2:
            wait_for(killed / "checkpoints", running)
            while running.poll() is None and not list(killed.glob("checkpoints/*tmp*")):
                time.sleep(0.001)
        assert running.poll() is None, "the run was over before it could be killed"
        while_saving += bool(list(killed.glob("checkpoints/*tmp*")))
        running.kill()
        running.communicate()
        kills += 1
    assert while_saving >= 8
    with steady(tmp_path, killed, "--resume") as last:
        assert last.wait() == 0, last.stderr.read()
    assert_same_run(whole, killed)


def newest_whole(folder):
    """(step, epochs in its history) of the newest step that agrees with its checksums."""
    for seal in sorted(folder.glob("*.sha256"), key=lambda path: -int(path.stem)):
        words = ["sha256sum", "--check", "--status", seal.name]
        if not subprocess.run(words, cwd=folder, stderr=subprocess.DEVNULL).returncode:
            about = json.loads((folder / seal.stem / "about" / "metadata").read_text())
            return int(seal.stem), len(about["metadata"]["history"])
    return 0, 0


IN_USE = re.compile(r"error: \S+ is in use by process \d+ on \S+ since [-\d]+T[:\d]+[-+:\d]+;.*\n")


def in_a_fork(words, log):
    """The command, in a process that has its imports from the fork server."""
    sys.argv, experiments.training.recording.SAVE_SECONDS = ["features", *words], 0
    with (
        open(os.devnull, "w") as nothing,
        log.open("w") as said,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(said),
    ):
        features.main()


class Forks:
    """Processes that start within a second or so."""

    def __init__(self, tmp_path):
        self.tmp_path, self.count = tmp_path, 0
        self.server = multiprocessing.get_context("forkserver")
        self.server.set_forkserver_preload([__name__, "experiments.features"])

    def start(self, run_dir):
        self.count += 1
        more = ["--epochs", 600, "--patience", 600, "--resume"]
        words, log = command(self.tmp_path, run_dir, *more)[3:], self.tmp_path / f"{self.count}.log"
        process = self.server.Process(target=in_a_fork, args=(words, log))
        process.start()
        return process, log


@pytest.mark.endurance
def test_two_at_once_are_killed_again_and_again_and_nothing_is_lost(tmp_path, monkeypatch):
    """Two --resume of one run, started together; ROUNDS=50 in the environment for more of them.

    Every third time they are killed while they start, else once one of them trains.
    """
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    rng, run_dir, whole = np.random.default_rng(1), tmp_path / "run", tmp_path / "whole"
    forks, began = Forks(tmp_path), time.monotonic()
    running, log = forks.start(whole)
    wait_for_another_row(whole, [(running, log)])
    start = time.monotonic() - began
    running.join()
    assert running.exitcode == 0, log.read_text()
    count = dict.fromkeys(("killed", "refused", "finished", "rounds that went on", "saving"), 0)
    step = 0
    for i in range(int(os.environ.get("ROUNDS", 6))):
        pair = [forks.start(run_dir) for _ in range(2)]
        if i % 3:
            wait_for_another_row(run_dir, pair)
        time.sleep(rng.uniform(0, 1 if i % 3 else start))
        for process, _ in sorted(pair, key=lambda _: rng.random()):  # the other one may take over
            count["saving"] += bool(list(run_dir.glob("checkpoints/*tmp*")))
            process.kill()
            time.sleep(rng.choice([0, rng.uniform(0, start)]))
        for process, log in pair:
            process.join()
            said = log.read_text() if log.exists() else ""
            assert process.exitcode in (0, 2, -signal.SIGKILL) and "Traceback" not in said, said
            assert process.exitcode != 2 or IN_USE.fullmatch(said), said
            name = {0: "finished", 2: "refused", -signal.SIGKILL: "killed"}
            count[name[process.exitcode]] += 1
        newest, epochs = newest_whole(run_dir / "checkpoints")
        assert newest >= step and len(rows_of(run_dir)) >= epochs
        assert [row["epoch"] for row in rows_of(run_dir)] == [*range(len(rows_of(run_dir)))]
        count["rounds that went on"] += newest > step
        step = newest
        print(i, count, "at step", step, flush=True)
    kept = list(run_dir.glob("metrics.*.jsonl"))  # of trainings that were killed before they saved
    print(f"{start:.1f} s to start; {len(kept)} histories of trainings without a checkpoint")
    last, log = forks.start(run_dir)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert_same_run(whole, run_dir)


def wait_for_another_row(run_dir, processes, seconds=300):
    """Until one of them has trained an epoch, or all have ended."""
    path, deadline = run_dir / "metrics.jsonl", time.monotonic() + seconds
    rows = None
    while any(process.is_alive() for process, _ in processes):
        found = path.read_bytes().count(b"\n") if path.exists() else 0
        rows = found if rows is None else rows
        if found > rows:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)
