"""Checksums of tensors: XXH3-128 of each block of 65,536 elements, then of the blocks' checksums in order.

They find damage and mix-ups at the speed of memory, and ranges can be summed in any order by any number of threads. They
are no signature: who can change a folder can change the checksums in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import xxhash
from torch import Tensor

BLOCK = 65_536


def block_digests(stored: Tensor) -> list[str]:
    """The checksum of each block of a contiguous 1-D tensor, as it is stored; a range must start at a whole block.

    Example:
        >>> [len(d) for d in block_digests(torch.zeros(65_537, dtype=torch.bfloat16))]
        [32, 32]
    """
    raw = stored.contiguous().reshape(-1).view(torch.uint8).numpy().data
    step = BLOCK * stored.element_size()
    return [xxhash.xxh3_128_hexdigest(raw[at : at + step]) for at in range(0, len(raw), step)]


def joined(blocks: Iterable[str]) -> str:
    """The checksum of a tensor out of those of its blocks.

    Example:
        >>> joined(block_digests(torch.zeros(3))) == streamed(lambda start, out: out.zero_(), torch.float32, 3)
        True
    """
    return xxhash.xxh3_128_hexdigest("".join(blocks).encode())


def streamed(read: Callable[[int, Tensor], object], dtype: torch.dtype, numel: int) -> str:
    """The checksum of a tensor that is read piece by piece.

    Args:
        read: fills a 1-D tensor with the elements from a start on.
        dtype, numel: of the tensor.
    """
    blocks: list[str] = []
    held = torch.empty(min(numel, 16 * BLOCK), dtype=dtype)
    for start in range(0, numel, 16 * BLOCK):
        part = held[: min(16 * BLOCK, numel - start)]
        read(start, part)
        blocks += block_digests(part)
    return joined(blocks)
