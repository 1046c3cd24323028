"""Trimming by magnitude, exactly k entries of each expert: the passes that TIES and its kin run before they combine.

A method may have several thresholds for each expert, such as one above which entries are cut and one below which they
are: one set of passes finds them all. Threshold j of expert e is row e · J + j wherever something is kept for each
*row*; with one, rows are experts.

`methods/kit/threshold.py` finds the thresholds. Entries equal to one, the normal case for bfloat16, are counted tensor by
tensor in the same pass as long as the sample named the right value. In the one tensor where they run out they are
counted tile by tile.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from twinmerge.maths import select
from twinmerge.maths.fused import in_bracket, part
from twinmerge.maths.rule import Trim
from twinmerge.maths.select import Counts
from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Scope, T_co, Tile
from twinmerge.methods.kit.threshold import (
    LEVELS,
    Bracket,
    Coarse,
    Digits,
    Fine,
    Sketch,
    Threshold,
    TrimPass,
    Trims,
    counted_before,
    known_threshold,
    place,
    repeated,
)
from twinmerge.store.header import SIZES

if TYPE_CHECKING:
    from torch import Tensor

ALL = 1 << 62  # room for every entry that equals a threshold


def trim_passes(method: Trims, scope: Scope, sampled: bool = True) -> list[Pass[Any]]:
    """The passes that find every expert's threshold.

    Args:
        sampled: begin with a guess from a sample of the model; not where entries are only known in whole tensors.
    """
    exact: list[TrimPass[Any]] = [Coarse(method, scope), Fine(method, scope)]
    exact += [Digits(method, scope, level) for level in range(LEVELS)]
    exact += [TiesByTensor(method, scope)] * (scope == "model") + [TiesByTile(method, scope)]
    if not sampled:
        return list(exact)
    for step in exact:
        step.rare = True
    return [Sketch(method, scope), Bracket(method, scope), *exact]


class TiesPass(TrimPass[T_co]):
    """A count of the entries that equal the threshold."""

    rare = True

    def ties(self, tile: Tile, known: Known, block: int) -> list[Counts]:
        """How many equal that of each row, (rows,), of each block of so many entries; of the tile where that is 0."""
        threshold = known_threshold(known)
        stored = self.stored(tile)
        if stored is not None:  # float32, so that its own bits are the threshold's
            size, base = stored.experts[0].memory.nbytes // SIZES[stored.experts[0].code], stored.base
            each = len(threshold.bits) // len(stored.experts)

            def count(row: int, bits: int, start: int, stop: int) -> int:
                theirs = None if base is None else part(base, start, stop)
                return in_bracket(part(stored.experts[row // each], start, stop), theirs, bits, 1, [bits])[2][0]

            rows = list(enumerate(threshold.among(wide=False)))
            step = block or max(1, size)
            return [
                np.array([count(row, bits, at, min(at + step, size)) * some for row, (bits, some) in rows])
                for at in range(0, max(1, size) if not block else size, step)
            ]
        x = self.method.trimmed_quantity(tile, known).flatten(1)
        bits, some = map(np.array, zip(*threshold.among(x.itemsize == 8), strict=True))
        parts = x.split(block, 1) if block else [x]
        return [select.ties(repeated(part, len(bits)), bits) * some for part in parts if part.shape[1] or not block]


class TiesByTensor(TiesPass[dict[str, Counts]]):
    """How many entries of each tensor equal the threshold, where that is still to be counted."""

    name = "trim_ties"

    def wanted(self, known: Known) -> Collection[str] | None:
        threshold = known_threshold(known)
        return () if threshold.by_tensor is not None or not threshold.undecided else None

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {tile.at.name: self.ties(tile, known, 0)[0]}

    def finish(self, total: Partial, known: Known) -> dict[str, Counts]:
        return dict(total)


class Edge(NamedTuple):
    """Of one row: entries equal to its threshold are kept in all tensors before `tensor`, in name order, and there up
    to the first `rest` of them."""

    tensor: str
    rest: int


def edges(known: Known) -> dict[int, Edge]:
    """Where the equal entries run out, for every undecided row."""
    threshold = known_threshold(known)
    counts = threshold.by_tensor if threshold.by_tensor is not None else known.of(TiesByTensor)
    names = sorted(counts)
    places = {}
    for row in threshold.undecided:
        left = int(threshold.take[row])
        before = list(accumulate((int(counts[name][row]) for name in names), initial=0))
        at = next(i for i in range(len(names)) if before[i + 1] >= left)
        places[row] = Edge(names[at], left - before[at])
    return places


class TiesByTile(TiesPass[tuple[Mapping[str, tuple[int, ...]], Mapping[int, Edge]]]):
    """The same, block by block, in the tensors where they run out; a tile that is merged lies in one block."""

    name = "trim_ties_by_tile"

    def wanted(self, known: Known) -> Collection[str] | None:
        threshold = known_threshold(known)
        if not threshold.undecided:
            return ()
        if self.scope == "tensor":
            return None if threshold.before is None else ()
        return {edge.tensor for edge in edges(known).values()}

    def observe(self, tile: Tile, known: Known) -> Partial:
        # numbers, not arrays: thousands of small ones that stay would break up the memory of the large ones that go
        return {place(tile.at, i * BLOCK): tuple(n.tolist()) for i, n in enumerate(self.ties(tile, known, BLOCK))}

    def finish(self, total: Partial, known: Known) -> tuple[Mapping[str, tuple[int, ...]], Mapping[int, Edge]]:
        """`counted_before` of the equal entries; and the edges."""
        if self.scope == "model":
            return counted_before(total), edges(known)
        tensor = next(iter(total)).partition("\0")[0]
        return counted_before(total), _edges_of_a_tensor(tensor, known_threshold(known))


def _edges_of_a_tensor(tensor: str, threshold: Threshold) -> dict[int, Edge]:
    """The same where every tensor has a threshold of its own."""
    return {row: Edge(tensor, int(threshold.take[row])) for row in threshold.undecided}


def room(at: Place, known: Known) -> list[int]:
    """For each row: how many of the entries there that equal its threshold are kept."""
    threshold = known_threshold(known)
    rooms = [ALL if take else 0 for take in threshold.take.tolist()]
    if threshold.undecided:
        before, places = known.maybe(TiesByTile) or (threshold.before or {}, _edges_of_a_tensor(at.name, threshold))
        for row, edge in places.items():
            if at.name == edge.tensor:
                rooms[row] = max(0, edge.rest - before[place(at)][row])
            elif at.name > edge.tensor:
                rooms[row] = 0
    return rooms


def trimmed(x: Tensor, tile: Tile, known: Known, keep_all_equal: bool = False, threshold: int = 0) -> Tensor:
    """The stack with all but the kept entries at zero.

    Args:
        x: (experts, *tile), what is trimmed.
        keep_all_equal: keep every entry that equals the threshold.
        threshold: which of each expert's; what one keeps and another does not is the difference of both.
    """
    import torch

    rows = _kept(tile.at, known, keep_all_equal, x.dtype == torch.float64)
    each = len(rows) // len(x)
    out = torch.empty_like(x)
    for row, to, (bits, left) in zip(x, out, rows[threshold::each], strict=True):
        select.keep_above(row, bits, left, to)
    return out


def trim_rule(at: Place, known: Known, keep_all_equal: bool = False, threshold: int = 0) -> Trim:
    """`trimmed` as data; the compiled library has float32 entries."""
    rows = _kept(at, known, keep_all_equal, wide=False)
    each = max(1, len(rows) // len(at.experts))  # or one for all experts together
    thresholds, rooms = zip(*rows[threshold::each], strict=True)
    return Trim(thresholds, rooms)


def _kept(at: Place, known: Known, keep_all_equal: bool, wide: bool) -> list[tuple[int, int]]:
    """For each row the bits of its threshold among entries of float64 or float32, and how many that equal it are
    kept."""
    threshold = known_threshold(known)
    rooms = [ALL] * len(threshold.bits) if keep_all_equal else room(at, known)
    return [(bits, left * some) for (bits, some), left in zip(threshold.among(wide), rooms, strict=True)]
