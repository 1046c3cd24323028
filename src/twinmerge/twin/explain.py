"""What each way of mixing a batch was expected to take, and what it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twinmerge.models.headed import batch_size
from twinmerge.twin.answer import answer, keeps_order, positions_of

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin


@dataclass(frozen=True)
class Explanation:
    """rows, positions: of the batch; mixtures: how many different ones; chosen: by the planner; predicted, measured: strategy ->
    seconds (measured: the median of some passes, one of each way in turn; weights of `folded` made anew each time); shared:
    seconds of the shared model alone; break_even: tokens of one mixture above which folding takes fewer operations;
    folded_bytes: what dense weights of one mixture take."""

    rows: int
    positions: int
    mixtures: int
    chosen: str
    predicted: dict[str, float]
    measured: dict[str, float]
    shared: float
    break_even: float
    folded_bytes: int

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
            told = "-" if took is None else f"{1000 * took:.1f} ms"
            ratio = "-" if took is None else f"{took / self.shared:.2f}"
            lines.append(f"{name:10s} {1000 * self.predicted[name]:9.1f} ms {told:>12s} {ratio:>10s}{mark}")
        lines.append(
            f"folding takes fewer operations than mixing above {self.break_even:.0f} tokens of one mixture, and "
            f"{self.folded_bytes / 1e6:.0f} MB"
        )
        return "\n".join(lines)


@torch.no_grad()
def explain(twin: Twin, batch: Mapping[str, Any], weights: Tensor, measure: bool, repeats: int) -> Explanation:
    """See `Twin.explain`."""
    reorder = not keeps_order(twin, batch)
    positions = positions_of(twin, batch)
    blind = twin.runtime.look_at(batch) if bool(weights.any()) else None
    chosen = twin.planner.choose(weights, positions, reorder=reorder, blind=blind)
    heads = [next(iter(twin.model.head_specs))] * batch_size(batch) if twin.model.head_specs else None
    predicted = twin.planner.predict(weights, positions, reorder=reorder, blind=blind) if weights.any() else {}
    ways: dict[str, Tensor] = {"shared": torch.zeros_like(weights)}
    if measure:
        ways |= dict.fromkeys(predicted, weights)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):  # the first of each warms up
        for name, own in ways.items():
            twin.runtime.forget()
            start = time.perf_counter()
            answer(twin, batch, heads, own, "stacked" if name == "shared" else name)
            if twin.planner.device.type == "cuda":
                torch.cuda.synchronize(twin.planner.device)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    shared = medians.pop("shared")
    distinct = len(weights.unique(dim=0))
    made = {id(part): place for place, part in twin.runtime.places}
    size = sum(getattr(p.module, p.attribute).numel() * twin.planner.size for p in made.values())
    return Explanation(
        len(weights), positions, distinct, chosen, predicted, medians, shared, twin.planner.break_even(), size
    )
