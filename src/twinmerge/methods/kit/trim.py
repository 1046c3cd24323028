"""Trimming by magnitude, exactly k entries of each expert: the passes that TIES and its kin run before they combine.

A method may have several thresholds for each expert, such as one above which entries are cut and one below which they
are: one set of passes finds them all. Threshold j of expert e is row e · J + j wherever something is kept for each
*row*; with one, rows are experts.

Over the whole model the inputs are read once and a bit: a small sample brackets each expert's threshold, one pass
counts what is above the bracket and what lies inside it, and the threshold follows exactly. Where the bracket misses,
two histograms of 65,536 bins find it. Entries equal to a threshold, the normal case for bfloat16, are counted tensor
by tensor in the same pass as long as the sample named the right value. In the one tensor where they run out they are
counted tile by tile.

Longer than other files: the passes of one trim belong together.
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
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Scope, T_co, Tile
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
        """k of each expert out of its number of entries, (experts,); with several thresholds (experts, thresholds)."""


class Threshold(NamedTuple):
    """bits: (rows,) those of the k-th largest |x|; take: how many of the entries equal to it are kept; equal: how
    many there are; by_tensor: tensor -> (rows,) how many there are in it, None where that was not counted; before: of a
    trim by tensor the same by block (see `TiesByTile`)."""

    bits: Tensor
    take: Tensor
    equal: Tensor
    by_tensor: Mapping[str, Tensor] | None
    before: Mapping[str, tuple[int, ...]] | None = None

    @property
    def undecided(self) -> list[int]:
        """The rows that keep some of the equal entries, and not all."""
        some = (self.take > 0) & (self.take < self.equal)
        return [int(e) for e in some.nonzero()[:, 0]]


def trim_passes(method: Trims, scope: Scope, sampled: bool = True) -> list[Pass[Any]]:
    """The passes that find every expert's threshold.

    Args:
        sampled: begin with a guess from a sample of the model; not where entries are only known in whole tensors.
    """
    exact: list[_TrimPass[Any]] = [Coarse(method, scope), Fine(method, scope), TiesByTile(method, scope)]
    if scope == "model":
        exact.insert(2, TiesByTensor(method, scope))
    if not sampled:
        return list(exact)
    for step in exact:
        step.rare = True
    return [Sketch(method, scope), Bracket(method, scope), *exact]


def found(known: Known) -> Threshold | None:
    """The threshold, as soon as a pass has it."""
    return known.maybe(Bracket) or known.maybe(Fine)


class _TrimPass(Pass[T_co]):
    def __init__(self, method: Trims, scope: Scope) -> None:
        self.method, self.scope = method, scope


def _bracket(known: Known) -> select.Bracket:
    """What the sample gave; `Bracket` is wanted only where it gave one."""
    bracket = known.of(Sketch)
    assert bracket is not None
    return bracket


class Sketch(_TrimPass[select.Bracket | None]):
    """A sample of |x|: a bracket that very likely holds the threshold, and the values in it that many entries share."""

    name = "trim_sketch"
    sampled = True

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {place(tile.at): select.magnitude_bits(self.method.trimmed_quantity(tile, known))}

    def finish(self, total: Partial, known: Known) -> select.Bracket | None:
        bits = torch.cat([total[key] for key in sorted(total)], 1) if total else torch.empty(1, 0)
        size = bits.shape[1]
        if not size:
            return None
        ranks = self.method.keep_counts(torch.full((len(bits),), size))
        bits, ranks = repeated(bits, ranks.numel()), ranks.flatten()
        if self.scope == "model":
            return select.bracket(bits, ranks)
        found = select.bracket(bits, ranks, select.ANY_WIDTH)  # what is inside is kept, not counted by value
        return None if found is None else found._replace(shift=torch.zeros_like(found.shift))


class Bracket(_TrimPass[Threshold | None]):
    """How many entries are above the bracket, and a count of every value inside it: the threshold, exactly."""

    name = "trim_bracket"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if known.maybe(Sketch) is not None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bracket = _bracket(known)
        if tile.stored is not None and self.method.trims_stored:
            base, stored = tile.stored.base, tile.stored.experts
            size, experts = stored[0].memory.nbytes // SIZES[stored[0].code], len(stored)

            def look(row: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                reference = None if base is None else _part(base, start, stop)
                return select.in_bracket_stored(_part(stored[row // each], start, stop), reference, bracket, row)

        else:
            x = self.method.trimmed_quantity(tile, known).flatten(1)
            experts, size = x.shape

            def look(row: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                return select.in_bracket(x[row // each, start:stop], bracket, row)

        count = len(bracket.low)
        each = count // experts
        step = max(1, size) if self.scope == "model" else BLOCK
        bins_of = torch.tensor([bracket.bins(row) for row in range(count)])
        part: Partial = {"bins": bins_of, "sizes": torch.full((experts,), size)}
        part |= {"above": torch.zeros(count, dtype=torch.int64), "between": torch.zeros(count, dtype=torch.int64)}
        insides: list[list[Tensor]] = [[] for _ in range(count)]
        for start in range(0, max(1, size), step):
            above, bins, ties, between = zip(
                *(look(row, start, min(start + step, size)) for row in range(count)), strict=True
            )
            part["above"] += torch.tensor(above)
            part["between"] += torch.tensor(between)
            if self.scope == "model":
                part[f"ties {tile.at.name}"] = torch.tensor(ties)
            else:  # numbers, as in `TiesByTile`
                part[f"ties {place(tile.at, start)}"] = tuple(map(tuple, ties))
            for row, inside in enumerate(bins):
                insides[row].append(inside)
        return part | {f"inside {row}": torch.cat(inside) for row, inside in enumerate(insides)}

    def add(self, total: Partial, part: Partial) -> None:
        for row, size in enumerate(part.pop("bins").tolist()):
            inside = part.pop(f"inside {row}").cpu()
            if self.scope == "tensor":  # hundreds are under way: their counts would take more room than what is counted
                total.setdefault(f"inside {row}", []).append(inside)
                continue
            inside = inside.long()
            counts = total.setdefault(f"counts {row}", torch.zeros(size, dtype=torch.int64))
            counts.index_add_(0, inside, torch.ones_like(inside))
        super().add(total, part)

    def finish(self, total: Partial, known: Known) -> Threshold | None:
        bracket = _bracket(known)
        if total["between"].any():
            return None
        ties = {key.removeprefix("ties "): torch.as_tensor(n) for key, n in total.items() if key.startswith("ties ")}
        shared = sum(ties.values(), torch.zeros(1, dtype=torch.int64))
        rest = self.method.keep_counts(total["sizes"]).flatten().cpu() - total["above"]
        bits, take, equal = [], [], []
        for row, k in enumerate(rest.tolist()):
            low, shift = int(bracket.low[row]), int(bracket.shift[row])
            pairs = zip(bracket.shared[row].tolist(), shared[row].tolist(), strict=True)
            apart = [(value - low >> shift, times) for value, times in pairs if value >= 0]
            if self.scope == "tensor":
                values, counts = _tally(total[f"inside {row}"], apart)
            else:
                values, counts = None, total[f"counts {row}"]
                for at, times in apart:
                    counts[at] += times
            if not 1 <= k <= int(counts.sum()):
                return None
            at, some = (int(t) for t in select.locate(counts[None], k))
            bits.append(low + ((at if values is None else int(values[at])) << shift))
            take.append(some)
            equal.append(int(counts[at]))
        threshold = Threshold(torch.tensor(bits), torch.tensor(take), torch.tensor(equal), None)
        hits = [(bracket.shared[row] == threshold.bits[row]).nonzero()[:1, 0] for row in range(len(bits))]
        if all(len(hits[row]) for row in threshold.undecided):
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


class Coarse(_TrimPass[tuple[Tensor, Tensor]]):
    """Histogram of the high 16 bits of |x|: the bin that holds the threshold."""

    name = "trim_coarse"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"counts": select.coarse(self.method.trimmed_quantity(tile, known))}

    def finish(self, total: Partial, known: Known) -> tuple[Tensor, Tensor]:
        counts = total["counts"]
        ranks = self.method.keep_counts(counts.sum(1)).flatten()
        return select.locate(repeated(counts, len(ranks)), ranks)


class Fine(_TrimPass[Threshold]):
    """Histogram of the low 16 bits inside that bin: the threshold."""

    name = "trim_fine"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bins, _ = known.of(Coarse)
        return {"counts": select.fine(repeated(self.method.trimmed_quantity(tile, known), len(bins)), bins)}

    def finish(self, total: Partial, known: Known) -> Threshold:
        bins, rest = known.of(Coarse)
        bits, take = select.pin(bins, total["counts"], rest)
        equal = total["counts"].gather(1, (bits & 0xFFFF)[:, None])[:, 0]
        return Threshold(bits, take, torch.where(take > 0, equal, 0), None)


class TiesByTensor(_TrimPass[dict[str, Tensor]]):
    """How many entries of each tensor equal the threshold, where that is still to be counted."""

    name = "trim_ties"

    def wanted(self, known: Known) -> Collection[str] | None:
        threshold = known_threshold(known)
        return () if threshold.by_tensor is not None or not threshold.undecided else None

    def observe(self, tile: Tile, known: Known) -> Partial:
        bits = known_threshold(known).bits
        return {tile.at.name: select.ties(repeated(self.method.trimmed_quantity(tile, known), len(bits)), bits)}

    def finish(self, total: Partial, known: Known) -> dict[str, Tensor]:
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


class TiesByTile(_TrimPass[tuple[Mapping[str, tuple[int, ...]], Mapping[int, Edge]]]):
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
        bits = known_threshold(known).bits
        x = repeated(self.method.trimmed_quantity(tile, known).flatten(1), len(bits))
        blocks = range(0, x.shape[1], BLOCK)
        # numbers, not tensors: thousands of small tensors that stay would break up the memory of the large ones that go
        return {place(tile.at, at): tuple(select.ties(x[:, at : at + BLOCK], bits).tolist()) for at in blocks}

    def finish(self, total: Partial, known: Known) -> tuple[Mapping[str, tuple[int, ...]], Mapping[int, Edge]]:
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
    return {row: Edge(tensor, int(threshold.take[row])) for row in threshold.undecided}


def repeated(x: Tensor, rows: int) -> Tensor:
    """The stack with each expert as often as it has thresholds, (rows, ...).

    Example:
        >>> repeated(torch.tensor([[1.0], [2.0]]), 4).tolist()
        [[1.0], [1.0], [2.0], [2.0]]
    """
    return x if rows == len(x) else x.repeat_interleave(rows // max(1, len(x)), 0)


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
    thresholds = known_threshold(known).bits.tolist()
    rooms = [ALL] * len(thresholds) if keep_all_equal else room(tile.at, known)
    each = len(thresholds) // len(x)
    out = torch.empty_like(x)
    for row, to, bits, left in zip(x, out, thresholds[threshold::each], rooms[threshold::each], strict=True):
        select.keep_above(row, bits, left, to)
    return out


def trim_rule(at: Place, known: Known, keep_all_equal: bool = False) -> Trim:
    """`trimmed` as data, for one threshold of each expert."""
    thresholds = known_threshold(known).bits.tolist()
    rooms = [ALL] * len(thresholds) if keep_all_equal else room(at, known)
    return Trim(tuple(thresholds), tuple(rooms))
