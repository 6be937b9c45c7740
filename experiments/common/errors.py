"""How experiments report bad input: one exception, one line on stderr, exit status 2."""

import contextlib
import errno
import io
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments.common.stopping import StoppedError


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, what was expected, what to do."""


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error says; libraries hand the system's complaint on in words."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or "No space left" in str(error) or "quota exceeded" in str(error)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """A full disk, which libraries tell in words of their own, as an InputError that names it.

    Whatever was begun has to be cleared away inside.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not disk_is_full(error):
            raise
        raise InputError(
            f"no space is left on the disk for {path}; make some and try again"
        ) from error


@contextlib.contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn an InputError, and a full disk, into ``error: …`` on stderr and exit status 2.

    Ctrl-C ends with status 130, SIGTERM with 143, as shells count signals.

    Use it around a program, ``with exit_cleanly():``, or on its main, ``@exit_cleanly()``.
    Any other exception passes through: it is a bug, and its traceback is wanted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that a terminal cannot show
    try:
        yield
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
    except StoppedError as stopped:
        print("stopped:", stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from stopped
    except OSError as error:
        if not disk_is_full(error):
            raise
        where = f" for {error.filename}" if error.filename else ""
        print(
            f"error: no space is left on the disk{where}; make some and try again", file=sys.stderr
        )
        raise SystemExit(2) from error
