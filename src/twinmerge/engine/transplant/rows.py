"""A table whose rows are those of a model in another order, sums of few of them, or their mean."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.engine.rounding import narrowed
from twinmerge.engine.tokens.table import parts_by_run
from twinmerge.errors import ModelError
from twinmerge.models.opened import OpenedModel, as_tensor
from twinmerge.store.header import SIZES, torch_dtype
from twinmerge.store.ranges import bytes_of
from twinmerge.store.values import decoded

if TYPE_CHECKING:
    from twinmerge.store.checkpoint import Spec
    from twinmerge.store.ranges import Flat

SUM, MEAN = -1, -2
"""What a row is where it is not one of the model's: a sum of some, the mean of those that are kept."""
BLOCK = 1 << 22  # elements of rows that are summed at once


@dataclass(frozen=True)
class Composition:
    """What each row is made of.

    Attributes:
        row: (size,) int32, the model's row that it is, or SUM or MEAN.
        start: (size + 1,) int64, where the terms of a sum begin in `index` and `weight`.
        index: int32, rows of the model.
        weight: float64, what they count.
        kept: (tokens,) int32, the rows that the mean is taken of.
    """

    row: NDArray[np.int32]
    start: NDArray[np.int64]
    index: NDArray[np.int32]
    weight: NDArray[np.float64]
    kept: NDArray[np.int32]


class Mixed:
    """One tensor of a model with rows made of its own, read range by range; nothing of it is kept but their mean.

    Rows that are the model's own keep their bits. Sums and the mean are taken in float64 and rounded to the stored
    dtype.

    Args:
        model: as it was.
        name: of the tensor, canonical.
        made_of: what its rows are made of.
        width: elements of a row.
    """

    low = None  # as `Changed` has them
    elsewhere = True

    def __init__(self, model: OpenedModel, name: str, made_of: Composition, width: int) -> None:
        self.model, self.name, self.made_of, self.width = model, name, made_of, width
        self.code = model.range_code(name)
        row = made_of.row
        same = np.where(row[1:] >= 0, row[1:] == row[:-1] + 1, row[1:] == row[:-1]) & (
            (row[1:] >= 0) == (row[:-1] >= 0)
        )
        self.starts = np.concatenate([[0], 1 + np.flatnonzero(~same), [len(row)]]).astype(np.int64)
        self._lock = threading.Lock()

    @property
    def read_of(self) -> Sequence[tuple[OpenedModel, str]]:
        """The tensor that it is made of."""
        return [(self.model, self.name)]

    def range_code(self, stored: str) -> str:
        """The dtype that is read."""
        return self.code

    def read_range(self, stored: Callable[[int, Flat], None], spec: Spec, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat."""
        size, width = SIZES[self.code], self.width
        for first, at, part in parts_by_run(self.starts, width, size, start, out):
            row, end = int(self.made_of.row[first]), at + part.nbytes // size
            if row >= 0:
                self.model.read_range(self.name, (row - first) * width + at, part)
            elif row == MEAN:
                part[:] = self._mean.reshape(width, size)[np.arange(at, end) % width].reshape(-1)
            else:
                self._sums(at, end, part)

    def _sums(self, start: int, stop: int, to: NDArray[np.uint8]) -> None:
        """Elements of rows that are sums; a block of whole rows at once."""
        width, size, begin = self.width, SIZES[self.code], self.made_of.start
        first, last = start // width, -(-stop // width)
        while first < last:
            most = int(np.searchsorted(begin, begin[first] + BLOCK // width, "right")) - 1
            end = min(max(most, first + 1), last)
            terms = slice(int(begin[first]), int(begin[end]))
            used, place = np.unique(self.made_of.index[terms], return_inverse=True)
            values = rows_of(self.model, self.name, used, width)
            made = np.zeros((end - first, width))
            for row in range(first, end):
                own = slice(int(begin[row]) - terms.start, int(begin[row + 1]) - terms.start)
                made[row - first] = self.made_of.weight[terms][own] @ values[place[own]]
            low, high = max(first * width, start), min(end * width, stop)
            raw = self._stored(made)[(low - first * width) * size : (high - first * width) * size]
            to[(low - start) * size : (high - start) * size] = raw
            first = end

    @property
    def _mean(self) -> NDArray[np.uint8]:
        """The mean of the rows that are kept, as it is stored."""
        with self._lock:
            return self._mean_once

    @cached_property
    def _mean_once(self) -> NDArray[np.uint8]:
        kept, total = np.unique(self.made_of.kept), np.zeros(self.width)
        step = max(1, BLOCK // self.width)
        for first in range(0, len(kept), step):
            total += rows_of(self.model, self.name, kept[first : first + step], self.width).sum(0)
        return self._stored(total / len(kept))

    def _stored(self, made: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Numbers as they are stored.

        Raises:
            ModelError: NaN or infinity, or one that does not fit.
        """
        if not np.isfinite(made).all():
            raise ModelError(
                f"Tensor {self.name!r} of {self.model.name} holds NaN or infinity. Take a sound checkpoint of it."
            )
        flat = as_tensor(np.ascontiguousarray(made).reshape(-1).view(np.uint8), torch_dtype("F64"))
        return np.frombuffer(bytes_of(narrowed(flat, self.code, self.name)), np.uint8)


def rows_of(model: OpenedModel, name: str, rows: NDArray[Any], width: int, dtype: type = np.float64) -> NDArray[Any]:
    """Some rows of a table.

    Args:
        model: that has it.
        name: canonical.
        rows: their numbers, ascending.
        width: elements of a row.
        dtype: of what is given.

    Returns:
        (rows, width)
    """
    code = model.range_code(name)
    found: NDArray[Any] = np.empty((len(rows), width), dtype)
    breaks = [0, *(1 + np.flatnonzero(np.diff(rows) != 1)).tolist(), len(rows)]
    for at, end in pairwise(breaks):
        for first in range(at, end, max(1, BLOCK // width)):
            last = min(end, first + max(1, BLOCK // width))
            raw = np.empty((last - first) * width * SIZES[code], np.uint8)
            model.read_range(name, int(rows[first]) * width, raw)
            values = raw.view("<f8") if code == "F64" else decoded(raw, code)
            found[first:last] = values.reshape(-1, width)
    return found
