"""Whether the first line of a table holds the names of its columns."""

from collections.abc import Sequence
from itertools import pairwise

from experiments.datasets.columns import is_id_name, is_number, is_unknown

TARGETS = {"label", "class", "category", "target", "outcome", "diagnosis", "y", "group"}


def has_header(rows: Sequence[Sequence[str]]) -> bool | None:
    """Whether the first line holds names; None: it may, or not.

    It does if a word stands over numbers, or numbers over words; over an index; if it counts from
    0; or if a name is one of those that ids and labels have. It does not if a word is there again
    further down, or beside a number that is no name: names that are numbers are whole and rise.
    """
    head, columns = rows[0], list(zip(*rows[1:], strict=False))
    named = [not is_number(cell) and not is_unknown(cell) for cell in head]
    if not columns:
        return all(named)
    numbers = [cell for cell in head if is_number(cell)]
    if numbers and any(named) and not _rises(numbers):
        return False
    if any(n and cell in column for n, cell, column in zip(named, head, columns, strict=True)):
        return False
    indexed = head[0] == "" and len(head) > 1 and all(columns[0])  # as pandas writes it
    if not any(named):
        return _is_counted(head[indexed:], columns[indexed:], indexed)
    if _is_over_words(head, columns) or (len(numbers) > 2 and not _are_whole(columns[-1])):
        return True
    sure = any(n and _are_all_numbers(c) for n, c in zip(named, columns, strict=True))
    known = indexed or any(map(_is_name, head))
    return True if known or (sure and len(numbers) != 1) else None


def _is_counted(
    head: Sequence[str], columns: Sequence[Sequence[str]], indexed: bool
) -> bool | None:
    """Of a first line of nothing but numbers."""
    if _is_over_words(head, columns):
        return True
    counted = list(head) == [str(i) for i in range(len(head))]
    several = indexed + len(head) > 2
    if counted and (several or all("." in cell for column in columns for cell in column)):
        return True
    if not counted and not (several and _rises(head)):
        return None if indexed else False
    return None if all(map(_are_whole, columns)) else True if several else None


def _is_over_words(head: Sequence[str], columns: Sequence[Sequence[str]]) -> bool:
    """Whether numbers that could be names stand there, one of them over nothing but words."""
    if not _rises([cell for cell in head if is_number(cell)]):
        return False
    pairs = zip(head, columns, strict=True)
    return any(is_number(cell) and not any(map(is_number, column)) for cell, column in pairs)


def _are_whole(cells: Sequence[str]) -> bool:
    return not any("." in cell for cell in cells)


def _rises(cells: Sequence[str]) -> bool:
    """Whole numbers at equal distances."""
    if not all(cell.isdigit() for cell in cells):
        return False
    steps = {int(b) - int(a) for a, b in pairwise(cells)}
    return len(steps) < 2 and all(step > 0 for step in steps)


def _are_all_numbers(cells: Sequence[str]) -> bool:
    known = [cell for cell in cells if not is_unknown(cell)]
    return bool(known) and all(map(is_number, known))


def _is_name(cell: str) -> bool:
    return is_id_name(cell) or cell.lower() in TARGETS or cell.lower().rstrip("s") in TARGETS
