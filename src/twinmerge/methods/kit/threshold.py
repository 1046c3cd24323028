"""Thresholds of a trim by magnitude: the passes that find the k-th largest |x| of each expert, exactly.

A small sample brackets each expert's threshold, and one pass counts what lies above and inside. Where the bracket
misses, two histograms of 65,536 bins find it; where a tile is float64 there is no bracket, and four of them do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from twinmerge.maths import select
from twinmerge.maths.fused import available, part, staged
from twinmerge.maths.rule import Rule, Values
from twinmerge.maths.select import Counts
from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Scope, Stored, T_co, Tile
from twinmerge.store.header import SIZES

if TYPE_CHECKING:  # tiles as they are stored need no torch
    from torch import Tensor

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

    def keep_counts(self, totals: Counts) -> Counts:
        """k of each expert out of its number of entries that are counted, (experts,); with several thresholds
        (experts, thresholds)."""


class Threshold(NamedTuple):
    """bits: (rows,) those of the k-th largest |x|; take: how many of the entries equal to it are kept; equal: how
    many there are; by_tensor: tensor -> (rows,) how many there are in it, None where that was not counted; before: of a
    trim by tensor the same by block (see `TiesByTile`); wide: the bits are those of float64."""

    bits: Counts
    take: Counts
    equal: Counts
    by_tensor: Mapping[str, Counts] | None
    before: Mapping[str, tuple[int, ...]] | None = None
    wide: bool = False

    def among(self, wide: bool) -> list[tuple[int, bool]]:
        """For each row its bits among numbers of float64 or float32, and whether some of them can equal it."""
        bits = self.bits.tolist()
        return [select.narrowed(b) if self.wide and not wide else (b, True) for b in bits]

    @property
    def undecided(self) -> list[int]:
        """The rows that keep some of the equal entries, and not all."""
        some = (self.take > 0) & (self.take < self.equal)
        return [int(e) for e in some.nonzero()[0]]


def found(known: Known) -> Threshold | None:
    """The threshold, as soon as a pass has it."""
    bracketed, level = known.maybe(Bracket), known.get(digits(LEVELS - 1))
    if level is not None:
        bits = np.where(level.bits >= 0, level.bits, select.never(wide=True))  # all bits set where nothing is kept
        return Threshold(bits, level.take, np.where(level.take > 0, level.equal, 0), None, wide=True)
    return (None if bracketed == WIDE else bracketed) or known.maybe(Fine)


def is_wide(known: Known) -> bool:
    """Whether float64 was seen among what is trimmed."""
    return any(known.get(step.name) == WIDE for step in (Sketch, Bracket, Coarse))


class TrimPass(Pass[T_co]):
    """A pass over what a method trims, of all its tensors or of each."""

    def __init__(self, method: Trims, scope: Scope) -> None:
        self.method, self.scope = method, scope

    def counted(self, x: Tensor | NDArray[Any]) -> Counts:
        """How many entries of each expert are counted, of its values or their bits: (experts,)."""
        rows = select.array(x).reshape(len(x), -1)
        if self.method.counts_zeros:
            return np.full(len(rows), rows.shape[1], np.int64)
        return np.array([np.count_nonzero(row) for row in rows], np.int64)

    def stored(self, tile: Tile) -> Stored | None:
        """The tile as it is stored, where that is all that must be known of it."""
        return tile.stored if self.method.trims_stored else None

    def values(self, tile: Tile, known: Known) -> Any:
        """What is trimmed, (experts, *tile): of NumPy where the compiled library makes it, else of torch."""
        stored = self.stored(tile)
        if stored is not None:
            each = Rule((1.0,) * len(stored.experts), deltas=stored.base is not None)
            x, sound = staged(each, stored.base, stored.experts)
            if sound:  # else the tile says whose numbers are none
                return x
        return self.method.trimmed_quantity(tile, known)


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
        x = self.values(tile, known)
        return {WIDE: 1} if x.itemsize == 8 else {place(tile.at): select.array(select.magnitude_bits(x))}

    def finish(self, total: Partial, known: Known) -> select.Bracket | Wide | None:
        if WIDE in total:
            return WIDE
        bits = np.concatenate([total[key] for key in sorted(total)], 1) if total else np.empty((1, 0), np.int32)
        size = bits.shape[1]
        if not size:
            return None
        ranks = self.method.keep_counts(self.counted(bits))
        bits, ranks = repeated(bits, ranks.size), ranks.reshape(-1)
        if self.scope == "model":
            return select.bracket(bits, ranks)
        found = select.bracket(bits, ranks, select.ANY_WIDTH)  # what is inside is kept, not counted by value
        return None if found is None else found._replace(shift=np.zeros_like(found.shift))


class Bracket(TrimPass[Threshold | Wide | None]):
    """How many entries are above the bracket, and a count of every value inside it: the threshold, exactly."""

    name = "trim_bracket"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if known.maybe(Sketch) not in (None, WIDE) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bracket = _bracket(known)
        stored = self.stored(tile)
        if stored is not None:
            base, values = stored.base, stored.experts
            size, experts = values[0].memory.nbytes // SIZES[values[0].code], len(values)
            sizes = np.full(experts, size, np.int64)

            def look(row: int, start: int, stop: int) -> tuple[int, NDArray[np.int32], list[int], int]:
                reference = None if base is None else part(base, start, stop)
                return select.in_bracket_stored(part(values[row // each], start, stop), reference, bracket, row)

        else:
            x = self.method.trimmed_quantity(tile, known).flatten(1)
            if x.itemsize == 8:  # which the sample has missed
                return {WIDE: 1}
            experts, size = x.shape
            sizes = self.counted(x)

            def look(row: int, start: int, stop: int) -> tuple[int, NDArray[np.int32], list[int], int]:
                own = x[row // each, start:stop]
                if available() and own.device.type == "cpu":
                    memory = own.contiguous().numpy().view(np.uint8)
                    return select.in_bracket_stored(Values(memory, "F32"), None, bracket, row)
                return select.in_bracket(own, bracket, row)

        count = len(bracket.low)
        each = count // experts
        step = max(1, size) if self.scope == "model" else BLOCK
        found: Partial = {"bins": np.array([bracket.bins(row) for row in range(count)]), "sizes": sizes}
        found |= {"above": np.zeros(count, np.int64), "between": np.zeros(count, np.int64)}
        insides: list[list[NDArray[np.int32]]] = [[] for _ in range(count)]
        for start in range(0, max(1, size), step):
            above, bins, ties, between = zip(
                *(look(row, start, min(start + step, size)) for row in range(count)), strict=True
            )
            found["above"] += np.array(above)
            found["between"] += np.array(between)
            if self.scope == "model":
                found[f"ties {tile.at.name}"] = np.array(ties)
            else:  # numbers, as in `TiesByTile`
                found[f"ties {place(tile.at, start)}"] = tuple(map(tuple, ties))
            for row, inside in enumerate(bins):
                insides[row].append(inside)
        if self.scope == "tensor":
            keys = [place(tile.at, start) for start in range(0, max(1, size), step)]
            return found | {f"inside {row}": list(zip(keys, each, strict=True)) for row, each in enumerate(insides)}
        return found | {f"inside {row}": np.concatenate(inside) for row, inside in enumerate(insides)}

    def add(self, total: Partial, part: Partial) -> None:
        if WIDE in part:
            total[WIDE] = 1
            return
        for row, size in enumerate(part.pop("bins").tolist()):
            inside = part.pop(f"inside {row}")
            if self.scope == "tensor":  # hundreds are under way: their counts would take more room than what is counted
                total.setdefault(f"inside {row}", []).extend(inside)
                continue
            np.add.at(total.setdefault(f"counts {row}", np.zeros(size, np.int64)), inside, 1)
        super().add(total, part)

    def finish(self, total: Partial, known: Known) -> Threshold | Wide | None:
        if WIDE in total:
            return WIDE
        bracket = _bracket(known)
        if total["between"].any():
            return None
        ties = {key.removeprefix("ties "): np.asarray(n) for key, n in total.items() if key.startswith("ties ")}
        shared = sum(ties.values(), np.zeros(1, np.int64))
        rest = self.method.keep_counts(total["sizes"]).reshape(-1) - total["above"]
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
            if (low, k) == (select.never(), 0):  # nothing is kept, neither here nor in the sample
                bits.append(low)
                take.append(0)
                equal.append(0)
                continue
            if not 1 <= k <= int(counts.sum()):
                return None
            at, some = (int(found[0]) for found in select.locate(counts[None], k))
            bits.append(low + ((at if values is None else int(values[at])) << shift))
            take.append(some)
            equal.append(int(counts[at]))
        threshold = Threshold(np.array(bits), np.array(take), np.array(equal), None)
        hits = [(bracket.shared[row] == threshold.bits[row]).nonzero()[0][:1] for row in range(len(bits))]
        if self.scope == "tensor":
            by_block = {key: [0] * len(bits) for key in ties}
            for row in threshold.undecided:
                at = int(threshold.bits[row] - bracket.low[row]) >> int(bracket.shift[row])
                for key, inside in total[f"inside {row}"]:
                    by_block[key][row] = int(
                        ties[key][row, hits[row][0]] if len(hits[row]) else np.count_nonzero(inside == at)
                    )
            return threshold._replace(before=counted_before({key: tuple(counts) for key, counts in by_block.items()}))
        if all(len(hits[row]) for row in threshold.undecided):
            columns = [int(hit[0]) if len(hit) else 0 for hit in hits]
            return threshold._replace(by_tensor={key: n[np.arange(len(columns)), columns] for key, n in ties.items()})
        return threshold


def _tally(inside: list[NDArray[np.int32]], apart: list[tuple[int, int]]) -> tuple[Counts, Counts]:
    """The values that are there, in order, and how often; `apart`: those that were counted by themselves."""
    values, counts = np.unique(np.concatenate(inside).astype(np.int64), return_counts=True)
    values = np.concatenate([values, np.array([value for value, _ in apart], np.int64)])
    counts = np.concatenate([counts, np.array([times for _, times in apart], np.int64)])
    order = values.argsort(kind="stable")
    return values[order], counts[order]


class Coarse(TrimPass[tuple[Counts, Counts] | Wide]):
    """Histogram of the high 16 bits of |x|: the bin that holds the threshold."""

    name = "trim_coarse"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None and not is_wide(known) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        x = self.values(tile, known)
        if x.itemsize == 8:
            return {WIDE: 1}
        return {"counts": select.coarse(x), "sizes": self.counted(x)}

    def finish(self, total: Partial, known: Known) -> tuple[Counts, Counts] | Wide:
        if WIDE in total:
            return WIDE
        counts = select.array(total["counts"])
        ranks = self.method.keep_counts(total["sizes"]).reshape(-1)
        return select.locate(repeated(counts, len(ranks)), ranks)


class Fine(TrimPass[Threshold]):
    """Histogram of the low 16 bits inside that bin: the threshold."""

    name = "trim_fine"

    def wanted(self, known: Known) -> Collection[str] | None:
        return None if found(known) is None and not is_wide(known) else ()

    def observe(self, tile: Tile, known: Known) -> Partial:
        bins, _ = _coarse(known)
        return {"counts": select.fine(repeated(self.values(tile, known), len(bins)), bins)}

    def finish(self, total: Partial, known: Known) -> Threshold:
        bins, rest = _coarse(known)
        counts = select.array(total["counts"])
        bits, take = select.pin(bins, counts, rest)
        equal = counts[np.arange(len(bits)), bits & 0xFFFF]
        return Threshold(bits, take, np.where(take > 0, equal, 0), None)


def _coarse(known: Known) -> tuple[Counts, Counts]:
    found = known.of(Coarse)
    assert found != WIDE
    return found


class Level(NamedTuple):
    """The bits of each row's threshold that are known, and how many of the entries that have them are kept, or equal
    it."""

    bits: Counts
    take: Counts
    equal: Counts


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
        counts = select.array(total["counts"])
        if self.level:
            before: Level = known[digits(self.level - 1)]
            higher, rest = before.bits, before.take
        else:
            rest = self.method.keep_counts(total["sizes"]).reshape(-1)
            counts, higher = repeated(counts, len(rest)), np.zeros_like(rest)
        bits, take = select.deeper(higher, counts, rest)
        return Level(bits, take, counts[np.arange(len(bits)), bits & 0xFFFF])


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


def repeated(x: Any, rows: int) -> Any:
    """The stack, of NumPy or torch, with each expert as often as it has thresholds, (rows, ...).

    Example:
        >>> repeated(np.array([[1.0], [2.0]]), 4).tolist()
        [[1.0], [1.0], [2.0], [2.0]]
    """
    return x if rows == len(x) else x[np.arange(rows) // (rows // len(x))]


def known_threshold(known: Known) -> Threshold:
    """The threshold; the engine runs the passes before anything needs it."""
    threshold = found(known)
    if threshold is None:
        raise AssertionError("the passes have not found a threshold")
    return threshold


def place(at: Place, further: int = 0) -> str:
    """A key of the elements there, or some further on, that sorts by tensor name, then by offset."""
    return f"{at.name}\0{at.offset + further:020d}"
