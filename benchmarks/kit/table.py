"""Tables in Markdown, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_RULES = {"l": "---", "r": "---:"}


def table(heads: Sequence[str], align: str, rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a table.

    align: a letter for each column, "l" or "r"; the last one stands for all that are left.
    """
    align = align.ljust(len(heads), align[-1])
    return [_line(heads), _line(_RULES[letter] for letter in align), *map(_line, rows)]


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def shown(spread: Sequence[float] | None, digits: int = 1) -> str:
    """A spread: median (lowest to highest); a dash where there is none."""
    return "–" if spread is None else "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*spread, d=digits)


def bounded(value_and_interval: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """A value [low, high]."""
    return "{:{s}.{d}f} [{:{s}.{d}f}, {:{s}.{d}f}]".format(*value_and_interval, d=digits, s=sign)


def settings(parameters: dict[str, object] | None) -> str:
    """Parameters as they stand beside a method's name."""
    return ", ".join(f"{name} {value}" for name, value in (parameters or {}).items())
