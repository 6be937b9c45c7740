"""Command lines: a frozen dataclass is the command, its fields are the options (tyro)."""

import contextlib
import io
from collections.abc import Sequence
from typing import TypeVar

import tyro

from experiments.errors import InputError

Config = TypeVar("Config")


def parse(config: type[Config], args: Sequence[str] | None = None, prog: str | None = None) -> Config:
    """The configuration that `args` (by default the command's own) describe.

    Raises:
      InputError: an option is unknown or its value unusable; tyro's framed text, in one line.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, args=args, prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise InputError(_first_paragraph(complaint.getvalue())) from None


def _first_paragraph(framed: str) -> str:
    lines = [line.strip("│╭╮╰╯ ") for line in framed.splitlines() if line.startswith("│")]
    text = []
    for line in lines:
        if line.startswith("──"):
            break
        text.append(line)
    return f"{' '.join(text)}; --help lists the options"
