"""Scores of a suite's evaluations, as per cent of the experts' own: rows of a scores.json, and the table of the
settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kit.table import bounded
from twinmerge.study.scores import Evaluation

SETTINGS = ("task given", "head given", "nothing given, strict", "nothing given, lenient")

Row = dict[str, Any]


def setting_of(found: Evaluation) -> str:
    """What was given to the model, and how its answers are read."""
    return found.setting + (f", {found.reading}" if found.reading else "")


def row_of(found: Evaluation, experts: Evaluation) -> Row:
    """A row: the normalised score with its interval, beside the scores of the tasks."""
    interval = found.interval(experts)
    return {
        "setting": setting_of(found),
        "normalised": interval.value,
        "interval": [interval.low, interval.high],
        "per_task": found.scores,
        "routed_right": found.routed_right,
    }


class Tally:
    """Rows against the same experts, told as they come."""

    def __init__(self, experts: Evaluation) -> None:
        self.experts = experts
        self.rows: list[Row] = []

    def add(self, method: str, found: Evaluation, **more: Any) -> None:
        row = row_of(found, self.experts)
        self.rows.append({"method": method, **row, **more})
        print(f"  {method:28s} {row['setting']:24s} {score(row, 2)}", flush=True)


def score(row: Row | None, digits: int = 1) -> str:
    """A cell: the normalised score with its interval."""
    return "–" if row is None else bounded([row["normalised"], *row["interval"]], digits)


def by_method(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Method -> setting -> row, in the order in which they came."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["setting"]] = row
    return found
