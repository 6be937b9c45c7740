"""Puts generated tables into README.md and the pages beside it, so that no result is typed by hand.

    python -m experiments.reporting.readme initialisation=runs/initialisation/table.md \\
        mmimdb=runs/compare/mmimdb/compare.md

`NAME=FILE` replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`, on every
page that has these marks, by the file, less its title; `<!-- begin NAME: first table -->` takes the
file up to the end of its first table.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import write_text

PAGES = (Path("README.md"), Path("experiments/README.md"), Path("experiments/BENCHMARK.md"))
MARKS = "(<!-- begin {name}(: first table)? -->\n).*?(<!-- end {name} -->)"


def insert(page: str, name: str, text: str) -> str:
    """`page` with `text` between the marks of `name`."""

    def filled(marks: re.Match) -> str:
        begin, first, end = marks.groups()
        return f"{begin}{up_to_first_table(body) if first else body}\n{end}"

    body = re.sub(r"\A# .*\n+", "", text).strip()
    return re.sub(MARKS.format(name=re.escape(name)), filled, page, flags=re.DOTALL)


def up_to_first_table(text: str) -> str:
    """`text` to the last line of the first table in it."""
    found = re.match(r".*?^\|.*?(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return found.group() if found else text


def update(arguments: Sequence[str], pages: Sequence[Path] = PAGES) -> None:
    """Inserts every NAME=FILE."""
    if not arguments:
        raise InputError("nothing to insert: give NAME=FILE, such as mmimdb=compare.md")
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for argument in arguments:
        name, _, file = argument.partition("=")
        try:
            found = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{argument}: {error.strerror}; give NAME=FILE") from error
        marks = MARKS.format(name=re.escape(name))
        if not any(re.search(marks, text, re.DOTALL) for text in texts.values()):
            raise InputError(f"no page has marks for {name}; add <!-- begin {name} --> and its end")
        texts = {page: insert(text, name, found) for page, text in texts.items()}
    for page, text in texts.items():
        write_text(page, text)


@exit_cleanly()
def main() -> None:
    update(sys.argv[1:])


if __name__ == "__main__":
    main()
