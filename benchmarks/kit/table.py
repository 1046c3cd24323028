"""Cells of the tables."""

from __future__ import annotations

from collections.abc import Sequence


def shown(value: Sequence[float] | None, digits: int = 1) -> str:
    """A spread: median (lowest to highest); a dash where there is none."""
    return "–" if value is None else "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*value, d=digits)
