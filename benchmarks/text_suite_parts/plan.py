"""What is tried, and on how many rows."""

from __future__ import annotations

from typing import Any

VALIDATION_ROWS = 200  # per task; hyper-parameters are chosen on these and on nothing else

ROUTER_ROWS = 500  # per task, of the train split

RANKS = (1, 2, 4, 8, 16)

GOOD_ENOUGH = 99.0  # the rank chosen is the smallest whose validation score, task given, reaches this

TIMED_ROWS = 400

GRIDS: dict[str, dict[str, list[Any]]] = {
    "average": {},
    "task_arithmetic": {"scale": [0.1, 0.2, 0.3, 0.4]},
    "ties": {"density": [0.1, 0.2], "scale": [1.0, 1.5]},
    "dare": {"density": [0.5, 0.9], "scale": [0.15, 0.25]},
    "dare_ties": {"density": [0.5, 0.9], "scale": [0.7, 1.0]},
    "tsv": {"scale": [0.7, 1.0, 1.3]},
}
