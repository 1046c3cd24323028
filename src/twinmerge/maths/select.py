"""Selection by magnitude: exactly k entries, without sorting, in a fixed order among equals.

Checkpoints in bfloat16 make equal magnitudes the normal case, so a threshold alone keeps too many entries or
too few. The rule here: keep every |x| above the threshold, then the first entries equal to it, in the order
of (tensor name, flat index), until k are kept.

The bits of a non-negative float, read as an integer, sort like the number itself. So two histograms of
65,536 bins find the k-th largest of any number of float32 entries exactly, in memory that does not grow; float64
takes four (`digits`). Selecting over a whole model takes three reductions; counts of tiles add up in any order:

    1. high = sum of coarse(tile)              bins, rest = locate(high, k)
    2. low = sum of fine(tile, bins)           thresholds, take = pin(bins, low, rest)
    3. ties(tile, thresholds), tile by tile    left = take less the ties in earlier tensors and tiles
    then keep_above(row, threshold, left, out) for each expert

Here x is always (experts, ...) in float32 or float64 (of NumPy: float32), each expert is a selection of its own, and a tile is a run of
consecutive flat entries. NaN is refused by the caller. Thresholds, ranks and counts are NumPy's, and torch, which takes
longer to import than many a merge, is only asked for entries that lie in its tensors.

Longer than other files: the exact histograms and the sampled bracket count the same bits, one beside the other.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import UsageError
from twinmerge.maths import fused
from twinmerge.maths.rule import Values

if TYPE_CHECKING:
    from torch import Tensor

Counts = NDArray[np.int64]

BINS = 65_536
_NEVER = 0x7FFF_FFFF  # above the bits of infinity
_WIDE_NEVER = 0x7FFF_FFFF_FFFF_FFFF  # the same of float64


def keep_count(density: float, total: int) -> int:
    """How many entries a density keeps: k = floor(density * total + 1e-9), from the decimal that was written.

    Args:
        density: the share to keep, in [0, 1].
        total: the number of entries d.

    Raises:
        TwinmergeError: the density is outside [0, 1] or is not a number.

    Example:
        >>> keep_count(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    if not 0 <= density <= 1:  # NaN fails this too
        raise UsageError(f"density {density} is outside [0, 1]: give the share of entries to keep")
    return math.floor(Fraction(str(density)) * total + Fraction(1, 10**9))


def coarse(x: Any) -> Any:
    """Pass 1: the histogram of the high 16 bits of |x|.

    Args:
        x: (experts, ...) float32 or float64.

    Returns:
        (experts, 65536) int64; the sum over tiles is the histogram of the whole.

    Example:
        >>> import torch
        >>> coarse(torch.tensor([[1.0, -1.0, 2.0]]))[0, [0x3F80, 0x4000]].tolist()
        [2, 1]
    """
    return digits(x, 0)


def fine(x: Any, bins: Counts) -> Any:
    """Pass 2: the histogram of the low 16 bits of |x|, among entries whose high bits are the expert's bin.

    Args:
        x: (experts, ...) float32.
        bins: (experts,) int64, from `locate` on the sum of `coarse`.

    Returns:
        (experts, 65536) int64.

    Example:
        >>> import torch
        >>> fine(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([0x3F80]))[0, 0].item()
        2
    """
    return digits(x, 1, bins)


def digits(x: Any, level: int, higher: Counts | None = None) -> Any:
    """The histogram of 16 bits of |x|, the first ones at level 0, among entries whose bits above them are the expert's.

    Args:
        x: (experts, ...); float32 has levels 0 and 1, float64 has four.
        level: which 16 bits.
        higher: (experts,) int64, the bits above; not read at level 0.

    Returns:
        (experts, 65536) int64.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
        >>> digits(x, 0)[0, 0x3FF0].item(), digits(x, 1, torch.tensor([0x3FF0]))[0, 0].item()
        (2, 2)
    """
    rows, low = [], 16 * (x.itemsize // 2 - 1 - level)
    for row, above in zip(x, [0] * len(x) if higher is None else higher.tolist(), strict=True):
        bits = _bits(row) >> low
        bits = bits[bits >> 16 == above] & 0xFFFF if level else bits
        rows.append(np.bincount(bits, minlength=BINS) if isinstance(bits, np.ndarray) else _tallied(bits))
    return np.stack(rows) if isinstance(x, np.ndarray) else _stacked(rows)


def _tallied(bits: Tensor) -> Tensor:
    return bits.bincount(minlength=BINS)


def _stacked(rows: list[Any]) -> Tensor:
    import torch

    return torch.stack(rows)


def array(x: Any) -> NDArray[Any]:
    """Of NumPy or of torch, on any device, as an array."""
    return x.cpu().numpy() if hasattr(x, "cpu") else np.asarray(x)


def locate(counts: Counts | Tensor, k: Counts | int) -> tuple[Counts, Counts]:
    """The bin that holds the k-th entry from the top, and how many entries of that bin are among the first k.

    Args:
        counts: (experts, bins) int64, of NumPy or torch.
        k: how many to keep, one number or (experts,); more than there are means all.

    Returns:
        Two (experts,) int64. For k = 0: the top bin, and 0 of it.

    Example:
        >>> [found.item() for found in locate(np.array([[5, 4, 1]]), 3)]
        [1, 2]
    """
    from_top = array(counts)[:, ::-1]
    above = from_top.cumsum(1)  # [j]: the entries of the top j + 1 bins
    wanted = np.minimum(array(k), above[:, -1])
    at = np.array([row.searchsorted(k) for row, k in zip(above, wanted, strict=True)], np.int64)
    return from_top.shape[1] - 1 - at, wanted - _at(above - from_top, at)


def _at(rows: Counts, columns: Counts) -> Counts:
    """One entry of each row."""
    found: Counts = np.take_along_axis(rows, columns[:, None], 1)[:, 0]
    return found


def pin(bins: Counts, counts: Counts | Tensor, rest: Counts) -> tuple[Counts, Counts]:
    """The threshold of each expert, out of the bin of pass 1 and the histogram of pass 2.

    Args:
        bins, rest: (experts,) int64, from `locate` on the sum of `coarse`.
        counts: (experts, 65536), the sum of `fine`.

    Returns:
        thresholds: (experts,) int64, the bits of the k-th largest |x|; above every number for k = 0.
        take: (experts,) int64, how many of the entries that equal the threshold are kept.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, -3.0, 2.0, -2.0]])
        >>> bins, rest = locate(coarse(x), 2)
        >>> thresholds, take = pin(bins, fine(x, bins), rest)
        >>> number(thresholds.item()), take.item()
        (2.0, 1)
    """
    bits, take = deeper(bins, counts, rest)
    return np.minimum(bits, _NEVER), take


def deeper(higher: Counts, counts: Counts | Tensor, rest: Counts) -> tuple[Counts, Counts]:
    """The higher bits and the 16 that their histogram adds to them, and what is left to keep there.

    Args:
        higher, rest: (experts,) int64, of the level before; 0 and k at the first.
        counts: (experts, 65536), the sum of `digits`.
    """
    low, take = locate(counts, rest)
    return (higher << 16) | low, take


def ties(x: Tensor, thresholds: Counts) -> Counts:
    """Pass 3: how many entries of each expert equal its threshold, (experts,) int64.

    Args:
        x: (experts, ...) float32 or float64.
        thresholds: (experts,) int64, from `pin`.

    Example:
        >>> import torch
        >>> ties(torch.tensor([[1.0, -2.0, 2.0]]), np.array([0x4000_0000])).item()
        2
    """
    at = thresholds.tolist()
    return np.array([int((_bits(row) == bits).sum()) for row, bits in zip(x, at, strict=True)])


def keep_above(x: Tensor, bits: int, left: int, out: Tensor) -> None:
    """Write one expert's entries to `out`: those above the threshold, the first `left` equal to it, zero elsewhere.

    Args:
        x, out: (...) float32 or float64, contiguous, of one shape.
        bits: the threshold's bits, from `pin`; above every number where nothing is kept.
        left: how many of the entries that equal it are kept, in flat order.

    Example:
        >>> import torch
        >>> x, out = torch.tensor([2.0, -3.0, -2.0, 1.0]), torch.empty(4)
        >>> keep_above(x, 0x4000_0000, 1, out)
        >>> out.tolist()
        [2.0, -3.0, 0.0, 0.0]
    """
    import torch

    wide = x.dtype == torch.float64
    if bits >= never(wide):
        out.zero_()
    elif left >= x.numel():  # all that equal it: strictly above the number before it
        torch.hardshrink(x, number(bits - 1, wide), out=out) if bits else out.copy_(x)
    else:
        torch.hardshrink(x, number(bits, wide), out=out)
        if left:
            first = (_bits(x) == bits).nonzero()[:left, 0]
            out.view(-1)[first] = x.reshape(-1)[first]


def number(bits: int, wide: bool = False) -> float:
    """The number that has these bits, as float64 where `wide`, else as float32."""
    found: float = np.int64(bits).view(np.float64).item() if wide else np.int32(bits).view(np.float32).item()
    return found


def never(wide: bool = False) -> int:
    """A threshold that no number of float32, or of float64, reaches."""
    return _WIDE_NEVER if wide else _NEVER


def narrowed(bits: int) -> tuple[int, bool]:
    """A float64 threshold among float32 numbers: the bits of the largest that is not above it, and whether they are
    equal.

    Example:
        >>> bits = np.array([0.5, 0.5 + 1e-12]).view(np.int64).tolist()
        >>> [(number(low), equal) for low, equal in map(narrowed, bits)]
        [(0.5, True), (0.5, False)]
    """
    if bits >= _WIDE_NEVER:
        return _NEVER, False
    exact = number(bits, wide=True)
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite there
        low = int(np.float32(exact).view(np.int32))
    return (low if number(low) <= exact else low - 1), number(low) == exact


DEVIATIONS = 6  # standard deviations of a sampled rank on either side of a bracket's middle
WIDEST = 1 << 20  # values that a bracket may hold: 8 MiB of counts for each expert
ANY_WIDTH = 1 << 31
SHARED = 4  # values inside the bracket that are counted apart, and for each tensor
OFTEN = 1 / 2000  # share of the sample that such a value has at least
_PIECE = 65_536  # entries at a time: small enough for a core's own cache


class Bracket(NamedTuple):
    """For each expert an interval of bits that very likely holds its threshold.

    low, width: (experts,) int64, the bits low ... low + width - 1; shift: (experts,) int64, the values inside are all
    multiples of 2^shift above low, as far as the sample shows (deltas of bfloat16 numbers leave the low bits of float32
    empty); shared: (experts, 4) int64, values near the rank that many entries have, -1 where there are fewer.
    """

    low: Counts
    width: Counts
    shift: Counts
    shared: Counts

    def bins(self, expert: int) -> int:
        """How many values the interval may hold."""
        return (int(self.width[expert] - 1) >> int(self.shift[expert])) + 1


def bracket(sample: NDArray[np.int32], k: Counts, widest: int = WIDEST) -> Bracket | None:
    """Bracket the k-th largest |x| of what the sample is from.

    Args:
        sample: (experts, n) int32, from `magnitude_bits`, n > 0.
        k: (experts,) the rank within the sample, from the top.
        widest: values that an interval may hold.

    Returns:
        None where an interval may hold too many values to count; above all numbers where an expert keeps nothing.

    Example:
        >>> found = bracket(np.arange(10_000, dtype=np.int32)[None], np.array([5000]))
        >>> found.low.tolist(), found.width.tolist(), found.shift.tolist()
        ([4699], [603], [0])
    """
    size = sample.shape[1]
    low, width, shift = (np.full(len(sample), value, np.int64) for value in (_NEVER, 1, 0))
    found = Bracket(low, width, shift, np.full((len(sample), SHARED), -1, np.int64))
    for e, (row, rank) in enumerate(zip(array(sample), array(k).tolist(), strict=True)):
        if rank < 1:
            continue
        margin = 1 + math.ceil(DEVIATIONS * math.sqrt(rank * max(0, size - rank) / size))
        from_top = np.sort(row)[::-1]
        inside = from_top[max(0, rank - margin - 1) : rank + margin]
        high = int(inside[0]) if rank > margin else _NEVER - 1
        least = int(inside[-1]) if rank + margin <= size else 0
        steps = int(np.bitwise_or.reduce(inside - least)) | (high - least if rank > margin else 0)
        low[e], width[e], shift[e] = least, high - least + 1, (steps & -steps).bit_length() - 1 if steps else 0
        if found.bins(e) > widest:
            return None
        values, counts = np.unique(inside, return_counts=True)
        away = np.abs(np.arange(len(values)) - np.searchsorted(values, from_top[rank - 1]))
        nearest_first = np.argsort(away, kind="stable")
        often = values[nearest_first][counts[nearest_first] > max(1, OFTEN * size)][:SHARED]
        found.shared[e, : len(often)] = often
    return found


def in_bracket(row: Tensor, found: Bracket, expert: int) -> tuple[int, NDArray[np.int32], list[int], int]:
    """What one expert has above and inside its bracket.

    Returns:
        above: how many entries; bins: of those inside that have none of the `shared` values, counted from `low`;
            ties: how
        many have each of the shared values; between: how many bins are wrong, since a value lies between two of them,
        which the sample did not show.

    Example:
        >>> import torch
        >>> found = bracket(np.arange(10_000, dtype=np.int32)[None], np.array([5000]))
        >>> row = torch.tensor([4699, 5000, 9000], dtype=torch.int32).view(torch.float32)
        >>> above, bins, ties, between = in_bracket(row, found, 0)
        >>> above, bins.tolist(), ties, between
        (1, [0, 301], [0, 0, 0, 0], 0)
    """
    low, width, shift = (int(of[expert]) for of in found[:3])
    shared = [value - low for value in found.shared[expert].tolist() if value >= 0]
    above, ties, rest = 0, [0] * SHARED, []
    for piece in row.reshape(-1).split(_PIECE):
        part = _bits(piece)
        if part.device.type == "cpu":  # NumPy compares several times as fast as torch
            offset = part.numpy()
            offset -= np.int32(low)
            inside = offset.view(np.uint32) < np.uint32(width)
            above += int(np.count_nonzero(offset >= np.int32(min(width, _NEVER))))
            for i, value in enumerate(shared):
                same = offset == np.int32(value)
                ties[i] += int(np.count_nonzero(same))
                inside ^= same
            rest.append(offset[inside])
        else:
            part = part - low
            above += int((part >= width).sum())
            part = part[(part >= 0) & (part < width)]
            for i, value in enumerate(shared):
                ties[i] += int((part == value).sum())
                part = part[part != value]
            rest.append(part.cpu().numpy())
    return above, *_binned(np.concatenate(rest), ties, shift)


def in_bracket_stored(
    x: Values, base: Values | None, found: Bracket, expert: int
) -> tuple[int, NDArray[np.int32], list[int], int]:
    """`in_bracket` of x − base as they are stored, by the compiled library."""
    low, width, shift = (int(of[expert]) for of in found[:3])
    above, inside, ties = fused.in_bracket(x, base, low, width, found.shared[expert].tolist())
    return above, *_binned(inside, ties, shift)


def _binned(inside: NDArray[np.int32], ties: list[int], shift: int) -> tuple[NDArray[np.int32], list[int], int]:
    between = int(np.count_nonzero(inside & ((1 << shift) - 1))) if shift else 0
    return inside >> shift, ties, between


def magnitude_bits(x: Any) -> Any:
    """The bits of |x| of every expert, of NumPy's float32 or torch's tensors: (experts, n) int32 (int64 of float64),
    which sort like the numbers.

    Example:
        >>> import torch
        >>> magnitude_bits(torch.tensor([[-0.0, -1.0]])).tolist()
        [[0, 1065353216]]
    """
    rows = [_bits(row) for row in x]
    return np.stack(rows) if isinstance(x, np.ndarray) else _stacked(rows)


def largest(x: Tensor, k: Counts | int) -> Tensor:
    """The k entries of largest magnitude of each expert; the first in flat order among equals.

    Args:
        x: (experts, ...) float32 or float64.
        k: one number, or (experts,) int64. 0 keeps nothing; the size of x or more keeps all, zeros too.

    Returns:
        bool, of the shape of x.

    Example:
        >>> import torch
        >>> largest(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    import torch

    bits, take = locate(coarse(x), k)
    for level in range(1, x.element_size() // 2):
        bits, take = deeper(bits, digits(x, level, bits), take)
    most = never(x.dtype == torch.float64)
    thresholds = np.where(bits >= 0, bits, most).clip(max=most)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for row, out, threshold, left in zip(x, mask, thresholds.tolist(), take.tolist(), strict=True):
        bits = _bits(row)
        kept = bits > threshold
        kept[(bits == threshold).nonzero()[:left, 0]] = True
        out.copy_(kept.view(out.shape))
    return mask


def _bits(row: Any) -> Any:
    """|row| as int32, or int64 of float64, flat: a larger number has larger bits, and -0.0 equals 0.0."""
    if isinstance(row, np.ndarray):
        return row.reshape(-1).view(np.int32) & np.int32(_NEVER)
    import torch

    integers = {torch.float32: (torch.int32, _NEVER), torch.float64: (torch.int64, _WIDE_NEVER)}
    if row.dtype not in integers:
        raise TypeError(f"selection by magnitude works on float32 and float64, not {row.dtype}")
    integer, most = integers[row.dtype]
    return row.contiguous().view(integer).flatten() & most
