"""What the parts share: rows, ranks, and how a router is fitted."""

from __future__ import annotations

from typing import Any

from twinmerge.twin.twin import Twin

VALIDATION_ROWS = 200

ROUTER_ROWS = 3000
REFUSE = 0.005  # which takes 995 rows of a task

WEIGHED_BY = 300

FIRST = 64  # the rank that budgets choose from


def fit(twin: Twin, suite: Any, layers: tuple[int, ...], names: list[str], kind: str = "logistic") -> None:
    inputs = {n: suite[n].rows("train", ROUTER_ROWS) for n in names}
    twin.fit_router(inputs, kind, layers=layers, refuse=REFUSE, progress=False)
