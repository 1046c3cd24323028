"""What the parts share: rows, ranks, and how a router is fitted."""

from __future__ import annotations

from typing import Any

from twinmerge.twin.twin import Twin

VALIDATION_ROWS = 200

ROUTER_ROWS = 3000

WEIGHED_BY = 300

FIRST = 64  # the rank that budgets choose from


def fit(twin: Twin, suite: Any, layers: tuple[int, ...], names: list[str], kind: str = "logistic") -> None:
    twin.fit_router({n: suite[n].rows("train", ROUTER_ROWS) for n in names}, kind, layers=layers, progress=False)
