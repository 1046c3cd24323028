"""Rows of scores.json with paired intervals over windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from generative_suite_parts.losses import Losses

DRAWS = 2000


class Tally:
    """Rows of scores.json, with paired bootstrap intervals over windows.

    A draw takes of each kind as many windows as there are, with replacement, the same ones for base, expert and method.
    """

    def __init__(self, base: Losses, experts: Losses) -> None:
        self.base, self.experts = base, experts
        self.rows: list[dict[str, Any]] = []
        self.kept: dict[str, NDArray[np.float64]] = {}  # method -> its draws, the value last
        self.best_static: str | None = None  # what later rows are compared with
        rng = np.random.default_rng(0)
        self.counts = {k: rng.multinomial(len(x), np.full(len(x), 1 / len(x)), DRAWS) / len(x) for k, x in base.items()}

    def add(self, method: str, setting: str, losses: Losses, **more: Any) -> None:
        per_kind, kept, gaps = {}, [], []
        for kind, own in losses.items():
            drawn = [self.counts[kind] @ x[kind] for x in (self.base, self.experts, losses)]
            base, expert, mine = (
                np.append(d, x.mean()) for d, x in zip(drawn, (self.base[kind], self.experts[kind], own), strict=True)
            )
            kept.append((base - mine) / (base - expert))  # the last entry is the value itself
            gaps.append(mine - expert)
            per_kind[kind] = {
                "loss": _interval(mine),
                "perplexity": float(np.exp(own.mean())),
                "gap": _interval(gaps[-1]),
                "kept": _interval(kept[-1]),
            }
        self.kept[method] = np.mean(kept, 0)
        row = {"method": method, "setting": setting, "kept": _interval(self.kept[method]), **more}
        if self.best_static is not None:
            row["above_best_static"] = _interval(self.kept[method] - self.kept[self.best_static])
        self.rows.append(row | {"gap": _interval(np.mean(gaps, 0)), "per_kind": per_kind})
        print(f"  {method:34s} {setting:14s} kept {100 * row['kept'][0]:6.1f} %", flush=True)


def _interval(draws_and_value: NDArray[np.float64]) -> list[float]:
    """[value, low, high]: the value stands last, the rest are its draws."""
    return [float(draws_and_value[-1]), *map(float, np.quantile(draws_and_value[:-1], [0.025, 0.975]))]
