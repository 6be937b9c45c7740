"""How experiments report bad input: one exception, one line on stderr, exit status 2."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """What the user gave cannot be used. The message says what, what was expected, what to do."""


@contextlib.contextmanager
def exit_cleanly() -> Iterator[None]:
    """Turn an InputError into ``error: …`` on stderr and exit status 2, Ctrl-C into status 130.

    Use it around a program, ``with exit_cleanly():``, or on its main, ``@exit_cleanly()``.
    Any other exception passes through: it is a bug, and its traceback is wanted.
    """
    try:
        yield
    except InputError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as interrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from interrupt
