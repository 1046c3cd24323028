"""Which elements are worked on together: ranges of the output's tensors, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from twinmerge.maths.sums import BLOCK

TILE = 16 * BLOCK  # elements read and written at once, at most: enough for what each range costs
TILE_BYTES = 12 << 20  # of all inputs and the output together, for each worker
SEEN = 4 * BLOCK  # elements that a pass looks at at once, widened to float32 where no compiled code does it
PIECE = 2 * BLOCK  # elements computed on at once: few enough for the cache, enough for what each operation costs
SAMPLE = 1 << 20  # elements that a sampled pass sees, of any model
CHUNK = 1024  # elements side by side in a sample

Shapes = Mapping[str, tuple[int, ...]]


class Range(NamedTuple):
    """Elements start ... stop − 1, flat, of one output tensor."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def tile_of(element_bytes: int) -> int:
    """Elements of a tile, whole blocks of 65,536.

    Args:
        element_bytes: of one element of every input and of the output.

    Example:
        >>> tile_of(10), tile_of(40), tile_of(1000)
        (1048576, 262144, 65536)
    """
    return min(TILE, max(1, TILE_BYTES // (BLOCK * max(1, element_bytes))) * BLOCK)


def ranges(names: Iterable[str], shapes: Shapes, tile: int | None = TILE) -> Iterator[Range]:
    """The tensors cut into tiles, whole blocks of 65,536 but for the last of each; whole tensors where `tile` is None.

    Example:
        >>> [tuple(r) for r in ranges(["a", "b"], {"a": (3, 100_000), "b": ()}, 262_144)]
        [('a', 0, 262144), ('a', 262144, 300000), ('b', 0, 1)]
    """
    for name in names:
        size = math.prod(shapes[name])
        step = tile or max(size, 1)
        for start in range(0, max(size, 1), step):
            yield Range(name, start, min(start + step, size))


def grouped(work: Iterable[Range], tile: int) -> Iterator[list[Range]]:
    """Ranges put together until they hold a tile's elements, so that many tiny tensors cost no more than a few large ones."""
    group: list[Range] = []
    held = 0
    for each in work:
        if group and held + each.size > tile:
            yield group
            group, held = [], 0
        group.append(each)
        held += each.size
    if group:
        yield group


def sample(names: Sequence[str], shapes: Shapes, size: int = SAMPLE) -> Iterator[Range]:
    """Chunks of 1,024 elements at even distances over the whole model; all of it where it is no larger than the sample.

    Example:
        >>> [tuple(r) for r in sample(["a", "b"], {"a": (4096,), "b": (4096,)}, 2048)]
        [('a', 0, 1024), ('b', 0, 1024)]
    """
    total = sum(math.prod(shapes[name]) for name in names)
    if total <= size:
        yield from ranges(names, shapes)
        return
    step = total * CHUNK // size
    begin, wanted = 0, 0
    for name in names:
        end = begin + math.prod(shapes[name])
        while wanted < end:
            start = max(wanted - begin, 0)
            yield Range(name, start, min(start + CHUNK, end - begin))
            wanted += step
        begin = end
