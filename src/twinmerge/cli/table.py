"""Tables that the terminal has room for: names are cut in the middle, prose goes over lines, numbers stay whole."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from twinmerge.tables import shortened, visible

NUMBER = re.compile(r"[-+–−±]?\d|–?$")  # how a cell begins, or nothing to say
NAME, TENSOR, PROSE = 14, 24, 18  # columns that names, names of tensors, and prose have at least


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], short: bool = False) -> None:
    """A table on stdout; columns of numbers stand right, others left; brackets and colons in a text stay what they
    are. Columns that there is no room for follow below, beside the first one again.

    Args:
        title: stands above; none where empty.
        columns: their titles.
        rows: the cells.
        short: the first column is of texts of any length, which are cut at their end to one line.
    """
    from rich.console import Console

    console, cells = (
        Console(markup=False, emoji=False, highlight=False),
        [[visible(each) for each in row] for row in rows],
    )
    if title:
        console.print(title)  # not the table's own title, which would be folded to the table's width
    for part in _parts(columns, cells, console.width):
        names, lines = [columns[i] for i in part], [[row[i] for i in part] for row in cells]
        widths = _widths(names, lines, console.width)
        if short:
            lines = [[shortened(line[0], widths[0]), *line[1:]] for line in lines]
        console.print(_table(names, lines, widths))


def cut(text: str, width: int) -> str:
    """A name that is too long, shorter: of a dotted one parts are left out, from the left, but for its numbers and its
    end; of any other its middle.

    Example:
        >>> cut("model.layers.3.self_attn.q_proj.weight", 24), cut("/models/of/somebody", 12), cut("short", 20)
        ('…3…q_proj.weight', '/mod…omebody', 'short')
    """
    parts: list[str | None] = list(text.split("."))
    for i, part in enumerate(parts[:-1]):
        if len(_joined(parts)) <= width:
            break
        if part is not None and not part.isdigit():
            parts[i] = None
    found = _joined(parts)
    if len(found) <= width:
        return found
    head = (width - 1) * 2 // 5
    return f"{found[:head]}…{found[len(found) - (width - 1 - head) :]}"


def _joined(parts: Sequence[str | None]) -> str:
    """The parts of a dotted name, with … where some are left out."""
    return re.sub(r"\.?(\0\.?)+", "…", ".".join("\0" if part is None else part for part in parts))


def _numbers(rows: Sequence[Sequence[str]], i: int) -> bool:
    return i > 0 and all(NUMBER.match(row[i]) for row in rows)


def _least(columns: Sequence[str], rows: Sequence[Sequence[str]], i: int) -> int:
    """The width that a column can do with: of numbers all, with the title over several lines."""
    longest = max((len(row[i]) for row in rows), default=0)
    if not _numbers(rows, i):
        spaces, dots = (any(row[i].count(mark) >= least for row in rows) for mark, least in ((" ", 1), (".", 2)))
        longest = min(longest, PROSE if spaces else TENSOR if dots else NAME)
    return max(longest, *(len(word) for word in columns[i].split() or [""]))


def _parts(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Which columns stand beside each other."""
    least = [_least(columns, rows, i) for i in range(len(columns))]
    parts: list[list[int]] = [[0]]
    for i in range(1, len(columns)):
        if sum(least[j] + 3 for j in [*parts[-1], i]) + 1 > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """As wide as what is in it, and less, the widest first, where there is no room for that."""
    found = [max(len(name), *(len(row[i]) for row in rows), 0) for i, name in enumerate(columns)]
    least = [_least(columns, rows, i) for i in range(len(columns))]
    while sum(found) + 3 * len(found) + 1 > width:
        wider = [i for i in range(len(found)) if found[i] > least[i]]
        if not wider:
            break
        found[max(wider, key=lambda i: (not _numbers(rows, i), found[i]))] -= 1
    return found


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> object:
    from rich.table import Table

    table = Table()
    for i, column in enumerate(columns):
        justify = "right" if _numbers(rows, i) else "left"
        table.add_column(column, justify=justify, overflow="fold", width=widths[i])  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(text if " " in text else cut(text, widths[i]) for i, text in enumerate(row)))
    return table
