"""Thresholds of a trim by magnitude: the passes that find the k-th largest |x| of each expert, exactly.

Over the whole model the inputs are read once and a bit: a small sample brackets each expert's threshold, one pass
counts what is above the bracket and what lies inside it, and the threshold follows exactly. Where the bracket misses,
two histograms of 65,536 bins find it; where a tile is float64 there is no bracket, and four of them do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from twinmerge.maths import select
from twinmerge.maths.fused import Values, available
from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Scope, T_co, Tile
from twinmerge.store.header import SIZES

LEVELS = 4  # of 16 bits in a float64
Wide = Literal["wide"]
WIDE: Wide = "wide"
"""What a pass finds that saw float64: then `Digits` find the threshold."""


class Trims(Protocol):
    """What the passes need to know of a method."""

    @property
    def trims_stored(self) -> bool:
        """Whether what is trimmed is the stored values' own difference from the base."""

    @property
    def counts_zeros(self) -> bool:
        """Whether entries that are 0 are among those that are counted."""

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """What is trimmed, (experts, *tile) in the dtype of `tile.x`."""

    def keep_counts(self, totals: Tensor) -> Tensor:
        """k of each expert out of its number of entries that are counted, (experts,); with several thresholds
        (experts, thresholds)."""


class Threshold(NamedTuple):
    """bits: (rows,) those of the k-th largest |x|; take: how many of the entries equal to it are kept; equal: how
    many there are; by_tensor: tensor -> (rows,) how many there are in it, None where that was not counted; before: of a
    trim by tensor the same by block (see `TiesByTile`); wide: the bits are those of float64."""

    bits: Tensor
    take: Tensor
    equal: Tensor
    by_tensor: Mapping[str, Tensor] | None
    before: Mapping[str, tuple[int, ...]] | None = None
    wide: bool = False

    def among(self, dtype: torch.dtype) -> list[tuple[int, bool]]:
        """For each row its bits among numbers of a dtype, and whether some of them can equal it."""
        bits = self.bits.tolist()
        return [select.narrowed(b) if self.wide and dtype == torch.float32 else (b, True) for b in bits]

    @property
    def undecided(self) -> list[int]:
        """The rows that keep some of the equal entries, and not all."""
        some = (self.take > 0) & (self.take < self.equal)
        return [int(e) for e in some.nonzero()[:, 0]]


def found(known: Known) -> Threshold | None:
    """The threshold, as soon as a pass has it."""
    bracketed, level = known.maybe(Bracket), known.get(digits(LEVELS - 1))
    if level is not None:
        never = select.never(torch.float64)
        bits = level.bits.where(level.bits >= 0, never)  # all bits set where nothing is kept
        return Threshold(bits, level.take, torch.where(level.take > 0, level.equal, 0), None, wide=True)
    return (None if bracketed == WIDE else bracketed) or known.maybe(Fine)


def is_wide(known: Known) -> bool:
    """Whether float64 was seen among what is trimmed."""
    return any(known.get(step.name) == WIDE for step in (Sketch, Bracket, Coarse))


class TrimPass(Pass[T_co]):
    """A pass over what a method trims, of all its tensors or of each."""

    def __init__(self, method: Trims, scope: Scope) -> None:
        self.method, self.scope = method, scope

    def counted(self, x: Tensor) -> Tensor:
        """How many entries of each expert are counted, of its values or their bits: (experts,)."""
        if self.method.counts_zeros:
            return torch.full((len(x),), x[0].numel())
        return torch.tensor([np.count_nonzero(row) for row in x.flatten(1).cpu().numpy()])


def _bracket(known: Known) -> select.Bracket:
    """What the sample gave; `Bracket` is wanted only where it gave one."""
    bracket = known.of(Sketch)
    assert bracket is not None and bracket != WIDE
    return bracket


