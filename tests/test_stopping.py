"""SIGTERM and SIGKILL: nothing is lost, and the message says how to go on.

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
from experiments.common.stopping import Sigterm, StoppedError

ROOT = Path(__file__).resolve().parents[1]


def test_the_signal_is_noted_inside_only():
    before = signal.getsignal(signal.SIGTERM)
    with Sigterm() as came:
        assert not came()
        signal.raise_signal(signal.SIGTERM)
        assert came()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second one kills
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stopped_run_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as stop, exit_cleanly():
        raise StoppedError("epoch 3 is saved")
    assert stop.value.code == 143
    assert capsys.readouterr().err == "stopped: epoch 3 is saved\n"


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


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path):
    run_dir = tmp_path / "run"
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    words = command(tmp_path, run_dir, "--patience", 4000)  # or it may be over before
    running = subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)
    wait_for(run_dir / "metrics.jsonl", running)
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 143 and err.startswith("stopped: SIGTERM came; epoch ")
    assert err.count("\n") == 1 and f"--resume --run-dir {run_dir} goes on" in err
    epoch = int(err.split("epoch ")[1].split()[0])
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == epoch + 1 and any((run_dir / "checkpoints").glob("*.sha256"))


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
            wait_for_progress(killed, running)
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


def wait_for_progress(run_dir, process):
    """Until a resumed run has trained an epoch more."""
    path = run_dir / "metrics.jsonl"
    lines = len(path.read_text().splitlines()) if path.exists() else 0
    deadline = time.monotonic() + 120
    while not path.exists() or len(path.read_text().splitlines()) <= lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
