"""Text for people, in lines that the terminal has room for."""

from __future__ import annotations

import inspect
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

NARROW = 80  # where there is no terminal
ITEM = re.compile(r"(?:\d+\.|[-*•]) +")
_notes = True


def tell(text: str) -> None:
    """Print on stdout."""
    print(wrapped(text, width_of(sys.stdout)))  # noqa: T201


def tell_class(name: str, cls: type) -> None:
    """Print a name and what its class says of itself on stdout."""
    text = (inspect.getdoc(cls) or "").split("Example:")[0].strip()
    tell(f"{name}\n\n{filled(text, width_of(sys.stdout))}\n")


def said(text: str) -> None:
    """Print a note on stderr, so that stdout stays data; nothing where notes are not wanted."""
    if _notes:
        _print(text)


def say(text: str) -> None:
    """Print a warning or an error on stderr: one paragraph, whatever line ends a file's own error brought along."""
    _print(re.sub(r"\s*\n\s*", " ", text.strip()))


@contextmanager
def notes(wanted: bool) -> Iterator[None]:
    """Inside, notes are printed or not; warnings, errors and results are."""
    global _notes
    before, _notes = _notes, wanted
    try:
        yield
    finally:
        _notes = before


def _print(text: str) -> None:
    print(wrapped(text, width_of(sys.stderr)), file=sys.stderr)  # noqa: T201


def width_of(stream: TextIO) -> int:
    """Columns of the terminal that a stream is, or what the environment says."""
    given = os.environ.get("COLUMNS", "")
    if given.isdecimal() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(stream.fileno()).columns or NARROW
    except (OSError, ValueError, AttributeError):
        return NARROW


def wrapped(text: str, width: int) -> str:
    """The text with no line longer than that, but for words that are; what goes over begins below the line's own first
    word.

    Example:
        >>> print(wrapped("  to be or\\nnot to be", 8))
          to be
          or
        not to
        be
    """
    lines = []
    for line in text.split("\n"):
        first = re.match(r" *", line)
        indent = first[0] if first else ""
        lines += _within(line.strip(), width, indent, indent) if len(line) > width else [line]
    return "\n".join(lines)


def filled(text: str, width: int) -> str:
    """The paragraphs and lists of a docstring, filled anew.

    Example:
        >>> print(filled("To be or\\nnot to be.\\n\\n1. That is\\n   the question.", 14))
        To be or not
        to be.
        <BLANKLINE>
        1. That is the
           question.
    """
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        items: list[list[str]] = []
        for line in paragraph.split("\n"):
            if not items or ITEM.match(line.strip()) or re.match(r"[A-Z]\w+:", line):
                items.append([])
            items[-1].append(line.strip())
        for item in items:
            marker = ITEM.match(item[0])
            lines += _within(" ".join(item), width, "", " " * (len(marker[0]) if marker else 0))
        lines.append("")
    return "\n".join(lines[:-1])


def _within(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        max(width, 1),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first]