class Sketch(TrimPass[select.Bracket | Wide | None]):
    """A sample of |x|: a bracket that very likely holds the threshold, and the values in it that many entries share."""

    name = "trim_sketch"
    sampled = True

    def observe(self, tile: Tile, known: Known) -> Partial:
        x = self.method.trimmed_quantity(tile, known)
        return {WIDE: 1} if x.dtype == torch.float64 else {place(tile.at): select.magnitude_bits(x)}

    def finish(self, total: Partial, known: Known) -> select.Bracket | Wide | None:
        if WIDE in total:
            return WIDE
        bits = torch.cat([total[key] for key in sorted(total)], 1) if total else torch.empty(1, 0)
        size = bits.shape[1]
        if not size:
            return None
        ranks = self.method.keep_counts(self.counted(bits))
        bits, ranks = repeated(bits, ranks.numel()), ranks.flatten()
        if self.scope == "model":
            return select.bracket(bits, ranks)
        found = select.bracket(bits, ranks, select.ANY_WIDTH)  # what is inside is kept, not counted by value
        return None if found is None else found._replace(shift=torch.zeros_like(found.shift))


class Bracket(TrimPass[Threshold | Wide | None]):
    """How many entries are above the bracket, and a count of every value inside it: the threshold, exactly."""

    name = "trim_bracket"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if known.maybe(Sketch) not in (None, WIDE) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bracket = _bracket(known)
        if tile.stored is not None and self.method.trims_stored:
            base, stored = tile.stored.base, tile.stored.experts
            size, experts = stored[0].memory.nbytes // SIZES[stored[0].code], len(stored)
            sizes = torch.full((experts,), size)

            def look(row: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                reference = None if base is None else _part(base, start, stop)
                return select.in_bracket_stored(_part(stored[row // each], start, stop), reference, bracket, row)

        else:
            x = self.method.trimmed_quantity(tile, known).flatten(1)
            if x.dtype == torch.float64:  # which the sample has missed
                return {WIDE: 1}
            experts, size = x.shape
            sizes = self.counted(x)

            def look(row: int, start: int, stop: int) -> tuple[int, Tensor, list[int], int]:
                values = x[row // each, start:stop]
                if available() and x.device.type == "cpu":
                    own = Values(values.contiguous().view(torch.uint8).numpy(), "F32")
                    return select.in_bracket_stored(own, None, bracket, row)
                return select.in_bracket(values, bracket, row)

        count = len(bracket.low)
        each = count // experts
        step = max(1, size) if self.scope == "model" else BLOCK
        bins_of = torch.tensor([bracket.bins(row) for row in range(count)])
        part: Partial = {"bins": bins_of, "sizes": sizes}
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
        if self.scope == "tensor":
            keys = [place(tile.at, start) for start in range(0, max(1, size), step)]
            return part | {f"inside {row}": list(zip(keys, each, strict=True)) for row, each in enumerate(insides)}
        return part | {f"inside {row}": torch.cat(inside) for row, inside in enumerate(insides)}

    def add(self, total: Partial, part: Partial) -> None:
        if WIDE in part:
            total[WIDE] = 1
            return
        for row, size in enumerate(part.pop("bins").tolist()):
            inside = part.pop(f"inside {row}")
            if self.scope == "tensor":  # hundreds are under way: their counts would take more room than what is counted
                total.setdefault(f"inside {row}", []).extend((key, bins.cpu()) for key, bins in inside)
                continue
            inside = inside.cpu().long()
            counts = total.setdefault(f"counts {row}", torch.zeros(size, dtype=torch.int64))
            counts.index_add_(0, inside, torch.ones_like(inside))
        super().add(total, part)

    def finish(self, total: Partial, known: Known) -> Threshold | Wide | None:
        if WIDE in total:
            return WIDE
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
                values, counts = _tally([inside for _, inside in total[f"inside {row}"]], apart)
            else:
                values, counts = None, total[f"counts {row}"]
                for at, times in apart:
                    counts[at] += times
            if (low, k) == (select.never(torch.float32), 0):  # nothing is kept, neither here nor in the sample
                bits.append(low)
                take.append(0)
                equal.append(0)
                continue
            if not 1 <= k <= int(counts.sum()):
                return None
            at, some = (int(t) for t in select.locate(counts[None], k))
            bits.append(low + ((at if values is None else int(values[at])) << shift))
            take.append(some)
            equal.append(int(counts[at]))
        threshold = Threshold(torch.tensor(bits), torch.tensor(take), torch.tensor(equal), None)
        hits = [(bracket.shared[row] == threshold.bits[row]).nonzero()[:1, 0] for row in range(len(bits))]
        if self.scope == "tensor":
            by_block = {key: [0] * len(bits) for key in ties}
            for row in threshold.undecided:
                at = int(threshold.bits[row] - bracket.low[row]) >> int(bracket.shift[row])
                for key, inside in total[f"inside {row}"]:
                    by_block[key][row] = int(ties[key][row, hits[row][0]] if len(hits[row]) else (inside == at).sum())
            return threshold._replace(before=counted_before({key: tuple(counts) for key, counts in by_block.items()}))
        if all(len(hits[row]) for row in threshold.undecided):
            column = torch.stack([hit[0] if len(hit) else torch.tensor(0) for hit in hits])
            return threshold._replace(
                by_tensor={key: n.cpu().gather(1, column[:, None])[:, 0] for key, n in ties.items()}
            )
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


class Coarse(TrimPass[tuple[Tensor, Tensor] | Wide]):
    """Histogram of the high 16 bits of |x|: the bin that holds the threshold."""

    name = "trim_coarse"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None and not is_wide(known) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        x = self.method.trimmed_quantity(tile, known)
        if x.dtype == torch.float64:
            return {WIDE: 1}
        return {"counts": select.coarse(x), "sizes": self.counted(x)}

    def finish(self, total: Partial, known: Known) -> tuple[Tensor, Tensor] | Wide:
        if WIDE in total:
            return WIDE
        counts = total["counts"]
        ranks = self.method.keep_counts(total["sizes"]).flatten()
        return select.locate(repeated(counts, len(ranks)), ranks)


class Fine(TrimPass[Threshold]):
    """Histogram of the low 16 bits inside that bin: the threshold."""

    name = "trim_fine"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None and not is_wide(known) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bins, _ = _coarse(known)
        return {"counts": select.fine(repeated(self.method.trimmed_quantity(tile, known), len(bins)), bins)}

    def finish(self, total: Partial, known: Known) -> Threshold:
        bins, rest = _coarse(known)
        bits, take = select.pin(bins, total["counts"], rest)
        equal = total["counts"].gather(1, (bits & 0xFFFF)[:, None])[:, 0]
        return Threshold(bits, take, torch.where(take > 0, equal, 0), None)


def _coarse(known: Known) -> tuple[Tensor, Tensor]:
    found = known.of(Coarse)
    assert found != WIDE
    return found


class Level(NamedTuple):
    """The bits of each row's threshold that are known, and how many of the entries that have them are kept, or equal
    it."""

    bits: Tensor
    take: Tensor
    equal: Tensor


class Digits(TrimPass[Level]):
    """The threshold where some of it is float64, 16 bits at a time: a histogram for each; float32 is exact among
    them."""

    rare = True

    def __init__(self, method: Trims, scope: Scope, level: int) -> None:
        super().__init__(method, scope)
        self.level, self.name = level, digits(level)

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if is_wide(known) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        x = self.method.trimmed_quantity(tile, known).double()
        if not self.level:
            return {"counts": select.digits(x, 0), "sizes": self.counted(x)}
        higher: Level = known[digits(self.level - 1)]
        return {"counts": select.digits(repeated(x, len(higher.bits)), self.level, higher.bits)}

    def finish(self, total: Partial, known: Known) -> Level:
        counts = total["counts"]
        if self.level:
            before: Level = known[digits(self.level - 1)]
            higher, rest = before.bits, before.take
        else:
            rest = self.method.keep_counts(total["sizes"]).flatten()
            counts, higher = repeated(counts, len(rest)), torch.zeros_like(rest)
        bits, take = select.deeper(higher, counts, rest)
        return Level(bits, take, counts.gather(1, (bits & 0xFFFF)[:, None])[:, 0])


def digits(level: int) -> str:
    """The name of the pass that finds 16 of a float64 threshold's bits."""
    return f"trim_digits_{level}"


def counted_before(ties: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Block -> how many equal entries come before it in its tensor."""
    before: dict[str, tuple[int, ...]] = {}
    seen: dict[str, tuple[int, ...]] = {}
    for key in sorted(ties):
        tensor = key.partition("\0")[0]
        before[key] = seen.get(tensor, (0,) * len(ties[key]))
        seen[tensor] = tuple(a + b for a, b in zip(before[key], ties[key], strict=True))
    return before


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
