"""Command lines: a frozen dataclass is the command, its fields are the options (tyro).

A command that runs other experiments hands their options on, so it has argparse's parser.
"""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from experiments.common.errors import InputError

Config = TypeVar("Config")
SET_HERE = ("--seed", "--fusion", "--resume", "--no-resume")  # by commands that run experiments


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


class ArgumentParser(argparse.ArgumentParser):
    """argparse's; a complaint is an InputError."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; --help lists the options")


class Parser(ArgumentParser):
    """For a command that trains an experiment with several seeds: its options, and the others."""

    def __init__(self, command: str, description: str, experiments: Sequence[str]):
        super().__init__(
            prog=f"python -m experiments.{command}",
            usage=f"python -m experiments.{command} EXPERIMENT [options, the experiment's too]",
            allow_abbrev=False,
            description=description,
            epilog="All other options go to the experiment; see python -m experiments.NAME --help.",
        )
        self.add_argument("experiment", choices=experiments)
        self.add_argument("--seeds", type=int, default=5, help="seeds 0 … SEEDS - 1, by default 5")
        where = f"by default a new folder under runs/{command}"
        self.add_argument("--run-dir", type=Path, help=where)

    def own_and_rest(self, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The parser's own options, and the experiment's."""
        own, rest = self.parse_known_args(args)
        for option in SET_HERE:
            if any(word.split("=")[0] == option for word in rest):
                raise InputError(f"{option} is set by {self.prog} itself; --help lists the options")
        if own.seeds < 1:
            raise InputError(f"--seeds {own.seeds}: at least 1 is needed")
        return own, rest


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
