"""Masks as one bit for each entry, and nested masks as bit planes of how many of them an entry is in.

Bit j of byte b is entry 8·b + j, NumPy's "little" order. The last byte is filled up with zeros, so a mask is only read
with its length: ten bits are two bytes, and two bytes are sixteen bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PLANES = 3  # bits of a level
MOST = (1 << PLANES) - 1


def byte_count(count: int) -> int:
    """Bytes of so many bits.

    Example:
        >>> [byte_count(n) for n in (0, 1, 8, 9)]
        [0, 1, 1, 2]
    """
    return -(-count // 8)


def pack(mask: Tensor) -> Tensor:
    """The mask's entries, flat, as bits.

    Args:
        mask: bool, any shape and device.

    Returns:
        (⌈entries / 8⌉,) uint8 on the CPU.

    Raises:
        ValueError: a tensor of another dtype.

    Example:
        >>> import torch
        >>> pack(torch.tensor([True, False, True, True] + [False] * 5 + [True])).tolist()
        [13, 2]
    """
    import torch

    if mask.dtype != torch.bool:
        raise ValueError(f"expected a mask of booleans, not {mask.dtype}")
    return torch.from_numpy(np.packbits(mask.reshape(-1).cpu().numpy(), bitorder="little"))


def unpack(bits: Tensor, count: int) -> Tensor:
    """The first `count` entries that the bytes stand for.

    Args:
        bits: (⌈count / 8⌉,) uint8.
        count: entries of the mask, which the bytes do not tell.

    Returns:
        (count,) bool on the device of the bytes.

    Raises:
        ValueError: bytes that are not those of so many entries: too few or many, or with bits beyond the last entry.

    Example:
        >>> import torch
        >>> unpack(torch.tensor([13, 2], dtype=torch.uint8), 10).tolist()[:4]
        [True, False, True, True]
    """
    import torch

    check(bits, count)
    if bits.device.type == "cpu":
        flags = np.unpackbits(bits.numpy(), count=count, bitorder="little")
        return torch.from_numpy(flags).view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places & 1).flatten()[:count].bool()


def check(bits: Tensor, count: int) -> None:
    """Refuse bytes that are no mask of `count` entries.

    Raises:
        ValueError: as `unpack` says.
    """
    import torch

    if bits.dtype != torch.uint8 or bits.shape != (byte_count(count),):
        raise ValueError(f"{count} bits are {byte_count(count)} bytes, not {tuple(bits.shape)} of {bits.dtype}")
    if count % 8 and int(bits[-1]) >> count % 8:
        raise ValueError(f"the last byte holds bits beyond the {count} of the mask")


def planes(masks: Sequence[Tensor]) -> Tensor:
    """Nested masks as one level for each entry: of how many of them it is.

    Each mask must lie within the one before, as masks of a rising threshold do; five masks then take three bits for
    each entry. All is done on bytes, eight entries at once.

    Args:
        masks: at most 7, packed, the largest first, (bytes,) uint8 each.

    Returns:
        (3, bytes) uint8: the bits of value 1, 2 and 4 of the levels, packed like a mask.

    Raises:
        ValueError: no mask or more than 7, or masks of different lengths.

    Example:
        >>> import torch
        >>> wide, narrow = pack(torch.tensor([True, True, False])), pack(torch.tensor([False, True, False]))
        >>> planes([wide, narrow]).tolist()
        [[1], [2], [0]]
    """
    import torch

    if not 1 <= len(masks) <= MOST or len({len(mask) for mask in masks}) > 1:
        raise ValueError(f"expected 1 to {MOST} masks of one length, got {len(masks)}")
    out = torch.zeros(PLANES, len(masks[0]), dtype=torch.uint8)
    for plane, row in enumerate(out):  # a level has this bit where an odd number of the multiples of 2^plane is reached
        for mask in masks[(1 << plane) - 1 :: 1 << plane]:
            row ^= mask
    return out


def plane_at(levels: Tensor, least: int) -> Tensor:
    """The mask of the entries whose level is `least` or more.

    Args:
        levels: (3, bytes) uint8, as `planes` has them.
        least: 1 to 7; the k-th of the nested masks is that of level k.

    Returns:
        (bytes,) uint8, packed.

    Raises:
        ValueError: another level, or another number of planes.

    Example:
        >>> import torch
        >>> plane_at(torch.tensor([[1], [2], [0]], dtype=torch.uint8), 2).tolist()  # the narrow mask again
        [2]
    """
    import torch

    if not 1 <= least <= MOST or levels.dim() != 2 or len(levels) != PLANES:
        raise ValueError(f"expected {PLANES} planes and a level of 1 to {MOST}, got {tuple(levels.shape)} and {least}")
    found = torch.full_like(levels[0], 0xFF)
    for plane, row in enumerate(levels):  # from the lowest bit on: level ≥ least where the higher bits do not decide
        found = found & row if least >> plane & 1 else found | row
    return found
