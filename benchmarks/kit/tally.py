"""Repeats in three numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> list[float]:
    """[median, lowest, highest]."""
    return [statistics.median(values), min(values), max(values)]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The spread of the ratios, repeat by repeat."""
    return spread([a / b for a, b in zip(above, below, strict=True)])
