"""Trimming by magnitude, exactly k entries of each expert: the passes that TIES and its kin run before they combine.

Over the whole model the inputs are read once and a bit: a small sample brackets each expert's threshold, one pass counts
what is above the bracket and what lies inside it, and the threshold follows exactly. Where the bracket misses, two
histograms of 65,536 bins find it. Entries equal to a threshold, the normal case for bfloat16, are counted tensor by
tensor in the same pass as long as the sample named the right value, and tile by tile in the one tensor where they run out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from twinmerge.maths import select
from twinmerge.maths.fused import Trim, Values
from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Scope, Tile
from twinmerge.store.header import SIZES

ALL = 1 << 62  # room for every entry that equals a threshold


class Trims(Protocol):
    """What the passes need to know of a method."""

    @property
    def trims_stored(self) -> bool:
        """Whether what is trimmed is the stored values' own difference from the base."""

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """What is trimmed, (experts, *tile) float32."""

    def keep_counts(self, totals: Tensor) -> Tensor:
        """k of each expert out of its number of entries."""


class Threshold(NamedTuple):
    """bits: (experts,) those of the k-th largest |x|; take: how many of the entries equal to it are kept; equal: how
    many there are; by_tensor: tensor -> (experts,) how many there are in it, None where that was not counted; before: of a
    trim by tensor the same by block (see `TiesByTile`)."""

    bits: Tensor
    take: Tensor
    equal: Tensor
    by_tensor: Mapping[str, Tensor] | None
    before: Mapping[str, tuple[int, ...]] | None = None

    @property
    def undecided(self) -> list[int]:
        """The experts that keep some of the equal entries, and not all."""
        some = (self.take > 0) & (self.take < self.equal)
        return [int(e) for e in some.nonzero()[:, 0]]


def trim_passes(method: Trims, scope: Scope, sampled: bool = True) -> list[Pass]:
    """The passes that find every expert's threshold.

    Args:
        sampled: begin with a guess from a sample of the model; not where entries are only known in whole tensors.
    """
    exact = [Coarse(method, scope), Fine(method, scope), TiesByTile(method, scope)]
    if scope == "model":
        exact.insert(2, TiesByTensor(method, scope))
    if not sampled:
        return list(exact)
    for step in exact:
        step.rare = True
    return [Sketch(method, scope), Bracket(method, scope), *exact]


def found(known: Known) -> Threshold | None:
    """The threshold, as soon as a pass has it."""
    threshold: Threshold | None = known.get(Bracket.name) or known.get(Fine.name)
    return threshold


class _TrimPass(Pass):
    def __init__(self, method: Trims, scope: Scope) -> None:
        self.method, self.scope = method, scope


class Sketch(_TrimPass):
    """A sample of |x|: a bracket that very likely holds the threshold, and the values in it that many entries share."""

    name = "trim_sketch"
    sampled = True

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {place(tile.at): select.magnitude_bits(self.method.trimmed_quantity(tile, known))}

    def finish(self, total: Partial, known: Known) -> object:
        bits = torch.cat([total[key] for key in sorted(total)], 1) if total else torch.empty(1, 0)
        size = bits.shape[1]
        if not size:
            return None
        ranks = self.method.keep_counts(torch.full((len(bits),), size))
        if self.scope == "model":
            return select.bracket(bits, ranks)
        found = select.bracket(bits, ranks, select.ANY_WIDTH)  # what is inside is kept, not counted by value
        return None if found is None else found._replace(shift=torch.zeros_like(found.shift))


