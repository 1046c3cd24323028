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
from twinmerge.models.rows import batch_size
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
        break_even: tokens of one mixture above which folding takes fewer operations.
        folded_bytes: what dense weights of one mixture take.
    """

    rows: int
    positions: int
    mixtures: int
    chosen: str
    predicted: dict[str, float]
    measured: dict[str, float]
    shared: float
    break_even: float
    folded_bytes: int

    def _summary(self) -> str:
        what = f"{self.rows} rows of {self.positions}, {self.mixtures} mixtures"
        return f"{what}, {self.chosen} is chosen, {1000 * self.predicted.get(self.chosen, self.shared):.1f} ms"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        ways = [(name, self.predicted[name], self.measured.get(name), name == self.chosen) for name in self.predicted]
        return ("way", "predicted seconds", "measured seconds", "chosen"), ways

    def __str__(self) -> str:
        what = "mixture" if self.mixtures == 1 else "mixtures"
        lines = [
            f"{self.rows} rows of {self.positions} positions, {self.mixtures} {what}; the shared model alone takes "
            f"{1000 * self.shared:.1f} ms",
            f"{'way':10s} {'predicted':>12s} {'measured':>12s} {'of shared':>10s}",
        ]
        for name in self.predicted:
            mark = " <- chosen" if name == self.chosen else ""
            took = self.measured.get(name)
            measured = "-" if took is None else f"{1000 * took:.1f} ms"
            ratio = "-" if took is None else f"{took / self.shared:.2f}"
            lines.append(f"{name:10s} {1000 * self.predicted[name]:9.1f} ms {measured:>12s} {ratio:>10s}{mark}")
        lines.append(
            f"folding takes fewer operations than mixing above {self.break_even:.0f} tokens of one mixture, and "
            f"{self.folded_bytes / 1e6:.0f} MB"
        )
        return "\n".join(lines)


@torch.no_grad()
def explain(core: Core, batch: Any, measure: bool, repeats: int, choice: Mapping[str, Any]) -> Explanation:
    """See `Twin.explain`."""
    at_least_one("repeats", repeats)
    weights = mixtures_for(core, batch, choice)
    with core.lock:
        return _explained(core, batch, weights, measure, repeats)


def _explained(core: Core, batch: Mapping[str, Any], weights: Tensor, measure: bool, repeats: int) -> Explanation:
    reorder = not keeps_order(core, batch)
    positions = positions_of(core, batch)
    blind = core.runtime.look_at(batch) if bool(weights.any()) else None
    chosen = core.planner.choose(weights, positions, reorder=reorder, blind=blind)
    heads = [next(iter(core.model.head_specs))] * batch_size(batch) if core.model.head_specs else None
    predicted = core.planner.predict(weights, positions, reorder=reorder, blind=blind) if weights.any() else {}
    ways: dict[str, Tensor] = {"shared": torch.zeros_like(weights)}
    if measure:
        ways |= dict.fromkeys(predicted, weights)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first of each warms up
        for name, own in ways.items():
            core.runtime.forget()
            start = time.perf_counter()
            answer(core, batch, heads, own, "stacked" if name == "shared" else name)
            if core.planner.device.type == "cuda":
                torch.cuda.synchronize(core.planner.device)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    shared = medians.pop("shared")
    distinct = len(weights.unique(dim=0))
    made = {id(part): place for place, part in core.runtime.places}
    size = sum(getattr(p.module, p.attribute).numel() * core.planner.size for p in made.values())
    return Explanation(
        len(weights), positions, distinct, chosen, predicted, medians, shared, core.planner.break_even(), size
    )
