"""Puts generated tables into README.md, so that no result there is typed by hand.

    python -m experiments.readme initialisation=runs/initialisation/table.md \\
        mmimdb=runs/compare/mmimdb/compare.md

`NAME=FILE` replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` by the file,
less its title.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import InputError, exit_cleanly
from experiments.files import write_text


def insert(readme: str, name: str, table: str) -> str:
    """`readme` with `table` between the marks of `name`."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if begin not in readme or end not in readme:
        raise InputError(f"README.md has no marks {begin} … {end}; add them where the table goes")
    head, rest = readme.split(begin, 1)
    body = re.sub(r"\A# .*\n+", "", table).strip()
    return f"{head}{begin}\n{body}\n{end}{rest.split(end, 1)[1]}"


def update(arguments: Sequence[str], path: Path = Path("README.md")) -> None:
    """Inserts every NAME=FILE."""
    if not arguments:
        raise InputError("nothing to insert: give NAME=FILE, such as mmimdb=compare.md")
    text = path.read_text(encoding="utf-8")
    for argument in arguments:
        name, _, file = argument.partition("=")
        try:
            text = insert(text, name, Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}; give NAME=FILE") from error
    write_text(path, text)


@exit_cleanly()
def main() -> None:
    update(sys.argv[1:])


if __name__ == "__main__":
    main()
