"""What is read in several passes must be the same in all of them: folded checksums of each tensor of each input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from twinmerge.engine.ranges import Range, Shapes
from twinmerge.errors import ModelError
from twinmerge.store.checksum import BLOCK

MASK = (1 << 128) - 1
Key = tuple[str, str]
"""Input and tensor."""
Digests = dict[str, list[str]]
"""Input -> checksums of the blocks of a range, in order."""
Folds = dict[Key, tuple[int, int]]
"""How many blocks were seen, and Σ (2i + 1) · checksum of block i, modulo 2^128: it adds in any order."""


class Seen:
    """Of every pass, which tensors were read whole, and what they were.

    Args:
        shapes: of the tensors.

    Example:
        >>> seen = Seen({"w": (3,)})
        >>> folds = Folds()
        >>> note(folds, seen.sizes, Range("w", 0, 3), {"base": ["0a"]})
        >>> seen.end(folds)
        >>> seen.compare("base", "w", ["0a"])
        >>> seen.compare("base", "w", ["0b"])
        Traceback (most recent call last):
        ...
        twinmerge.errors.ModelError: Tensor 'w' of the input 'base' changed while it was read. Run again when nobody writes it.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._known: dict[Key, int] = {}

    def end(self, *taken: Folds) -> None:
        """A pass is over.

        Raises:
            TwinmergeError: a tensor that was something else in an earlier one.
        """
        whole: Folds = {}
        for folds in taken:
            for key, found in folds.items():
                _add(whole, key, found)
        for (source, tensor), (count, found_sum) in whole.items():
            if count == -(-self.sizes[tensor] // BLOCK):
                self._require(source, tensor, found_sum)

    def compare(self, source: str, tensor: str, blocks: Sequence[str]) -> None:
        """The checksums of a tensor at the last read.

        Raises:
            TwinmergeError: it was something else in an earlier pass.
        """
        if (source, tensor) in self._known:
            self._require(source, tensor, fold(blocks, 0)[1])

    def _require(self, source: str, tensor: str, found: int) -> None:
        if self._known.setdefault((source, tensor), found) != found:
            raise ModelError(
                f"Tensor {tensor!r} of the input {source!r} changed while it was read. Run again when nobody writes it."
            )


def note(folds: Folds, sizes: Mapping[str, int], each: Range, digests: Mapping[str, Sequence[str]]) -> None:
    """Add what was read of a range; of one that is not of whole blocks (of a sample) nothing is known.

    Args:
        folds: what a worker has noted of a pass so far.
        sizes: name -> elements of a tensor.
        each: the range.
        digests: input -> checksums of its blocks.
    """
    if not digests or each.start % BLOCK or (each.stop % BLOCK and each.stop != sizes[each.name]):
        return
    for source, blocks in digests.items():
        _add(folds, (source, each.name), fold(blocks, each.start // BLOCK))


def fold(blocks: Sequence[str], first: int) -> tuple[int, int]:
    """Of blocks that follow each other, the first being number `first`."""
    return len(blocks), sum((2 * i + 1) * int(digest, 16) for i, digest in enumerate(blocks, first)) & MASK


def _add(folds: Folds, key: Key, found: tuple[int, int]) -> None:
    count, total = folds.get(key, (0, 0))
    folds[key] = count + found[0], (total + found[1]) & MASK
