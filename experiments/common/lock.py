"""A folder that one process alone writes to, and who it is.

```
.lock          held through the kernel, so it is free as soon as its process is gone
running.json   who holds it: {"host", "process", "since", "command"}; written whole or not at all
```

Both are gone when the process ends. A process that was killed leaves them behind, unlocked.
"""

import contextlib
import datetime
import errno
import itertools
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from experiments.common.errors import InputError
from experiments.common.files import read_json, write_json

LOCK, HOLDER = ".lock", "running.json"
PATIENCE = 1.0  # seconds: whoever has just taken the lock writes who it is
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system, a network's mostly


@contextlib.contextmanager
def folder_alone(given: Path | None, otherwise: Path) -> Iterator[Path]:
    """The folder `given`, or a new one called `otherwise`, with its lock; made where it is missing.

    Where `otherwise` is there already the new one is called `otherwise`-2, and so on. Folders into
    which nothing was written are removed in the end.

    Raises:
      InputError: the folder cannot be made, or another process has it.
    """
    folder, made = _made(given, otherwise)
    try:
        with _locked(folder):
            yield folder
    finally:
        with contextlib.suppress(OSError):
            for empty in made:
                empty.rmdir()


def _made(given: Path | None, otherwise: Path) -> tuple[Path, list[Path]]:
    """The folder, and which ones of it and its parents were missing, the innermost first."""
    names = (otherwise.with_name(f"{otherwise.name}-{i}") for i in itertools.count(2))
    for folder in (given.expanduser(),) if given else itertools.chain([otherwise], names):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=given is not None)
        except FileExistsError:
            if given is None:  # another process was faster
                continue
            raise InputError(f"--run-dir {folder} is a file; give a directory") from None
        except OSError as error:
            raise InputError(f"--run-dir {folder} cannot be made: {error.strerror}") from error
        return folder, missing
    raise AssertionError("there is always another name")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / LOCK, timeout=PATIENCE, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{folder} is in use {_holder(folder)}; wait for its end, or give another --run-dir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise InputError(f"--run-dir {folder} cannot be locked: {error.strerror}") from error
        print(f"Note: the disk of {folder} has no locks; see that no other process uses it.")
    _say_of_another_host(folder)
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    command = shlex.join(sys.orig_argv)
    me = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "command": command}
    try:
        write_json(folder / HOLDER, me)
        yield
    finally:
        # Before the release: a process that waits for a file that is gone looks anew.
        for name in (HOLDER, LOCK):
            with contextlib.suppress(OSError):  # Windows removes none that is open
                (folder / name).unlink()
        lock.release()


def _holder(folder: Path) -> str:
    """Who has the folder, in words, as far as that is written there."""
    try:
        found = read_json(folder / HOLDER)
        return f"by process {found['process']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by another process, which has not said who it is"


def _say_of_another_host(folder: Path) -> None:
    """A lock that is free is a process that is gone, unless the network keeps locks to a host."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if read_json(folder / HOLDER)["host"] != socket.gethostname():
            print(
                f"Note: {folder} was in use {_holder(folder)}. Its lock is free, so that process "
                "seems to be gone;\n      if it still runs, stop one of the two."
            )


def is_unused(folder: Path) -> bool:
    """Whether nothing is in the folder but what a lock and a killed write leave there."""
    rest = {path.name for path in folder.iterdir()} - {LOCK, HOLDER}
    return rest <= {path.name for path in folder.glob(".*.partial")}
