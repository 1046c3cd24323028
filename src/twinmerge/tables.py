"""A table as HTML, Markdown and LaTeX, and values for its cells."""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WIDTH = 79  # of a line
SHOWN = 30  # rows of a table in a notebook
PRINTED = 20  # of one that is printed
NARROW = 12  # a column of texts is not cut below; the first, of names, not below twice as much
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {mark: f"\\{mark}" for mark in "&%$#_{}"}
SPECIAL |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " ", "\r": " "}

MARKS = r"[\\`*\[\]<>|&~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
"""Characters that mean something in a cell of a Markdown table; an underscore within a word means nothing."""


HIDDEN = r"[^\t\n\r -~\u00a0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"


def cell(value: Any) -> str:
    """A value for a table or a line: short.

    Example:
        >>> cell(0.123456), cell(["a", "b"]), cell(["a", "b", "c", "d"]), cell({"a": 1}), cell(None)
        ('0.1235', 'a, b', '4', '1', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)) and len(value) <= 3 and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return str(len(value)) if isinstance(value, (Mapping, list, tuple)) else str(value)


def block(title: str, about: Mapping[str, Any]) -> str:
    """A line of title, and a line for each name and what is said of it; long ones go on below their beginning.

    Example:
        >>> print(block("Twin", {"experts": "a, b", "rank": 8}))
        Twin
          experts  a, b
          rank     8
    """
    wide = max(map(len, about), default=0)
    lines = [title]
    for name, value in about.items():
        start = f"  {name:{wide}}  "
        text = " ".join(visible(cell(value)).split()) or "-"
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False
        )
    return "\n".join(lines)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """As a terminal shows it: at most 20 rows, lines that fit, and below what was left out.

    Long texts are cut; columns that do not fit are left out from the right.

    Example:
        >>> print(text_table(["name", "score"], [["a", 0.5], ["long", 0.12345]]))
        name   score
        a        0.5
        long  0.1235
        >>> print(text_table(["n"], [[i] for i in range(22)]).splitlines()[-1])
        2 more rows: to_csv() has all
    """
    from rich.cells import cell_len

    right = _numbers(rows, len(columns))
    lines = [[" ".join(visible(cell(value)).split()) for value in row] for row in [columns, *rows[:PRINTED]]]
    wide = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    while wide and sum(wide) + 2 * len(wide) - 2 > WIDTH:
        least = [NARROW if i else 2 * NARROW for i in range(len(wide))]
        longest = max(range(len(wide)), key=lambda i: (not right[i] and wide[i] > least[i], wide[i]))
        if not right[longest] and wide[longest] > least[longest]:
            wide[longest] = max(least[longest], wide[longest] - (sum(wide) + 2 * len(wide) - 2 - WIDTH))
        elif len(wide) > 1:
            wide.pop()
        else:
            wide = [WIDTH]

    def fitting(text: str, width: int, number: bool) -> str:
        text = shortened(text, width)
        blank = " " * (width - cell_len(text))
        return blank + text if number else text + blank

    shown = [
        "  ".join(fitting(*each) for each in zip(line[: len(wide)], wide, right[: len(wide)], strict=True)).rstrip()
        for line in lines
    ]
    left = [(len(rows) - PRINTED, "row"), (len(columns) - len(wide), "column")]
    more = " and ".join(f"{count} more {what}{'s' if count > 1 else ''}" for count, what in left if count > 0)
    return "\n".join([*shown, f"{more}: to_csv() has all"] if more else shown)


def shortened(text: str, width: int) -> str:
    """A text in one line of so many cells of a terminal, of which some letters take two, cut at its end.

    Example:
        >>> shortened("one two", 7), shortened("one two", 5), shortened("日本語", 5)
        ('one two', 'one…', '日本…')
    """
    from rich.cells import cell_len, set_cell_size

    text = " ".join(text.split())
    return text if cell_len(text) <= width else f"{set_cell_size(text, width - 1).rstrip()}…"


def html_table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Well-formed, and without any colour, so that it is readable on a light and on a dark page.

    Example:
        >>> html_table("a < b", ["x"], [])
        '<table>\\n<caption>a &lt; b</caption>\\n<thead><tr><th style="text-align: left">x</th></tr></thead><tbody>\\n</tbody>\\n</table>'
    """
    right = _numbers(rows, len(columns))
    lines = ["<table>", f"<caption>{html.escape(visible(caption))}</caption>"]
    lines.append(f"<thead>{_html_row('th', columns, right)}</thead><tbody>")
    lines += [_html_row("td", row, right) for row in rows[:SHOWN]]
    lines.append("</tbody>")
    if len(rows) > SHOWN:
        more = f"and {len(rows) - SHOWN} more rows"
        lines.append(f'<tfoot><tr><td colspan="{len(columns)}">{more}</td></tr></tfoot>')
    return "\n".join([*lines, "</table>"])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """As GitHub's Markdown has tables.

    Example:
        >>> print(markdown_table(["name", "a|b"], [["x", 0.5]]))
        | name | a\\|b |
        | --- | ---: |
        | x | 0.5 |
        <BLANKLINE>
    """
    rules = ["---:" if right else "---" for right in _numbers(rows, len(columns))]
    return "\n".join([_markdown(columns), f"| {' | '.join(rules)} |", *map(_markdown, rows)]) + "\n"


def latex_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A tabular, which needs no package.

    Example:
        >>> print(latex_table(["name", "%"], [["a_b", 0.5]]))
        \\begin{tabular}{lr}
        \\hline
        name & \\% \\\\
        \\hline
        a\\_b & 0.5 \\\\
        \\hline
        \\end{tabular}
        <BLANKLINE>
    """
    kinds = "".join("r" if right else "l" for right in _numbers(rows, len(columns)))
    lines = [f"\\begin{{tabular}}{{{kinds}}}", "\\hline", _latex(columns), "\\hline"]
    return "\n".join([*lines, *map(_latex, rows), "\\hline", "\\end{tabular}"]) + "\n"


def _numbers(rows: Sequence[Sequence[Any]], columns: int) -> list[bool]:
    """Of each column, whether all in it are numbers, which stand to the right."""
    return [bool(rows) and _all_numbers(row[i] for row in rows) for i in range(columns)]


def visible(text: str) -> str:
    """A text in which what no page and no terminal may be given by strangers is the mark of what is lost: control
    characters, marks that turn the direction of writing, halves of pairs.

    Example:
        >>> visible("a\\x1b[31mb"), visible("one\\ntwo ü 字")
        ('a\ufffd[31mb', 'one\\ntwo ü 字')
    """
    return re.sub(HIDDEN, "\ufffd", text)


def _html_row(tag: str, row: Sequence[Any], sides: Sequence[bool]) -> str:
    cells = (
        f'<{tag} style="text-align: {"right" if right else "left"}">{html.escape(visible(cell(value)))}</{tag}>'
        for value, right in zip(row, sides, strict=True)
    )
    return f"<tr>{''.join(cells)}</tr>"


def _all_numbers(values: Iterable[Any]) -> bool:
    return all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values)


def _markdown(row: Sequence[Any]) -> str:
    """A row; what would be a mark of Markdown in it stands as it is."""
    cells = (re.sub(MARKS, r"\\\g<0>", " ".join(visible(cell(value)).split())) for value in row)
    return f"| {' | '.join(cells)} |"


def _latex(row: Sequence[Any]) -> str:
    text = " & ".join("".join(SPECIAL.get(mark, mark) for mark in visible(cell(value))) for value in row)
    return ("{}" if text.lstrip().startswith(("[", "*")) else "") + text + r" \\"  # else the row above takes it
