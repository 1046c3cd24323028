"""Merging stored values in one pass: the compiled twin of what methods and rounding do tile by tile, with the same
bits.

`fused.c` is compiled when the package is installed, if there is a C compiler; `available` says whether it was. It reads
and writes the bytes of checkpoints (bfloat16, float16, float32) without a float32 copy of them. Calls let other threads
run, and any number of them may run at once.

Longer than other files: each call of the compiled library has its description here, field by field.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from twinmerge.maths.ranks import limit
from twinmerge.maths.rule import Outcome, Ranked, Rule, Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

CODES = ("BF16", "F16", "F32")
"""The dtypes that are read and written, by their safetensors names."""

SHARED = 4  # values that `in_bracket` counts apart, at most
MOST = 1024  # experts, at most
_VERSION = 9  # of fused.c
_BLOCK = 65_536
_BRANCH, _LEVELS, _PANEL, _COLUMNS = 8, 8, 8, 64  # of fused.c: how the sums of a block are put together
_CODE = {name: number for number, name in enumerate(CODES)}
_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_COMBINE = {"mean": 1, "sum": 2, "max": 3}
_OTHERS = {"sum": 0, "overlap": 4, "furthest": 5, "united": 6, "near": 7}
MASKED = 512  # experts that masks are made of, at most
_PIECE = 65_536  # elements at a time of what is combined in rows


def available() -> bool:
    """Whether the library was compiled for this version of the package, and loads.

    Example:
        >>> available() in (True, False)
        True
    """
    return _library() is not None


def merge(
    rule: Rule,
    base: Values | None,
    experts: Sequence[Values],
    out: Values,
    offset: int = 0,
    fisher: Sequence[Values] = (),
) -> Outcome:
    """Write the merged values to `out`, rounded once.

    Sums over the experts are taken in float32 where all inputs have 16 bits, else in float64 (`Tile.work`).

    Args:
        base: θ0; not read where the rule says that it works on parameters.
        experts: θt, one for each weight, at most 1024.
        out: its memory is written.
        offset: index of the first element in its tensor, which random draws are keyed with.
        fisher: of each expert, float32, for `Importance`; what is negative is not sound.

    Raises:
        ValueError: sizes or counts that differ, an unknown dtype, memory that is not contiguous, no base for deltas,
            rows that are not whole.
        RuntimeError: the library is not there.

    Example:
        >>> rule, merged = Rule(weights=(0.25, 0.75), deltas=False), np.zeros(2, np.float32)
        >>> x, y = (Values(np.array(row, np.float32).view(np.uint8), "F32") for row in ([2, 3], [4, 7]))
        >>> if available():
        ...     assert merge(rule, None, [x, y], Values(merged.view(np.uint8), "F32")) == (0, 0, True, True)
        ...     assert merged.tolist() == [3.5, 6.0]
    """
    if rule.deltas is None:
        rule = rule._replace(deltas=base is not None)
    theirs = _base_of(rule, base, experts)
    if rule.only is not None:
        if rule.deltas or not 0 <= rule.only < len(experts):
            raise ValueError(f"only {rule.only} of {len(experts)} experts, of deltas: {rule.deltas}")
        return _copy(experts[rule.only], out)
    if rule.ranked is not None:
        return _merge_rows(rule, theirs, experts, out, offset)
    library, prepared = _required(), _prepared(rule)
    size = _size(out)
    found = _Found()
    at, of_base = _stored(theirs, size)
    order = rule.importance.order if rule.importance is not None else range(len(experts))
    if rule.importance is not None and not len(fisher) == len(experts) == len({*order} & {*range(len(experts))}):
        raise ValueError(f"{len(fisher)} Fishers in the order {order} for {len(experts)} experts")
    addresses = prepared.row(*[_address(experts[e], size) for e in order])
    codes = bytes([of_base, *[_CODE[experts[e].code] for e in order], _CODE[out.code]])
    target = _address(out, size, writes=True)
    if rule.importance is not None:
        importances = prepared.row(*[_address(Values(fisher[e].memory, "F32"), size) for e in order])
        library.twinmerge_fused_weigh(prepared.pointer, at, addresses, importances, target, codes, size, found)
    else:
        library.twinmerge_fused_merge(prepared.pointer, at, addresses, target, codes, size, offset, None, found)
    changed, erased, sound, fits = found
    return Outcome(changed, erased, bool(sound), bool(fits))


def _copy(x: Values, out: Values) -> Outcome:
    """One expert's own values, whose bits stay where the dtype does."""
    if x.code != out.code:
        return merge(Rule((1.0,), deltas=False), None, [x], out)
    size = _size(out)
    sound = bool(_required().twinmerge_fused_copy(*_stored(x, size), size, _address(out, size, writes=True)))
    return Outcome(0, 0, sound, sound)


