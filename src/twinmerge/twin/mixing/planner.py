"""Which way to mix a batch: a cost model of operations and bytes, with what this machine does of each measured once.

All ways compute the same function. `stacked`: every expert in use works on all rows at once. `grouped`: each expert
works on its own rows, which are brought together for the pass. `folded`: one mixture for all rows is added to the
weights first. `rebuild`: the same for each mixture of the batch, one after the other; the reference.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.errors import UsageError, nearest
from twinmerge.twin.mixing.kinds import multiplies
from twinmerge.twin.mixing.masked_modules import apart
from twinmerge.twin.mixing.mixture import Block, Mixture
from twinmerge.twin.mixing.parts import Low, Masks
from twinmerge.twin.mixing.runtime import Runtime

STRATEGIES = ("stacked", "grouped", "folded", "rebuild")
WORTH = 0.95  # a way that touches all weights must be predicted this much faster than one that touches none


class Machine(NamedTuple):
    """What a device does with a dtype: operations of a wide and of a thin product and bytes of memory, each in a
    second, and the seconds that a module's call and one more operation take."""

    wide: float
    thin: float
    bytes: float
    call: float
    operation: float


@cache
def probe(device: torch.device, dtype: torch.dtype, threads: int) -> Machine:
    """Measure a machine, in some 50 ms.

    Args:
        threads: only tells probes apart.
    """

    def seconds(run: Callable[[], Tensor]) -> float:
        """The least of some runs; the first warms up."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:])

    with torch.inference_mode():
        x = torch.ones(256, 768, dtype=dtype, device=device)
        w, a = x.new_ones(768, 768), x.new_ones(64, 768)
        y = x.new_ones(256, 768)
        big, one = x.new_ones(4096, 4096), x.new_ones(1, 4096)
        tiny, linear = x.new_ones(1, 8), nn.Linear(8, 8, device=device, dtype=dtype)
        wide = 2 * 256 * 768 * 768 / seconds(lambda: F.linear(x, w))
        thin = 2 * 2 * 256 * 64 * 768 / seconds(lambda: y.addmm_(F.linear(x, a), a))
        moved = big.numel() * big.element_size() / seconds(lambda: F.linear(one, big))
        call = seconds(lambda: _many(lambda: linear(tiny))) / 50
        operation = seconds(lambda: _many(lambda: tiny.mul_(1.0))) / 50
    return Machine(wide, thin, moved, call, operation)


def _many(run: Callable[[], Tensor]) -> Tensor:
    for _ in range(50):
        found = run()
    return found


class Site(NamedTuple):
    """A matrix that experts change: (out, in), the columns of each expert; lookup: rows are looked up, not
    multiplied."""

    shape: tuple[int, int]
    ends: tuple[int, ...]
    lookup: bool


class Planner:
    """The cost model of one twin."""

    def __init__(self, runtime: Runtime, body: nn.Module) -> None:
        self.runtime = runtime
        modules = [m for m in body.modules() if not any(True for _ in m.children())]
        self.calls = len(modules)
        self.multiplied = sum(
            p.numel() for m in modules if multiplies(m) for p in m.parameters(recurse=False) if p.dim() == 2
        )
        self._some = next(body.parameters())
        self.sites: Counter[Site] = Counter()  # how many there are of a kind
        self.masked: Counter[tuple[tuple[int, int], bool]] = (
            Counter()
        )  # ((out, in), lookup) of matrices that are masked
        self.small = 0  # norms and biases that experts change
        for place, part in runtime.places:
            if isinstance(part, Low):
                shape = (len(part.b), part.a.shape[1])
                self.sites[Site(shape, tuple(part.ends), not multiplies(place.module))] += 1
            elif isinstance(part, Masks):
                shape = (part.vector.shape[0], part.vector[0].numel())
                self.masked[shape, not multiplies(place.module)] += 1
            else:
                self.small += 1

    @property
    def device(self) -> torch.device:
        return self._some.device

    @property
    def dtype(self) -> torch.dtype:
        return self._some.dtype

    @property
    def machine(self) -> Machine:
        return probe(self.device, self.dtype, torch.get_num_threads())

    @property
    def folds_exactly(self) -> bool:
        """False where weights have too few bits for small changes."""
        return self.dtype in (torch.float32, torch.float64)

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    def base(self, tokens: int) -> float:
        """Seconds of the shared model alone: products or the bytes of their weights, whichever takes longer, and
        calls."""
        m = self.machine
        return max(2 * tokens * self.multiplied / m.wide, self.size * self.multiplied / m.bytes) + self.calls * m.call

    def mixing(self, blocks: Sequence[Block], positions: int) -> float:
        """Seconds that the experts' parts add to a pass."""
        m = self.machine
        seconds = self.small * 4 * m.operation
        for ((out, into), ends, lookup), times in self.sites.items():
            for block in blocks:
                columns = ends[block.experts.stop] - ends[block.experts.start]
                if not columns:
                    continue
                tokens = (block.rows.stop - block.rows.start) * positions
                work = 2 * tokens * columns * (into + (0 if lookup else out)) / m.thin
                moved = self.size * columns * (into + (tokens if lookup else out)) / m.bytes
                touched = self.size * tokens * 4 * columns / m.bytes
                seconds += times * (max(work, moved) + touched + 8 * m.operation)
        return seconds

    def adding(self, mixture: Mixture, positions: int) -> float:
        """Seconds that the experts add to a pass, whatever their parts are."""
        return self.mixing(mixture.blocks, positions) + (self.masking(mixture, positions) if self.masked else 0.0)

    def masking(self, mixture: Mixture, positions: int) -> float:
        """Seconds that masked experts add to a pass: making st mt ⊙ τ, and the products that go beyond the shared
        model's."""
        m, seconds = self.machine, 0.0
        own = apart(mixture, positions)
        blocks = [(b.rows.stop - b.rows.start, b.experts.stop - b.experts.start) for b in mixture.blocks]
        made = sum(len(s.used) for s in mixture.stretches) if own else sum(experts for _, experts in blocks)
        tokens = positions * sum(rows * experts for rows, experts in blocks)
        for ((out, into), lookup), times in self.masked.items():
            if lookup:
                seconds += times * (4 * self.size * tokens * into / m.bytes + 8 * made * m.operation)
            else:
                again = 0.0 if own else 2 * tokens * out * into / m.wide
                seconds += times * (made * self.making(out * into) + again)
        return seconds

    def making(self, numel: int) -> float:
        """Seconds to make W + w s m ⊙ τ for one expert: of what is read and written, τ, W and the sum are not in the
        cache."""
        return numel * (3 + 3 * self.size) / self.machine.bytes + 6 * self.machine.operation

    def folding(self, weights: Tensor) -> float:
        """Seconds that one mixture takes to become weights; none where it is at hand."""
        if self.runtime.is_folded(weights):
            return 0.0
        m = self.machine
        used = weights.nonzero()[:, 0].tolist()
        seconds = self.small * 2 * m.operation
        for ((out, into), ends, _), times in self.sites.items():
            columns = sum(ends[e + 1] - ends[e] for e in used)
            moved = (1 + 2 * len(used)) * self.size * out * into / m.bytes
            seconds += times * (2 * out * into * columns / m.thin + moved + 3 * len(used) * m.operation)
        for ((out, into), _), times in self.masked.items():
            seconds += times * len(used) * self.making(out * into)
        return seconds

    def break_even(self) -> float:
        """Tokens of one mixture above which folding takes fewer operations than mixing: dm / (d + m), whatever the
        rank; 0 for masks, whose mixing is no less work than folding."""
        products = [(shape, times) for (shape, _, lookup), times in self.sites.items() if not lookup]
        both = sum(times * (m + n) for (m, n), times in products)
        return sum(times * m * n for (m, n), times in products) / max(1, both)

    def possible(self, weights: Tensor, blind: str | None = None) -> list[str]:
        """The strategies that a batch allows.

        Args:
            blind: why it is not known how the model lays out this batch, where it is not.
        """
        uniform = bool((weights == weights[:1]).all())
        mixed = [] if blind or (self.runtime.refused and not uniform) else ["stacked", "grouped"]
        return [*mixed, *["folded"] * uniform, "rebuild"]

    def predict(
        self, weights: Tensor, positions: int, steps: int = 0, reorder: bool = True, blind: str | None = None
    ) -> dict[str, float]:
        """Strategy -> seconds, of those that are possible.

        Args:
            weights: (rows, experts).
            positions: of each row in the pass.
            steps: passes of one position more that follow (a generation).
            reorder: allow another order of the rows.
            blind: as in `possible`.
        """
        rows, possible = len(weights), self.possible(weights, blind)
        passes = self.base(rows * positions) + steps * self.base(rows)
        found: dict[str, float] = {}
        for strategy in [s for s in ("stacked", "grouped") if s in possible]:
            mixture = Mixture.of(weights, strategy == "grouped", reorder)
            added = self.adding(mixture, positions) + (steps * self.adding(mixture, 1) if steps else 0.0)
            found[strategy] = passes + added
        if "folded" in possible:
            found["folded"] = passes + self.folding(weights[0])
        if "rebuild" in possible:
            distinct, counts = weights.unique(dim=0, return_counts=True)
            found["rebuild"] = sum(
                self.folding(row) + self.base(count * positions) + steps * self.base(count)
                for row, count in zip(distinct, counts.tolist(), strict=True)
            )
        return found

    def choose(
        self,
        weights: Tensor,
        positions: int,
        steps: int = 0,
        reorder: bool = True,
        strategy: str = "auto",
        blind: str | None = None,
    ) -> str:
        """The strategy that is the fastest by the model, or the one that is asked for.

        In 16 bits only mixing is chosen by itself, since weights of 16 bits round small changes away.

        Raises:
            TwinmergeError: a strategy that is not known, or that this batch does not allow.
        """
        if strategy != "auto" and strategy not in STRATEGIES:
            kinds = ("auto", *STRATEGIES)
            raise UsageError(
                f"Unknown strategy {strategy!r}.{nearest(strategy, kinds)} Choose from {', '.join(kinds)}."
            )
        if not bool(weights.any()):  # the shared model alone
            return "stacked"
        possible = self.possible(weights, blind)
        refused = blind or next(iter(self.runtime.refused.values()), "")
        if strategy != "auto":
            if strategy not in possible:
                if strategy == "folded":
                    refused = "The rows have different mixtures, so they cannot share folded weights."
                raise UsageError(f'{refused} Say strategy="rebuild".')
            return strategy
        if not set(possible) - {"rebuild"}:
            raise UsageError(f'{refused} Give one mixture for the whole batch, or say strategy="rebuild".')
        predicted = self.predict(weights, positions, steps, reorder, blind)
        handicap = {s: 1.0 if s in ("stacked", "grouped") else 1 / WORTH for s in predicted}
        allowed = [s for s in predicted if self.folds_exactly or s in ("stacked", "grouped")] or list(predicted)
        return min(allowed, key=lambda s: predicted[s] * handicap[s])


def distinct_mixtures(weights: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(mixture (experts,), numbers of its rows), in the order of first appearance."""
    rows, which = weights.unique(dim=0, return_inverse=True)
    groups = [(row, (which == k).nonzero()[:, 0]) for k, row in enumerate(rows)]
    return sorted(groups, key=lambda g: int(g[1][0]))
