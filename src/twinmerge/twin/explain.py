"""What each way of mixing a batch was expected to take, and what it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twinmerge.arguments import at_least_one
from twinmerge.results import Table
from twinmerge.twin.answer import answer, keeps_order, positions_of
from twinmerge.twin.core import Core
from twinmerge.twin.routing import mixtures_for


@dataclass(frozen=True, repr=False)
class Explanation(Table):
    """What each way of mixing a batch takes. As a table: a row for each way. Print it for all that was found.

    Attributes:
        rows: of the batch.
        positions: of each row.
        mixtures: how many different ones.
        chosen: by the planner.
        predicted: strategy -> seconds.
        measured: strategy -> seconds, the median of some passes, one of each way in turn; weights of `folded` made
            anew each time.
        shared: seconds of the shared model alone.
        break_even: tokens of one mixture above which folding takes fewer operations; None of a module of one's own,
            which has one way.
        folded_bytes: what dense weights of one mixture take.
    """

    rows: int
    positions: int
    mixtures: int
    chosen: str
    predicted: dict[str, float]
    measured: dict[str, float]
    shared: float
    break_even: float | None
    folded_bytes: int

    def _summary(self) -> str:
        what = f"{self.rows} rows of {self.positions}, {self.mixtures} mixtures"
        seconds = self.predicted.get(self.chosen, self.measured.get(self.chosen, self.shared))
        return f"{what}, {self.chosen} is chosen, {1000 * seconds:.1f} ms"

    def _ways(self) -> Sequence[str]:
        return list(self.predicted) or [self.chosen]

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        ways = [(n, self.predicted.get(n), self.measured.get(n), n == self.chosen) for n in self._ways()]
        return ("way", "predicted seconds", "measured seconds", "chosen"), ways

    def __str__(self) -> str:
        what = "mixture" if self.mixtures == 1 else "mixtures"
        lines = [
            f"{self.rows} rows of {self.positions} positions, {self.mixtures} {what}; the shared model alone takes "
            f"{1000 * self.shared:.1f} ms",
            f"{'way':10s} {'predicted':>12s} {'measured':>12s} {'of shared':>10s}",
        ]
        for name in self._ways():
            mark = " <- chosen" if name == self.chosen else ""
            expected, took = (_milliseconds(known.get(name)) for known in (self.predicted, self.measured))
            ratio = f"{self.measured[name] / self.shared:.2f}" if name in self.measured else "-"
            lines.append(f"{name:10s} {expected:>12s} {took:>12s} {ratio:>10s}{mark}")
        if self.break_even is None:
            lines.append(f"each mixture is a copy of the module with its own weights, {self.folded_bytes / 1e6:.0f} MB")
        else:
            lines.append(
                f"folding takes fewer operations than mixing above {self.break_even:.0f} tokens of one mixture, and "
                f"{self.folded_bytes / 1e6:.0f} MB"
            )
        return "\n".join(lines)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


@torch.no_grad()
def explain(core: Core, batch: Any, measure: bool, repeats: int, choice: Mapping[str, Any]) -> Explanation:
    """See `Twin.explain`."""
    at_least_one("repeats", repeats)
    weights = mixtures_for(core, batch, choice)
    with core.lock:
        return _explained(core, batch, weights, measure, repeats)


def _explained(core: Core, batch: Mapping[str, Any], weights: Tensor, measure: bool, repeats: int) -> Explanation:
    positions, distinct = positions_of(core, batch), len(weights.unique(dim=0))
    if core.fresh is not None:
        times = _times(core, batch, weights, ["rebuild"] if measure else [], repeats)
        size = sum(t.nbytes for t in core.model.body.state_dict().values())
        return Explanation(len(weights), positions, distinct, "rebuild", {}, times, times.pop("shared"), None, size)
    reorder = not keeps_order(core, batch)
    blind = core.runtime.look_at(batch) if bool(weights.any()) else None
    chosen = core.planner.choose(weights, positions, reorder=reorder, blind=blind)
    predicted = core.planner.predict(weights, positions, reorder=reorder, blind=blind) if weights.any() else {}
    times = _times(core, batch, weights, list(predicted) if measure else [], repeats)
    made = {id(part): place for place, part in core.runtime.places}
    size = sum(getattr(p.module, p.attribute).numel() * core.planner.size for p in made.values())
    even = core.planner.break_even()
    return Explanation(len(weights), positions, distinct, chosen, predicted, times, times.pop("shared"), even, size)


def _times(
    core: Core, batch: Mapping[str, Any], weights: Tensor, ways: Sequence[str], repeats: int
) -> dict[str, float]:
    """Way -> seconds that it takes, and those of the shared model alone."""
    heads = [next(iter(core.model.head_specs))] * core.rows(batch) if core.model.head_specs else None
    runs = {"shared": torch.zeros_like(weights)} | dict.fromkeys(ways, weights)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):  # the first of each warms up
        for name, own in runs.items():
            core.runtime.forget()
            start = time.perf_counter()
            answer(core, batch, heads, own, "stacked" if name == "shared" else name)
            if core.device.type == "cuda":
                torch.cuda.synchronize(core.device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[1:]) for name, t in times.items()}
