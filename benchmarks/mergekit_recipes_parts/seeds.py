"""Methods with random masks: what both tools write over several seeds, in keep rate and in mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
Tensors = dict[str, Tensor]


@dataclass
class Moments:
    """Of the outputs of one tool over the seeds: sums, sums of squares, and entries that differ from the base."""

    count: int = 0
    total: Tensors = field(default_factory=dict)
    squares: Tensors = field(default_factory=dict)
    changed: int = 0
    entries: int = 0

    def add(self, output: Tensors, base: Tensors) -> None:
        """One more output."""
        self.count += 1
        for name, stored in output.items():
            value = stored.double()
            self.total[name] = self.total.get(name, 0) + value
            self.squares[name] = self.squares.get(name, 0) + value * value
            if name in base and base[name].shape == value.shape:
                self.changed += int((stored != base[name].to(stored.dtype)).sum())
                self.entries += value.numel()

    def variance(self, name: str) -> Tensor:
        """Of one seed's entries, estimated."""
        mean = self.total[name] / self.count
        return (self.squares[name] / self.count - mean * mean).clamp_min(0) * self.count / (self.count - 1)


def agreement(ours: Moments, theirs: Moments) -> dict[str, Any]:
    """How two tools agree.

    Returns:
        changed: the share of entries that are not the base's, of both; z: the root of the mean of ((m1 − m2)² / ((s1² +
        s2²) / n)) over all entries whose values vary, which is near 1 where the means differ by chance alone (for n seeds
        about √((n − 1) / (n − 2)), since s² is estimated); fixed: the largest difference of entries that no seed changes, in
        units in the last place of float32 of the tensor's largest number.
    """
    squares, count, fixed = 0.0, 0, 0.0
    for name in theirs.total:
        gap = ours.total[name] / ours.count - theirs.total[name] / theirs.count
        spread = (ours.variance(name) + theirs.variance(name)) / ours.count
        size = float(theirs.total[name].abs().max()) / theirs.count
        varies = spread > (1e-6 * size) ** 2
        squares += float((gap[varies] ** 2 / spread[varies]).sum())
        count += int(varies.sum())
        if bool((~varies).any()) and size:
            fixed = max(fixed, float(gap[~varies].abs().max()) / (size * 2.0**-23))
    return {
        "changed": [each.changed / max(1, each.entries) for each in (theirs, ours)],
        "z": math.sqrt(squares / count) if count else float("nan"),
        "by_chance": math.sqrt((ours.count - 1) / (ours.count - 2)) if ours.count > 2 else float("nan"),
        "varying": count,
        "fixed": fixed,
    }


def lines(rows: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    return [
        (
            row["recipe"],
            row["method"],
            str(row["seeds"]),
            " / ".join(f"{100 * share:.2f} %" for share in row["changed"]),
            "none drops (–)" if math.isnan(row["z"]) else f"{row['z']:.3f} ({row['by_chance']:.3f})",
            f"{row['fixed']:.2g}",
        )
        for row in rows
    ]


HEADS = [
    "recipe",
    "method",
    "seeds",
    "entries that change, both",
    "difference of the means (by chance)",
    "of the rest, ulp",
]
