"""Selection by magnitude: exactly k entries, without sorting, in a fixed order among equals.

Checkpoints in bfloat16 make equal magnitudes the normal case, so a threshold alone keeps too many entries or
too few. The rule here: keep every |x| above the threshold, then the first entries equal to it, in the order
of (tensor name, flat index), until k are kept.

The bits of a non-negative float32, read as an integer, sort like the number itself. So two histograms of
65,536 bins find the k-th largest of any number of entries exactly, in memory that does not grow. Selecting
over a whole model takes three reductions; counts of tiles add up in any order:

    1. high = sum of coarse(tile)              bins, rest = locate(high, k)
    2. low = sum of fine(tile, bins)           thresholds, take = pin(bins, low, rest)
    3. ties(tile, thresholds), tile by tile    seen = the ties in earlier tensors and earlier tiles of this
    then threshold_mask(tile, thresholds, take, seen)

Here x is always (experts, ...) in float32, each expert is a selection of its own, and a tile is a run of
consecutive flat entries. NaN is refused by the caller.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError

BINS = 65_536
_NEVER = 0x7FFF_FFFF  # above the bits of infinity


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
        raise TwinmergeError(f"density {density} is outside [0, 1]: give the share of entries to keep")
    return math.floor(Fraction(str(density)) * total + Fraction(1, 10**9))


def coarse(x: Tensor) -> Tensor:
    """Pass 1: the histogram of the high 16 bits of |x|.

    Args:
        x: (experts, ...) float32.

    Returns:
        (experts, 65536) int64; the sum over tiles is the histogram of the whole.

    Example:
        >>> coarse(torch.tensor([[1.0, -1.0, 2.0]]))[0, [0x3F80, 0x4000]].tolist()
        [2, 1]
    """
    return torch.stack([torch.bincount(_bits(row) >> 16, minlength=BINS) for row in x])


def fine(x: Tensor, bins: Tensor) -> Tensor:
    """Pass 2: the histogram of the low 16 bits of |x|, among entries whose high bits are the expert's bin.

    Args:
        x: (experts, ...) float32.
        bins: (experts,) int64, from `locate` on the sum of `coarse`.

    Returns:
        (experts, 65536) int64.

    Example:
        >>> fine(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([0x3F80]))[0, 0].item()
        2
    """
    rows = []
    for row, high in zip(x, bins.tolist(), strict=True):
        bits = _bits(row)
        rows.append(torch.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=BINS))
    return torch.stack(rows)


def locate(counts: Tensor, k: Tensor | int) -> tuple[Tensor, Tensor]:
    """The bin that holds the k-th entry from the top, and how many entries of that bin are among the first k.

    Args:
        counts: (experts, bins) int64.
        k: how many to keep, one number or (experts,); more than there are means all.

    Returns:
        Two (experts,) int64. For k = 0: the top bin, and 0 of it.

    Example:
        >>> [t.item() for t in locate(torch.tensor([[5, 4, 1]]), 3)]
        [1, 2]
    """
    above = counts.flip(-1).cumsum(-1)  # [j]: the entries of the top j + 1 bins
    wanted = torch.as_tensor(k, device=counts.device).expand(len(counts)).minimum(above[:, -1]).contiguous()
    from_top = torch.searchsorted(above, wanted[:, None])[:, 0]
    bins = counts.shape[-1] - 1 - from_top
    before = (above - counts.flip(-1)).gather(1, from_top[:, None])[:, 0]
    return bins, wanted - before


def pin(bins: Tensor, counts: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The threshold of each expert, out of the bin of pass 1 and the histogram of pass 2.

    Args:
        bins, rest: (experts,) int64, from `locate` on the sum of `coarse`.
        counts: (experts, 65536), the sum of `fine`.

    Returns:
        thresholds: (experts,) int64, the bits of the k-th largest |x|; above every number for k = 0.
        take: (experts,) int64, how many of the entries that equal the threshold are kept.

    Example:
        >>> x = torch.tensor([[1.0, -3.0, 2.0, -2.0]])
        >>> bins, rest = locate(coarse(x), 2)
        >>> thresholds, take = pin(bins, fine(x, bins), rest)
        >>> thresholds.int().view(torch.float32).item(), take.item()
        (2.0, 1)
    """
    low, take = locate(counts, rest)
    return ((bins << 16) | low).clamp(max=_NEVER), take


def ties(x: Tensor, thresholds: Tensor) -> Tensor:
    """Pass 3: how many entries of each expert equal its threshold, (experts,) int64.

    Args:
        x: (experts, ...) float32.
        thresholds: (experts,) int64, from `pin`.

    Example:
        >>> ties(torch.tensor([[1.0, -2.0, 2.0]]), torch.tensor([0x4000_0000])).item()
        2
    """
    at = thresholds.tolist()
    return torch.stack([(_bits(row) == bits).sum() for row, bits in zip(x, at, strict=True)])


def threshold_mask(x: Tensor, thresholds: Tensor, take: Tensor, seen: Tensor | None = None) -> Tensor:
    """What is kept of one tile: all above the threshold, and those equal to it that come early enough.

    Args:
        x: (experts, ...) float32.
        thresholds, take: (experts,) int64, from `pin`.
        seen: (experts,) int64, the entries equal to the threshold that come before this tile; None for none.

    Returns:
        bool, of the shape of x.

    Example:
        >>> x, two = torch.tensor([[2.0, -3.0, -2.0, 1.0]]), torch.tensor([0x4000_0000])
        >>> threshold_mask(x, two, take=torch.tensor([1])).tolist()
        [[True, True, False, False]]
        >>> threshold_mask(x, two, take=torch.tensor([1]), seen=torch.tensor([1])).tolist()
        [[False, True, False, False]]
    """
    room = (take if seen is None else take - seen).clamp(min=0).tolist()
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
    for row, out, bits_at, left in zip(x, mask, thresholds.tolist(), room, strict=True):
        bits = _bits(row)
        kept = bits > bits_at
        if left:
            kept[(bits == bits_at).nonzero()[:left, 0]] = True
        out.copy_(kept.view(out.shape))
    return mask


def largest(x: Tensor, k: Tensor | int) -> Tensor:
    """The k entries of largest magnitude of each expert; the first in flat order among equals.

    Args:
        x: (experts, ...) float32.
        k: one number, or (experts,) int64. 0 keeps nothing; the size of x or more keeps all, zeros too.

    Returns:
        bool, of the shape of x.

    Example:
        >>> largest(torch.tensor([[1.0, -3.0, 2.0, -2.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    bins, rest = locate(coarse(x), k)
    return threshold_mask(x, *pin(bins, fine(x, bins), rest))


def _bits(row: Tensor) -> Tensor:
    """|row| as int32, flat: a larger number has larger bits, and -0.0 equals 0.0."""
    if row.dtype != torch.float32:
        raise TypeError(f"selection by magnitude works on float32, not {row.dtype}")
    return row.abs().contiguous().view(torch.int32).flatten()
