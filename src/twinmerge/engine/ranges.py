"""Which elements are worked on together: ranges of the output's tensors, in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from twinmerge.maths.sums import BLOCK
from twinmerge.methods.kit.base import Grain

TILE = 16 * BLOCK  # elements read and written at once, at most: enough for what each range costs
TILE_BYTES = 12 << 20  # of all inputs and the output together, for each worker
SEEN = 4 * BLOCK  # elements that a pass looks at at once, widened where no compiled code does it
PIECE = 2 * BLOCK  # elements computed on at once: few enough for the cache, enough for what each operation costs
ROWS = 1 << 20  # elements of a block of rows, at least
SAMPLE = 1 << 20  # elements that a sampled pass sees, of any model
CHUNK = 1024  # elements side by side in a sample

Shapes = Mapping[str, tuple[int, ...]]
Grains = Mapping[str, Grain]
NOWHERE: Grains = MappingProxyType({})
"""No tensor is kept together."""


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


def ranges(names: Iterable[str], shapes: Shapes, tile: int = TILE, grains: Grains = NOWHERE) -> Iterator[Range]:
    """The tensors cut into tiles, whole blocks of 65,536 but for the last of each.

    Args:
        grains: of tensors that are not to be cut anywhere: in one piece ("matrix"), or in blocks of whole rows.

    Example:
        >>> [tuple(r) for r in ranges(["a", "b"], {"a": (3, 100_000), "b": ()}, 262_144)]
        [('a', 0, 262144), ('a', 262144, 300000), ('b', 0, 1)]
        >>> list(ranges(["a"], {"a": (3, 100_000)}, 262_144, {"a": "matrix"}))
        [Range(name='a', start=0, stop=300000)]
    """
    for name in names:
        size, grain = math.prod(shapes[name]), grains.get(name, "element")
        step = {"element": tile, "rows": rows_of(shapes[name]), "matrix": max(size, 1)}[grain]
        for start in range(0, max(size, 1), step):
            yield Range(name, start, min(start + step, size))


def rows_of(shape: Sequence[int]) -> int:
    """Elements of a block of whole rows that is also one of whole blocks of 65,536; the last block of a tensor may be
    smaller.

    Example:
        >>> rows_of((148_383, 768)), rows_of((100, 1000))
        (1179648, 8192000)
    """
    least = math.lcm(BLOCK, max(1, math.prod(shape[1:])))
    return -(-ROWS // least) * least


def grouped(work: Iterable[Range], tile: int) -> Iterator[list[Range]]:
    """Ranges put together until they hold a tile's elements, so that many tiny tensors cost no more than a few large
    ones."""
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
