"""Reports on the terminal, with tables as wide as there is room."""

import re
from collections.abc import Sequence

from rich.console import Console, JustifyMethod
from rich.markdown import Markdown
from rich.table import Table

from experiments.common.text import blocks

TABLE = re.compile(r"((?:^\|.*\n?)+)", re.MULTILINE)
BAR = re.compile(r"(?<!\\)\|")  # between two cells


def show(markdown: str, console: Console | None = None) -> None:
    """Prints a report; of a picture its caption and where it lies."""
    console = console or Console()
    for part in TABLE.split(re.sub(r"!\[(.*?)\]\((.*?)\)", r"\1: `\2`", markdown)):
        if part.startswith("|"):
            header, rule, *rows = (
                [cell.strip().replace(r"\|", "|") for cell in BAR.split(line)[1:-1]]
                for line in part.splitlines()
            )
            print_table([header, *rows], console, sum(not cell.endswith(":") for cell in rule))
        elif part.strip():
            console.print(Markdown(part), "")


def print_table(lines: Sequence[Sequence[str]], console: Console, left: int = 1) -> None:
    """Header first, the first `left` columns flush left; cut by columns where it has no room."""
    names = lines[0][:left]
    for header, *rows in blocks(lines, console.width):
        table = Table()
        for name in header:
            words = name in names
            justify: JustifyMethod = "left" if words else "right"
            table.add_column(name, justify=justify, overflow="fold", no_wrap=not words)
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
