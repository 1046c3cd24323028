"""Checksums of tensors: XXH3-128 of each block of 65,536 elements, then of the blocks' checksums in order.

They find damage and mix-ups at the speed of memory, and ranges can be summed in any order by any number of threads.
They are no signature: who can change a folder can change the checksums in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from twinmerge.store.foreign import open_regular

BLOCK = 65_536


def block_digests(stored: NDArray[np.uint8], itemsize: int) -> list[str]:
    """The checksum of each block of a tensor's elements, as they are stored; a range must start at a whole block.

    Args:
        stored: their bytes, 1-D.
        itemsize: bytes of one element.

    Example:
        >>> [len(d) for d in block_digests(np.zeros(2 * 65_537, np.uint8), 2)]
        [32, 32]
    """
    raw, step = stored.data, BLOCK * itemsize
    if raw.nbytes <= step:
        return [xxhash.xxh3_128_hexdigest(raw)] if raw.nbytes else []
    return [xxhash.xxh3_128_hexdigest(raw[at : at + step]) for at in range(0, raw.nbytes, step)]


def joined(blocks: Iterable[str]) -> str:
    """The checksum of a tensor out of those of its blocks.

    Example:
        >>> joined(block_digests(np.zeros(12, np.uint8), 4)) == streamed(lambda start, out: out.fill(0), 4, 3)
        True
    """
    return xxhash.xxh3_128_hexdigest("".join(blocks).encode())


def streamed(read: Callable[[int, NDArray[np.uint8]], object], itemsize: int, numel: int) -> str:
    """The checksum of a tensor that is read piece by piece.

    Args:
        read: fills bytes with the elements from a start on.
        itemsize, numel: of the tensor.
    """
    blocks: list[str] = []
    held = np.empty(min(numel, 16 * BLOCK) * itemsize, np.uint8)
    for start in range(0, numel, 16 * BLOCK):
        part = held[: min(16 * BLOCK, numel - start) * itemsize]
        read(start, part)
        blocks += block_digests(part, itemsize)
    return joined(blocks)


def of_bytes(content: Any) -> str:
    """XXH3-128 of bytes.

    Example:
        >>> of_bytes(b"abc")
        '06b05ab6733a618578af5f94892f3950'
    """
    return xxhash.xxh3_128_hexdigest(content)


def of_file(file: Path) -> str:
    """XXH3-128 of all bytes of a file, read in pieces.

    Raises:
        TwinmergeError: a pipe or another thing that is no file.
    """
    found = xxhash.xxh3_128()
    with open(open_regular(file), "rb") as content:
        while piece := content.read(1 << 22):
            found.update(piece)
    return found.hexdigest()


UNSEALED = "0" * 32
SEAL = re.compile(rb'"seal": ?"([0-9a-f]{32})"')


def sealed(text: bytes) -> bytes:
    """The text with the checksum of all its bytes in the place of its first `"seal": "000…"`.

    Inside a string of JSON the quotes of such a key would be escaped, so it stands where it is meant.

    Example:
        >>> import json
        >>> text = sealed(json.dumps({"seal": UNSEALED, "a": 1}).encode())
        >>> is_sealed(text), is_sealed(text.replace(b"1", b"2")), is_sealed(b"{}")
        (True, False, False)
    """
    found = SEAL.search(text)
    assert found is not None
    assert found[1] == UNSEALED.encode()
    return text[: found.start(1)] + of_bytes(text).encode() + text[found.end(1) :]


def is_sealed(text: bytes) -> bool:
    """Whether the text is one that `sealed` gave."""
    found = SEAL.search(text)
    if found is None:
        return False
    return found[1] == of_bytes(text[: found.start(1)] + UNSEALED.encode() + text[found.end(1) :]).encode()
