"""What is tried, and on how many windows."""

from __future__ import annotations

from typing import Any

VALIDATION_WINDOWS = 100  # per kind
TEST_WINDOWS = 300
ROUTER_WINDOWS = 500  # of the train split
RANKS = (4, 8, 16)
HIGHEST = 64  # the twins are built at this rank and cut; it is scored as well, to see what rank costs

BY_INPUTS = (8,)  # ranks at which the directions kept are chosen by inputs as well

SETTINGS = ("task given", "routed top-1", "routed soft")

GRIDS: dict[str, dict[str, list[Any]]] = {
    "average": {},
    "task_arithmetic": {"scale": [0.05, 0.1, 0.15, 0.2, 0.3, 0.4]},
    "ties": {"density": [0.1, 0.3, 0.6], "scale": [0.1, 0.2, 0.3, 0.4, 0.7, 1.0]},
    "tsv": {"scale": [0.1, 0.2, 0.3, 0.4, 0.7, 1.0]},
}
