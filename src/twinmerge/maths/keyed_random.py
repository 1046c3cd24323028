"""Random numbers that depend on what they are for, never on the order of the work.

Each number is a function of (seed, expert, tensor, index). So another expert, thread, tile or machine changes
no mask, and any part of a tensor can be drawn on its own.
"""

from __future__ import annotations

import hashlib
import math
import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_PER_COUNT = 8  # one step of Philox's counter gives four words of 64 bits: eight numbers
_CHUNK = 1 << 18  # numbers at a time: small enough for the cache


def uniform(seed: int, expert: str, tensor: str, start: int, count: int) -> Tensor:
    """Numbers start ... start + count - 1 of the stream of (seed, expert, tensor), uniform on [0, 1).

    Number i is the top 24 bits of the i-th 32-bit word of Philox4x64-10, times 2^-24. The key is the 128-bit
    BLAKE2b digest of the three names, each with its length before it.

    Args:
        seed: any integer.
        expert: the expert's name.
        tensor: the tensor's name.
        start: index of the first number, >= 0.
        count: how many, >= 0.

    Returns:
        (count,) float32 on the CPU.

    Raises:
        ValueError: start or count is negative.

    Example:
        >>> import torch
        >>> whole = uniform(0, "math", "layers.0.weight", 0, 100)
        >>> torch.equal(whole[37:], uniform(0, "math", "layers.0.weight", 37, 63))
        True

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    import torch

    words = _words(seed, expert, tensor, start, count)
    out = np.empty(count, dtype=np.float32)
    for at in range(0, count, _CHUNK):
        part = out[at : at + _CHUNK]
        np.multiply(words[at : at + _CHUNK] >> np.uint32(8), np.float32(2.0**-24), out=part, casting="same_kind")
    return torch.from_numpy(out)


def kept_bits(seed: int, expert: str, tensor: str, start: int, count: int, share: float) -> Tensor:
    """A Bernoulli(share) mask as integers: all ones where `uniform` of the same arguments is below `share`, else zero.

    Returns:
        (count,) int32, -1 or 0: `x.view(torch.int32) & mask` drops entries of a float32 x.

    Example:
        >>> import torch
        >>> mask = kept_bits(0, "math", "w", 0, 1000, 0.25)
        >>> torch.equal(mask == -1, uniform(0, "math", "w", 0, 1000) < 0.25)
        True
    """
    import torch

    draws = _words(seed, expert, tensor, start, count)
    draws >>= np.uint32(8)
    below = math.ceil(float(np.float32(share)) * 2**24)  # u < share in float32, with u a multiple of 2^-24
    signed = draws.view(np.int32)
    signed -= np.int32(below)
    signed >>= np.int32(31)
    return torch.from_numpy(signed)


def draws24(seed: int, expert: str, tensor: str, start: int, count: int) -> Tensor:
    """The integers behind `uniform`: (count,) int32, uniform on [0, 2^24).

    Example:
        >>> draws24(0, "a", "w", 0, 3).dtype
        torch.int32
    """
    import torch

    draws = _words(seed, expert, tensor, start, count)
    draws >>= np.uint32(8)
    return torch.from_numpy(draws.view(np.int32))


def _words(seed: int, expert: str, tensor: str, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """32-bit words start ... start + count - 1 of the stream, in memory of their own."""
    if start < 0 or count < 0:
        raise ValueError(f"a range of random numbers cannot start at {start} with {count} numbers")
    first = start // _PER_COUNT
    skip = start - first * _PER_COUNT
    stream = np.random.Philox(key=np.array(philox_key(seed, expert, tensor), np.uint64), counter=first)
    words = -(-(skip + count) // 2)  # `integers` over the whole range gives the raw words, and lets other threads run
    raw = np.random.Generator(stream).integers(0, 2**64 - 1, words, dtype=np.uint64, endpoint=True)
    if sys.byteorder == "big":  # the low half of a 64-bit word comes first
        raw = raw.byteswap().view(raw.dtype.newbyteorder())
    return raw.view(np.dtype("<u4"))[skip : skip + count]


def philox_key(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """The two words that key the stream of (seed, expert, tensor)."""
    digest = hashlib.blake2b(digest_size=16, person=b"twinmerge")
    for name in (str(seed), expert, tensor):
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    raw = digest.digest()
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")
