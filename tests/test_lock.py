"""One process at a time in a folder: who has it is named, and who is gone has nothing."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Barrier

import pytest
from filelock import FileLock

from experiments.common import lock
from experiments.common.errors import InputError
from experiments.common.lock import HOLDER, LOCK, folder_alone, is_unused

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys
from pathlib import Path
from experiments.common.lock import folder_alone

with folder_alone(Path(sys.argv[1]), Path("unused")) as folder:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.05)


@pytest.fixture
def holder(tmp_path):
    """Another process that has tmp_path/run."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_host_process_and_time(holder, tmp_path):
    folder = tmp_path / "run"
    found = json.loads((folder / HOLDER).read_text())
    assert (found["host"], found["process"]) == (socket.gethostname(), holder.pid)
    assert "folder_alone" in found["command"]
    age = datetime.now().astimezone() - datetime.fromisoformat(found["since"])
    assert 0 <= age.total_seconds() < 600
    before = {path: path.read_bytes() for path in folder.iterdir()}
    who = f"{folder} is in use by process {holder.pid} on {found['host']} since {found['since']};"
    with pytest.raises(InputError, match=re.escape(who)), folder_alone(folder, tmp_path):
        pytest.fail("two have it")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_who_it_is_need_not_be_readable(holder, tmp_path):
    path = tmp_path / "run" / HOLDER
    for text in ("", '{"host": "a', "[]", "{}", None):
        path.unlink() if text is None else path.write_text(text)
        with (
            pytest.raises(InputError, match="in use by another process, which has not said"),
            folder_alone(tmp_path / "run", tmp_path),
        ):
            pytest.fail("two have it")


def test_a_process_that_was_killed_has_nothing(holder, tmp_path, capsys):
    holder.kill()
    holder.wait()
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {LOCK, HOLDER} and is_unused(folder)
    with folder_alone(folder, tmp_path):
        assert json.loads((folder / HOLDER).read_text())["process"] == os.getpid()
        (folder / "mine").write_text("")
    assert [path.name for path in folder.iterdir()] == ["mine"]
    assert capsys.readouterr().out == ""


def test_the_end_of_a_process_on_another_host_is_a_guess(tmp_path, capsys):
    """Where a network's file system keeps locks to a host its lock would be free too."""
    who = {"host": "node17", "process": 4, "since": "2026-01-02T03:04:05+00:00", "command": "x"}
    (tmp_path / HOLDER).write_text(json.dumps(who))
    with folder_alone(tmp_path, tmp_path):
        said = capsys.readouterr().out
    assert said.startswith("Note: ") and "process 4 on node17 since 2026-01-02T03:04:05" in said


def test_a_disk_without_locks_is_said(tmp_path, capsys, monkeypatch):
    def flock(self):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(FileLock, "acquire", flock)
    with folder_alone(tmp_path, tmp_path):
        assert "has no locks; see that no other process uses it" in capsys.readouterr().out


def test_what_cannot_be_made_or_locked_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd" / LOCK).mkdir(parents=True)
    for given, message in [
        (tmp_path / "file", "file is a file; give a directory"),
        (tmp_path / "file" / "run", "cannot be made: Not a directory"),
        (tmp_path / "odd", "odd cannot be locked: Is a directory"),
    ]:
        with pytest.raises(InputError, match=message), folder_alone(given, tmp_path):
            pytest.fail("it was made")


def test_folders_into_which_nothing_was_written_are_removed(tmp_path):
    with folder_alone(tmp_path / "a" / "b", tmp_path) as folder:
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with folder_alone(tmp_path / "a" / "b", tmp_path) as folder:
        (folder / "mine").write_text("")
    (tmp_path / "theirs").mkdir()
    with folder_alone(tmp_path / "theirs", tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "theirs"]


def test_new_folders_at_the_same_time_are_different_ones(tmp_path):
    ready = Barrier(4)

    def open_new(_):
        ready.wait()
        with folder_alone(None, tmp_path / "20260102-030405") as mine:
            (mine / "mine").write_text("")
            ready.wait()
        return mine.name

    with ThreadPoolExecutor(4) as threads:
        found = sorted(threads.map(open_new, range(4)))
    assert found == ["20260102-030405", *(f"20260102-030405-{i}" for i in (2, 3, 4))]
