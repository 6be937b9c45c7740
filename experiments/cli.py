"""Command lines: a frozen dataclass is the command, its fields are the options (tyro)."""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

import tyro

from experiments.errors import InputError

Config = TypeVar("Config")


def parse(default: Config, args: Sequence[str], prog: str) -> Config:
    """`default` with the options in `args` (without the program's name) changed.

    Raises:
      InputError: an option is unknown or its value unusable; tyro's framed text, in one line.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(default), args=args, prog=prog, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_first_paragraph(complaint.getvalue())) from None


def _first_paragraph(framed: str) -> str:
    """What stands before the first rule, or where there is no frame below the title's rule."""
    paragraphs: list[list[str]] = [[]]
    for line in framed.splitlines():
        inner = line.strip("│ ")
        if line[:1] in ("╭", "╰") or not inner:
            continue
        if set(inner) <= {"─", "-"}:
            paragraphs.append([])
        else:
            paragraphs[-1].append(inner)
    text = paragraphs[0 if "╭" in framed else 1]
    return f"{' '.join(text)}; --help lists the options"
