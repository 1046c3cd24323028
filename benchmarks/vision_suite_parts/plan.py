"""What is tried, and on how many rows."""

from __future__ import annotations

VALIDATION_ROWS = 500  # per task; scales and densities are chosen on these and on nothing else

ROUTER_ROWS = 500  # per task, of the images that the experts were trained on

RANKS = (4, 8, 16)

SEEDS = {"train": 1, "validation": 2, "test": 3}  # of the turns, the corruptions and the choice of rows

GRIDS: dict[str, dict[str, list[float]]] = {
    "average": {},
    "task_arithmetic": {"scale": [0.1, 0.2, 0.3, 0.4, 0.5]},
    "ties": {"density": [0.1, 0.2, 0.4], "scale": [0.5, 1.0, 1.5]},
    "tsv": {"scale": [0.4, 0.7, 1.0, 1.3]},
}
