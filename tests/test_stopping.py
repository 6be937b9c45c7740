"""Ctrl-C, SIGTERM and SIGKILL: nothing is lost, and the message says how to go on.

python -m pytest tests/test_stopping.py -m endurance      (kills a run twenty times)
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments.common.errors import exit_cleanly
from experiments.common.stopping import StoppedError, StopRequest

ROOT = Path(__file__).resolve().parents[1]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


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


def interruptible():
    """A child of a background job would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_within_a_long_call_the_answer_comes_at_once_and_a_second_signal_kills(number, status):
    words = [sys.executable, "-c", ONE_LONG_CALL]
    with subprocess.Popen(words, cwd=ROOT, preexec_fn=interruptible, **PIPES) as running:
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
    return [sys.executable, *map(str, [*words, "--epochs", 4000, *more])]


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
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_from_there(signals, tmp_path):
    run_dir, saved = tmp_path / "run", 0
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    for number, status in signals.items():
        more = ["--patience", 4000, "--resume"]  # or it may be over before
        words = command(tmp_path, run_dir, *more)
        start = {"cwd": ROOT, "env": environment, "preexec_fn": interruptible}
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
import experiments.run
from experiments import features

experiments.run.SAVE_SECONDS = 0  # a checkpoint after every epoch: most of the time it is saving
features.main()
"""


def arrays_of(folder):
    """{name: array} of the newest checkpoint."""
    with ocp.CheckpointManager(folder.absolute()) as manager:
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(manager.latest_step(), args=args).state


@pytest.mark.endurance
def test_killed_twenty_times_is_the_uninterrupted_run(tmp_path):
    """By SIGKILL at random moments, every second time while a checkpoint is being written."""
    rng = np.random.default_rng(0)
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def start(run_dir, *more):
        words = command(tmp_path, run_dir, "--epochs", 300, "--patience", 300, *more)
        words = [sys.executable, "-c", STEADY, *words[3:]]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with start(whole) as running:
        assert running.wait() == 0
    kills = while_saving = 0
    while kills < 20:
        running = start(killed, *(["--resume"] if killed.exists() else []))
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
    with start(killed, "--resume") as last:
        assert last.wait() == 0, last.stderr.read()
    expected, found = arrays_of(whole / "checkpoints"), arrays_of(killed / "checkpoints")
    assert expected.keys() == found.keys() and len(expected) > 5
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name
    timeless = [
        [
            {**json.loads(line), "seconds": 0}
            for line in (d / "metrics.jsonl").read_text().splitlines()
        ]
        for d in (whole, killed)
    ]
    assert timeless[0] == timeless[1]
