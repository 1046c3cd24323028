"""Random numbers that depend on what they are for, never on the order of the work.

Each number is a function of (seed, expert, tensor, index). So another expert, thread, tile or machine changes
no mask, and any part of a tensor can be drawn on its own.
"""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import torch
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
        >>> whole = uniform(0, "math", "layers.0.weight", 0, 100)
        >>> torch.equal(whole[37:], uniform(0, "math", "layers.0.weight", 37, 63))
        True

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    if start < 0 or count < 0:
        raise ValueError(f"a range of random numbers cannot start at {start} with {count} numbers")
    first = start // _PER_COUNT
    stream = np.random.Philox(key=_key(str(seed), expert, tensor), counter=first)
    out = np.empty(-(-(start + count) // _PER_COUNT) * _PER_COUNT - first * _PER_COUNT, dtype=np.float32)
    for at in range(0, len(out), _CHUNK):
        part = out[at : at + _CHUNK]
        words = stream.random_raw(len(part) // 2)
        if sys.byteorder == "big":  # the low half of a 64-bit word comes first
            words = words.byteswap().view(words.dtype.newbyteorder())
        halves = words.view(np.dtype("<u4"))
        np.multiply(halves >> np.uint32(8), np.float32(2.0**-24), out=part, casting="same_kind")
    skip = start - first * _PER_COUNT
    return torch.from_numpy(out[skip : skip + count])


def _key(*names: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    digest = hashlib.blake2b(digest_size=16, person=b"twinmerge")
    for name in names:
        encoded = name.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