def _base_of(rule: Rule, base: Values | None, experts: Sequence[Values]) -> Values | None:
    """What the experts' values are less of."""
    if len(experts) != len(rule.weights):
        raise ValueError(f"{len(experts)} experts for {len(rule.weights)} weights")
    if rule.deltas and base is None:
        raise ValueError("deltas need a base")
    return base if rule.deltas else None


def _merge_rows(rule: Rule, base: Values | None, experts: Sequence[Values], out: Values, offset: int) -> Outcome:
    """`merge` of what is ranked, some rows at a time."""
    assert rule.ranked is not None
    length, size = max(1, rule.ranked.ranks[0].length), _size(out)
    wide = "F32" in [each.code for each in (*experts, *([] if base is None else [base]))]
    rest = rule._replace(ranked=None, ready="double" if wide else "float")
    step = length * max(1, _PIECE // length)
    room = np.empty((len(experts), min(step, size)), np.float32)
    found = Outcome(0, 0, True, True)
    for start in range(0, size, step):
        stop = min(start + step, size)
        theirs = None if base is None else part(base, start, stop)
        x = room[:, : stop - start]
        sound = _rank(rule.ranked, theirs, [part(each, start, stop) for each in experts], offset + start, x)
        ready = [Values(row.view(np.uint8), "F32") for row in x]
        one = merge(rest, theirs, ready, part(out, start, stop), offset + start)
        changed, erased = found.changed + one.changed, found.erased + one.erased
        found = Outcome(changed, erased, found.sound and sound, found.fits and one.fits)  # what overflows is no input
    return found


def staged(
    rule: Rule, base: Values | None, experts: Sequence[Values], offset: int = 0
) -> tuple[NDArray[np.float32], bool]:
    """What becomes of each expert's values before they are combined, for what must be known of it first.

    Args:
        rule, base, experts, offset: as of `merge`.

    Returns:
        (experts, size), and whether no input is NaN or infinite.

    Raises:
        ValueError, RuntimeError: as `merge`.

    Example:
        >>> from twinmerge.maths.rule import Trim
        >>> base, x = (Values(np.array(row, np.float32).view(np.uint8), "F32") for row in ([1, 1, 1], [2, -3, 2]))
        >>> rule = Rule((1.0,), deltas=True, trim=Trim((0x40000000,), (1,)))
        >>> if available():
        ...     assert staged(rule, base, [x])[0].tolist() == [[0, -4, 0]]
    """
    theirs, size = _base_of(rule, base, experts), _size(experts[0])
    found, out = _Found(), np.empty((len(experts), size), np.float32)
    if rule.ranked is not None:
        ranked = _rank(rule.ranked, theirs, experts, offset, out)
        if not ranked or (rule.select, rule.trim, rule.cut, rule.factors) == (None,) * 4:
            return out, ranked
        experts = [Values(row.view(np.uint8), "F32") for row in out]
        rule = rule._replace(ranked=None, ready="double")
    library, prepared = _required(), _prepared(rule)
    at, of_base = _stored(theirs, size)
    addresses = prepared.row(*[_address(each, size) for each in experts])
    codes = bytes([of_base, *[_CODE[each.code] for each in experts], 0])
    library.twinmerge_fused_merge(prepared.pointer, at, addresses, None, codes, size, offset, out.ctypes.data, found)
    return out, bool(found[2]) or rule.ready is not None


class Masked(NamedTuple):
    """What `masks` found.

    trained: entries that at least one expert changed; by_count: where the vector is not 0, entries that exactly 0, 1, …
    all experts mark; by_task: there, entries that each expert marks; masses: of each block of 65,536, as
    `sums.block_sums` adds them, Σ|x_t| and Σ|s| where expert t marks, (2, experts, blocks), where they are asked for;
    sound, fits: as in `Outcome`.
    """

    trained: int
    by_count: tuple[int, ...]
    by_task: tuple[int, ...]
    masses: NDArray[np.float64] | None
    sound: bool
    fits: bool


def masks(
    rule: Rule,
    base: Values,
    experts: Sequence[Values],
    out: Values,
    bits: NDArray[np.uint8],
    offset: int = 0,
    masses: bool = False,
) -> Masked:
    """Write s, rounded once, to `out`, and to `bits` which of its entries each expert marks: by `mark`, or where there
    is none those that have the sign of s.

    Args:
        rule: on deltas, with no ranks; its scale and the least of its `mark` are not read.
        base, experts, out, offset: as of `merge`; at most 512 experts.
        bits: (experts, ⌈size / 8⌉), C-contiguous; bit j of byte b is entry 8·b + j.
        masses: give them; of a rule that leaves nothing out of its experts.

    Raises:
        ValueError, RuntimeError: as `merge`.

    Example:
        >>> base, x, y = (Values(np.array(row, np.float32).view(np.uint8), "F32") for row in ([0, 0], [2, -1], [-1, -3]))
        >>> vector, bits = np.zeros(2, np.float32), np.zeros((2, 1), np.uint8)
        >>> rule = Rule((1.0, 1.0), deltas=True, combine="united")
        >>> if available():
        ...     found = masks(rule, base, [x, y], Values(vector.view(np.uint8), "F32"), bits, masses=True)
        ...     assert (vector.tolist(), bits.tolist()) == ([2.0, -3.0], [[3], [2]])
        ...     assert (found.by_count, found.masses.tolist()) == ((0, 1, 1), [[[3.0], [4.0]], [[5.0], [3.0]]])
    """
    library, prepared, size, count = _required(), _prepared(rule), _size(out), len(experts)
    if count != len(rule.weights) or not 1 <= count <= MASKED:
        raise ValueError(f"{count} experts for {len(rule.weights)} weights; masks are made of 1 to {MASKED}")
    left_out = (rule.drop, rule.trim, rule.cut, rule.factors, rule.select) != (None,) * 5
    if not rule.deltas or rule.ranked or rule.near or rule.ready or (masses and left_out):
        raise ValueError("masks are made of changes to a base as they are, or trimmed ones without masses")
    if bits.shape != (count, -(-size // 8)) or bits.dtype != np.uint8 or not bits.flags.c_contiguous:
        raise ValueError(f"bits of {bits.dtype} {bits.shape} for {count} masks of {size} entries")
    at, of_base = _stored(base, size)
    addresses = prepared.row(*[_address(each, size) for each in experts])
    rows = prepared.row(*[row.ctypes.data for row in bits])
    codes = bytes([of_base, *[_CODE[each.code] for each in experts], _CODE[out.code]])
    counts, found = np.zeros(2 + 2 * count, np.int64), _Found()
    room: list[NDArray[Any]] = []
    if masses:
        room.append(np.empty((-(-size // _BLOCK), 2, count)))
        room.append(np.empty(count * _BRANCH * _COLUMNS, np.float32))
        room.append(np.empty(_LEVELS * 2 * count * _COLUMNS))
    where: list[int | None] = [each.ctypes.data for each in room] if masses else [None] * 3
    target = _address(out, size, writes=True)
    library.twinmerge_fused_masks(
        prepared.pointer, at, addresses, target, codes, size, offset, rows, counts.ctypes.data, *where, found
    )
    trained, *times = counts.tolist()
    by_block = room[0].transpose(1, 2, 0) if masses else None
    return Masked(
        trained, tuple(times[: count + 1]), tuple(times[count + 1 :]), by_block, bool(found[2]), bool(found[3])
    )


def _rank(
    ranked: Ranked, base: Values | None, experts: Sequence[Values], offset: int, out: NDArray[np.float32]
) -> bool:
    """Write what is left of each expert's rows to its row of `out`; whether no input is NaN or infinite."""
    size, length = _size(experts[0]), ranked.ranks[0].length
    if len(ranked.ranks) != len(experts) or any(each.length != length for each in ranked.ranks):
        raise ValueError(f"ranks of {len(ranked.ranks)} experts for {len(experts)}, or of rows of other lengths")
    if size % max(1, length) or (size and not length):
        raise ValueError(f"{size} elements are no whole rows of {length}")
    room = np.empty(2 * length + (length + 1) // 2, np.uint64)
    sound = True
    for number, (x, ranks) in enumerate(zip(experts, ranked.ranks, strict=True)):
        key = np.array(ranked.keys[number], np.uint64) if ranks.draws else None
        sound &= bool(
            _required().twinmerge_fused_ranked(
                *_stored(x, size),
                *_stored(base, size),
                size,
                offset,
                length,
                ranks.rising,
                None if key is None else key.ctypes.data,
                ranks.below.ctypes.data,
                None if ranks.plain else ranks.factors.ctypes.data,
                out[number].ctypes.data,
                room.ctypes.data,
            )
        )
    return sound


def spread(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The standard deviation over the experts, entry by entry, computed in float64.

    Args:
        x: (experts, size), C-contiguous.

    Example:
        >>> spread(np.array([[1, 2], [3, 2]], np.float32)).tolist() if available() else [1.0, 0.0]
        [1.0, 0.0]
    """
    out = np.empty(x.shape[1], np.float32)
    _required().twinmerge_fused_spread(x.ctypes.data, x.shape[0], x.shape[1], out.ctypes.data)
    return out


def part(values: Values, start: int, stop: int) -> Values:
    """Elements start ... stop - 1.

    Example:
        >>> part(Values(np.arange(8, dtype=np.uint8), "BF16"), 1, 3).memory.tolist()
        [2, 3, 4, 5]
    """
    width = _BYTES[values.code]
    return Values(values.memory[start * width : stop * width], values.code)


def gram(base: Values | None, experts: Sequence[Values]) -> NDArray[np.float64]:
    """⟨x_i, x_j⟩ of each block of 65,536 elements, as `sums.blocked_gram` adds them; x_t = θt - θ0, or θt without a
    base.

    Returns:
        (experts, experts, ceil(size / 65536)).

    Raises:
        ValueError, RuntimeError: as `merge`.

    Example:
        >>> x, y = (Values(np.array(row, np.float32).view(np.uint8), "F32") for row in ([1, 0], [1, 2]))
        >>> if available():
        ...     assert gram(None, [x, y])[:, :, 0].tolist() == [[1.0, 1.0], [1.0, 5.0]]
        ...     assert gram(x, [y])[:, :, 0].tolist() == [[4.0]]
    """
    library, count = _required(), len(experts)
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} experts; 1 to {MOST} can be compared")
    size = _size(experts[0])
    at, of_base = _stored(base, size)
    addresses = (ctypes.c_void_p * count)(*[_address(each, size) for each in experts])
    codes = bytes([of_base, *[_CODE[each.code] for each in experts]])
    rows = np.empty((count, _BRANCH, _COLUMNS), np.float32)
    sums = np.empty((_LEVELS, min(count, _PANEL) * count, _COLUMNS))
    upper = [(i, j) for i in range(count) for j in range(i, count)]
    pairs = np.empty((-(-size // _BLOCK), len(upper)))
    room = (rows.ctypes.data, sums.ctypes.data, pairs.ctypes.data)
    library.twinmerge_fused_gram(at, addresses, codes, count, size, *room)
    found = np.empty((count, count, len(pairs)))
    for (i, j), products in zip(upper, pairs.T, strict=True):
        found[i, j] = found[j, i] = products
    return found


def norms(
    x: Values, base: Values | None, key: tuple[int, int], share: float, offset: int = 0
) -> tuple[list[float], list[float]]:
    """Σ|x - base| of each block of 65,536 elements, as `sums.block_sums` adds them: of all entries, and of those that
    `Drop` keeps.

    Args:
        key, share: of the mask, as in `Drop`.
        offset: index of the first element in its tensor, a multiple of 65,536.

    Raises:
        ValueError, RuntimeError: as `merge`.

    Example:
        >>> x = Values(np.array([1, -2], np.float32).view(np.uint8), "F32")
        >>> norms(x, None, (0, 0), 1.0) if available() else ([3.0], [3.0])
        ([3.0], [3.0])
    """
    size = _size(x)
    found = np.empty((-(-size // _BLOCK), 2))
    keys = np.array(key, np.uint64)
    values = (*_stored(x, size), *_stored(base, size), size)
    _required().twinmerge_fused_norms(*values, keys.ctypes.data, limit(share), offset, found.ctypes.data)
    return found[:, 0].tolist(), found[:, 1].tolist()


def in_bracket(
    x: Values, base: Values | None, low: int, width: int, shared: Sequence[int]
) -> tuple[int, NDArray[np.int32], list[int]]:
    """What |x - base| has above and inside the bracket low ... low + width - 1 of bits, as `select.in_bracket` counts
    it.

    Args:
        shared: at most 4 values in the bracket, as bits; -1 where there are fewer.

    Returns:
        above: how many entries; inside: of those in the bracket that have none of the shared values, their bits less
            `low`,
        in flat order; ties: how many have each of the shared values.

    Raises:
        ValueError: more than 4 shared values; and as `merge`.
        RuntimeError: as `merge`.

    Example:
        >>> x = Values(np.array([4699, 5000, 9000], np.int32).view(np.uint8), "F32")
        >>> if available():
        ...     above, inside, ties = in_bracket(x, None, 4699, 603, [5000])
        ...     assert (above, inside.tolist(), ties) == (1, [0], [1])
    """
    if len(shared) > SHARED:
        raise ValueError(f"{len(shared)} shared values; at most {SHARED} are counted apart")
    size = _size(x)
    never = -(1 << 31)  # no difference of two magnitudes
    offsets = [value - low if value >= 0 else never for value in shared]
    counts, room = (ctypes.c_int64 * (1 + SHARED))(), np.empty(size, np.int32)
    values = (*_stored(x, size), *_stored(base, size), size)
    apart = (ctypes.c_int32 * SHARED)(*offsets, *[never] * (SHARED - len(shared)))
    inside = _required().twinmerge_fused_bracket(*values, low, width, apart, counts, room.ctypes.data)
    above, *ties = counts
    return above, room[:inside].copy(), ties[: len(shared)]


_Found = ctypes.c_int64 * 4  # changed, erased, sound, fits


class _Rule(ctypes.Structure):
    """`Rule` in fused.c."""

    _fields_ = [
        ("experts", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("divisor", ctypes.c_double),
        ("weights", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("below", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("thresholds", ctypes.c_void_p),
        ("rooms", ctypes.c_void_p),
        ("cuts", ctypes.c_void_p),
        ("cut_rooms", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("votes", ctypes.c_void_p),
        ("flip", ctypes.c_void_p),
        ("importances", ctypes.c_void_p),
        ("floors", ctypes.c_void_p),
        ("divides", ctypes.c_double),
        ("marks", ctypes.c_void_p),
        ("marked", ctypes.c_int64),
        ("step", ctypes.c_double),
        ("least_step", ctypes.c_double),
        ("select_room", ctypes.c_int64),
        ("selects", ctypes.c_int32),
        ("select", ctypes.c_int32),
        ("deltas", ctypes.c_int32),
        ("combine", ctypes.c_int32),
        ("tie", ctypes.c_int32),
        ("rounds", ctypes.c_int32),
        ("ready", ctypes.c_int32),
    ]


class _Prepared(NamedTuple):
    """A rule as the library reads it: pointer: to it; row: the type of its experts' addresses; kept: what it points
    to."""

    pointer: Any
    row: Any
    kept: tuple[object, ...]


@functools.lru_cache(maxsize=256)
def _prepared(rule: Rule) -> _Prepared:
    count = len(rule.weights)
    if not 1 <= count <= MOST:
        raise ValueError(f"{count} experts; 1 to {MOST} can be merged")
    kept: list[object] = []
    rank = rule.importance.order if rule.importance is not None else range(count)

    def pointer(values: Sequence[Any], dtype: type, per_expert: int = 1) -> int:
        array: NDArray[Any] = np.array(values, dtype).reshape(-1)
        if array.size != count * per_expert:
            raise ValueError(f"{array.size // per_expert} values for {count} experts")
        kept.append(array)
        return array.ctypes.data

    filled = _Rule(experts=count, scale=rule.scale, divisor=rule.divisor, deltas=bool(rule.deltas))
    filled.weights = pointer([rule.weights[e] for e in rank], np.float64)
    if rule.importance is not None:
        filled.importances = pointer([rule.importance.factors[e] for e in rank], np.float64)
        filled.floors = pointer([rule.importance.floors[e] for e in rank], np.float64)
    if rule.drop is not None:
        filled.keys = pointer(rule.drop.keys, np.uint64, per_expert=2)
        filled.below = pointer([limit(share) for share in rule.drop.shares], np.uint32)
        filled.factors = pointer(rule.drop.factors, np.float64)
    if rule.trim is not None:
        filled.thresholds = pointer(rule.trim.thresholds, np.uint32)
        filled.rooms = pointer(rule.trim.rooms, np.int64)
    if rule.cut is not None:
        filled.cuts = pointer(rule.cut.thresholds, np.uint32)
        filled.cut_rooms = pointer(rule.cut.rooms, np.int64)
    if rule.factors is not None:
        filled.after = pointer(rule.factors, np.float64)
    if rule.select is not None:
        filled.selects, filled.select, filled.select_room = True, *rule.select
    filled.combine = _OTHERS[rule.combine]
    if rule.mark is not None:
        filled.marks, filled.marked = pointer(rule.mark.thresholds, np.float64), rule.mark.least
    if rule.near is not None:
        if count != 2 or rule.deltas:
            raise ValueError(f"from one model near to another, and {count} are given, or their changes to a base")
        filled.combine, filled.rounds = _OTHERS["near"], rule.near.rounds
        filled.step, filled.least_step = rule.near.step, rule.near.least
    filled.ready = {None: 0, "float": 1, "double": 2}[rule.ready]
    if rule.elect is not None:
        filled.combine, filled.tie, filled.divides = _COMBINE[rule.elect.merge], rule.elect.tie, rule.elect.least
        filled.rounds = rule.elect.rounds
        filled.votes = pointer(rule.elect.votes, np.float64)
        filled.flip = pointer(rule.elect.flip, np.uint8)
    return _Prepared(ctypes.byref(filled), ctypes.c_void_p * count, tuple(kept))


def _size(values: Values) -> int:
    width = _BYTES.get(values.code)
    if width is None:
        raise ValueError(f"dtype {values.code} is none of {', '.join(CODES)}")
    return values.memory.nbytes // width


def _address(values: Values, size: int, writes: bool = False) -> int:
    """Where `size` elements lie."""
    memory: Any = values.memory  # NumPy's types know no Buffer before Python 3.12
    width = _BYTES.get(values.code)
    if width is None or memory.nbytes != size * width:
        raise ValueError(f"{memory.nbytes} bytes of {values.code} where {size} elements are asked for")
    if not size:
        return 0
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(memory))  # a third of the time of `memory.ctypes`
    except TypeError:
        if writes or not memory.flags.c_contiguous:
            raise ValueError("memory must be contiguous, and the output's writable") from None
        return int(memory.ctypes.data)


def _stored(values: Values | None, size: int) -> tuple[int, int]:
    """Address and code; 0 for none."""
    return (0, 0) if values is None else (_address(values, size), _CODE[values.code])


def _required() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("twinmerge was installed without its compiled part: see available()")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    path = Path(__file__).with_name("_fused.dll" if os.name == "nt" else "_fused.so")  # as setup.py names it
    return _opened(path) if path.exists() else None


def _opened(path: Path) -> ctypes.CDLL | None:
    """The library, ready for calls; None if it does not load, or is not of this version."""
    try:
        library = ctypes.CDLL(str(path))
        if library.twinmerge_fused_version() != _VERSION:
            return None
    except (OSError, AttributeError):
        return None
    address, count, code = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    values = [address, code, address, code, count]
    for name, arguments, answer in [
        (
            "merge",
            [address, address, address, address, ctypes.c_char_p, count, ctypes.c_uint64, address, address],
            None,
        ),
        ("masks", [*[address] * 4, ctypes.c_char_p, count, ctypes.c_uint64, *[address] * 6], None),
        ("ranked", [*values, ctypes.c_uint64, count, code, *[address] * 5], code),
        ("spread", [address, count, count, address], None),
        ("weigh", [address, address, address, address, address, ctypes.c_char_p, count, address], None),
        ("gram", [address, address, ctypes.c_char_p, count, count, address, address, address], None),
        ("norms", [*values, address, ctypes.c_uint32, ctypes.c_uint64, address], None),
        ("bracket", [*values, ctypes.c_int32, ctypes.c_uint32, address, address, address], count),
        ("copy", [address, code, count, address], code),
        ("level", [code], code),
    ]:
        function = getattr(library, f"twinmerge_fused_{name}")
        function.argtypes, function.restype = arguments, answer
    library.twinmerge_fused_level(-1)
    return library