class Bracket(_TrimPass):
    """How many entries are above the bracket, and a count of every value inside it: the threshold, exactly."""

    name = "trim_bracket"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if known.get(Sketch.name) is not None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bracket: select.Bracket = known[Sketch.name]
        if tile.stored is not None and self.method.trims_stored:
            base, rows = tile.stored.base, tile.stored.experts
            size = rows[0].memory.nbytes // SIZES[rows[0].code]

            def look(e: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                reference = None if base is None else _part(base, start, stop)
                return select.in_bracket_stored(_part(rows[e], start, stop), reference, bracket, e)

            count = len(rows)
        else:
            x = self.method.trimmed_quantity(tile, known).flatten(1)
            size, count = x.shape[1], len(x)

            def look(e: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                return select.in_bracket(x[e, start:stop], bracket, e)

        step = max(1, size) if self.scope == "model" else BLOCK
        part: Partial = {"bins": torch.tensor([bracket.bins(e) for e in range(count)]), "size": torch.tensor(size)}
        part |= {"above": torch.zeros(count, dtype=torch.int64), "between": torch.zeros(count, dtype=torch.int64)}
        insides: list[list[Tensor]] = [[] for _ in range(count)]
        for start in range(0, max(1, size), step):
            above, bins, ties, between = zip(
                *(look(e, start, min(start + step, size)) for e in range(count)), strict=True
            )
            part["above"] += torch.tensor(above)
            part["between"] += torch.tensor(between)
            if self.scope == "model":
                part[f"ties {tile.at.name}"] = torch.tensor(ties)
            else:  # numbers, as in `TiesByTile`
                part[f"ties {place(tile.at, start)}"] = tuple(map(tuple, ties))
            for e, inside in enumerate(bins):
                insides[e].append(inside)
        return part | {f"inside {e}": torch.cat(inside) for e, inside in enumerate(insides)}

    def add(self, total: Partial, part: Partial) -> None:
        for e, size in enumerate(part.pop("bins").tolist()):
            inside = part.pop(f"inside {e}").cpu()
            if self.scope == "tensor":  # hundreds are under way: their counts would take more room than what is counted
                total.setdefault(f"inside {e}", []).append(inside)
                continue
            inside = inside.long()
            counts = total.setdefault(f"counts {e}", torch.zeros(size, dtype=torch.int64))
            counts.index_add_(0, inside, torch.ones_like(inside))
        super().add(total, part)

    def finish(self, total: Partial, known: Known) -> object:
        bracket: select.Bracket = known[Sketch.name]
        if total["between"].any():
            return None
        ties = {key.removeprefix("ties "): torch.as_tensor(n) for key, n in total.items() if key.startswith("ties ")}
        shared = sum(ties.values(), torch.zeros(1, dtype=torch.int64))
        rest = self.method.keep_counts(total["size"].expand(len(total["above"]))).cpu() - total["above"]
        bits, take, equal = [], [], []
        for e, k in enumerate(rest.tolist()):
            low, shift = int(bracket.low[e]), int(bracket.shift[e])
            pairs = zip(bracket.shared[e].tolist(), shared[e].tolist(), strict=True)
            apart = [(value - low >> shift, times) for value, times in pairs if value >= 0]
            if self.scope == "tensor":
                values, counts = _tally(total[f"inside {e}"], apart)
            else:
                values, counts = None, total[f"counts {e}"]
                for at, times in apart:
                    counts[at] += times
            if not 1 <= k <= int(counts.sum()):
                return None
            at, some = (int(t) for t in select.locate(counts[None], k))
            bits.append(low + ((at if values is None else int(values[at])) << shift))
            take.append(some)
            equal.append(int(counts[at]))
        threshold = Threshold(torch.tensor(bits), torch.tensor(take), torch.tensor(equal), None)
        hits = [(bracket.shared[e] == threshold.bits[e]).nonzero()[:1, 0] for e in range(len(bits))]
        if all(len(hits[e]) for e in threshold.undecided):
            column = torch.stack([hit[0] if len(hit) else torch.tensor(0) for hit in hits])
            chosen = {key: n.cpu().gather(1, column[:, None])[:, 0] for key, n in ties.items()}
            if self.scope == "model":
                return threshold._replace(by_tensor=chosen)
            return threshold._replace(before=_before({key: tuple(n.tolist()) for key, n in chosen.items()}))
        return threshold


def _part(values: Values, start: int, stop: int) -> Values:
    size = SIZES[values.code]
    return Values(values.memory[start * size : stop * size], values.code)


def _tally(inside: list[Tensor], apart: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The values that are there, in order, and how often; `apart`: those that were counted by themselves."""
    values, counts = torch.unique(torch.cat(inside).long(), return_counts=True)
    values = torch.cat([values, torch.tensor([value for value, _ in apart], dtype=torch.int64)])
    counts = torch.cat([counts, torch.tensor([times for _, times in apart], dtype=torch.int64)])
    order = values.argsort()
    return values[order], counts[order]


class Coarse(_TrimPass):
    """Histogram of the high 16 bits of |x|: the bin that holds the threshold."""

    name = "trim_coarse"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"counts": select.coarse(self.method.trimmed_quantity(tile, known))}

    def finish(self, total: Partial, known: Known) -> object:
        counts = total["counts"]
        return select.locate(counts, self.method.keep_counts(counts.sum(1)))


class Fine(_TrimPass):
    """Histogram of the low 16 bits inside that bin: the threshold."""

    name = "trim_fine"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bins, _ = known[Coarse.name]
        return {"counts": select.fine(self.method.trimmed_quantity(tile, known), bins)}

    def finish(self, total: Partial, known: Known) -> object:
        bins, rest = known[Coarse.name]
        bits, take = select.pin(bins, total["counts"], rest)
        equal = total["counts"].gather(1, (bits & 0xFFFF)[:, None])[:, 0]
        return Threshold(bits, take, torch.where(take > 0, equal, 0), None)


class TiesByTensor(_TrimPass):
    """How many entries of each tensor equal the threshold, where that is still to be counted."""

    name = "trim_ties"

    def wanted(self, known: Known) -> Collection[str] | None:
        threshold = known_threshold(known)
        return () if threshold.by_tensor is not None or not threshold.undecided else None

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {tile.at.name: select.ties(self.method.trimmed_quantity(tile, known), known_threshold(known).bits)}

    def finish(self, total: Partial, known: Known) -> object:
        return dict(total)


class Edge(NamedTuple):
    """Of one expert: entries equal to its threshold are kept in all tensors before `tensor`, in name order, and there up
    to the first `rest` of them."""

    tensor: str
    rest: int


def edges(known: Known) -> dict[int, Edge]:
    """Where the equal entries run out, for every undecided expert."""
    threshold = known_threshold(known)
    counts = threshold.by_tensor if threshold.by_tensor is not None else known[TiesByTensor.name]
    names = sorted(counts)
    places = {}
    for e in threshold.undecided:
        left = int(threshold.take[e])
        before = list(accumulate((int(counts[name][e]) for name in names), initial=0))
        at = next(i for i in range(len(names)) if before[i + 1] >= left)
        places[e] = Edge(names[at], left - before[at])
    return places


class TiesByTile(_TrimPass):
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
        x, bits = self.method.trimmed_quantity(tile, known).flatten(1), known_threshold(known).bits
        blocks = range(0, x.shape[1], BLOCK)
        # numbers, not tensors: thousands of small tensors that stay would break up the memory of the large ones that go
        return {place(tile.at, at): tuple(select.ties(x[:, at : at + BLOCK], bits).tolist()) for at in blocks}

    def finish(self, total: Partial, known: Known) -> object:
        """`_before` of the equal entries; and the edges."""
        if self.scope == "model":
            return _before(total), edges(known)
        tensor = next(iter(total)).partition("\0")[0]
        return _before(total), _edges_of_a_tensor(tensor, known_threshold(known))


def _before(ties: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Block -> how many equal entries come before it in its tensor."""
    before: dict[str, tuple[int, ...]] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for key in sorted(ties):
        tensor = key.partition("\0")[0]
        before[key] = seen.get(tensor, (0,) * len(ties[key]))
        seen[tensor] = tuple(a + b for a, b in zip(before[key], ties[key], strict=True))
    return before


def _edges_of_a_tensor(tensor: str, threshold: Threshold) -> dict[int, Edge]:
    """The same where every tensor has a threshold of its own."""
    return {e: Edge(tensor, int(threshold.take[e])) for e in threshold.undecided}


def known_threshold(known: Known) -> Threshold:
    """The threshold; the engine runs the passes before anything needs it."""
    threshold = found(known)
    if threshold is None:
        raise AssertionError("the passes have not found a threshold")
    return threshold


def place(at: Place, further: int = 0) -> str:
    """A key of the elements there, or some further on, that sorts by tensor name, then by offset."""
    return f"{at.name}\0{at.offset + further:020d}"


def room(at: Place, known: Known) -> list[int]:
    """For each expert: how many of the entries there that equal its threshold are kept."""
    threshold = known_threshold(known)
    rooms = [ALL if take else 0 for take in threshold.take.tolist()]
    if threshold.undecided:
        if threshold.before is None:
            before, places = known[TiesByTile.name]
        else:
            before, places = threshold.before, _edges_of_a_tensor(at.name, threshold)
        for e, edge in places.items():
            if at.name == edge.tensor:
                rooms[e] = max(0, edge.rest - before[place(at)][e])
            elif at.name > edge.tensor:
                rooms[e] = 0
    return rooms


def trimmed(x: Tensor, tile: Tile, known: Known, keep_all_equal: bool = False) -> Tensor:
    """The stack with all but the kept entries at zero."""
    thresholds = known_threshold(known).bits.tolist()
    rooms = [ALL] * len(x) if keep_all_equal else room(tile.at, known)
    out = torch.empty_like(x)
    for row, to, bits, left in zip(x, out, thresholds, rooms, strict=True):
        select.keep_above(row, bits, left, to)
    return out


def trim_rule(at: Place, known: Known, keep_all_equal: bool = False) -> Trim:
    """`trimmed` as data."""
    thresholds = known_threshold(known).bits.tolist()
    rooms = [ALL] * len(thresholds) if keep_all_equal else room(at, known)
    return Trim(tuple(thresholds), tuple(rooms))
