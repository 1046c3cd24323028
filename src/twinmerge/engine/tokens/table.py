"""A table with a row for each token of the output, read row by row from the tables that the models have."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.engine.tokens.rows import MEAN, PADDING, ZEROS, Rows
from twinmerge.models.opened import OpenedModel, as_bytes
from twinmerge.store.header import SIZES
from twinmerge.store.values import decoded

if TYPE_CHECKING:
    from twinmerge.store.checkpoint import Spec
    from twinmerge.store.ranges import Flat

BLOCK = 1 << 20  # elements that are summed at once for the mean of all rows


class Table:
    """One tensor of one model in the output's order of tokens; nothing of it is kept in memory.

    Args:
        name: of the tensor, canonical.
        rows: where each row comes from.
        models: all models, by the numbers that `rows` has.
        code: the dtype of the model's own rows.

    Attributes:
        code: the dtype that is read: that of all rows where it is one and none is a mean, else F32, or F64 where some
            have it.
    """

    low = None  # as `Changed` has them
    elsewhere = True

    def __init__(self, name: str, rows: Rows, models: Sequence[OpenedModel], width: int, code: str) -> None:
        self.name, self.rows, self.models, self.width = name, rows, models, width
        self.starts = _runs(rows)
        of = np.unique(rows.source)
        read = [*of[of >= 0].tolist(), *(rows.inputs if MEAN in of or PADDING in of else ())]
        self.read_of = [(models[number], name) for number in dict.fromkeys(read)]
        self._codes: Mapping[int, str] = {number: models[number].range_code(name) for number in {*read}}
        wide = "F64" if "F64" in (code, *self._codes.values()) else "F32"
        narrow = {code, *self._codes.values()} == {code} and MEAN not in of and PADDING not in of
        self.code = code if narrow else wide
        self._lock = threading.Lock()
        self._mean: NDArray[Any] | None = None

    def range_code(self, stored: str) -> str:
        """The dtype that is read."""
        return self.code

    def read_range(self, stored: Callable[[int, Flat], None], spec: Spec, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat; what is stored is read of every model by itself."""
        for first, at, to in parts_by_run(self.starts, self.width, SIZES[self.code], start, out):
            self._fill(first, at, to)

    def _fill(self, first: int, start: int, to: NDArray[np.uint8]) -> None:
        """Elements from `start` on, of a run of rows that begins at row `first`."""
        source, offset = int(self.rows.source[first]), start - first * self.width
        if source >= 0:
            self._read(source, int(self.rows.row[first]) * self.width + offset, to)
        elif source == ZEROS:
            to.fill(0)
        elif source == MEAN:
            numbers = to.view(self._dtype)
            numbers.fill(0)
            held = self.rows.held[:, first]
            each = np.empty_like(to)
            for number, row in zip(self.rows.inputs, held.tolist(), strict=True):
                if row >= 0:
                    self._read(number, row * self.width + offset, each)
                    numbers += each.view(self._dtype)
            numbers /= int((held >= 0).sum())
        else:
            column = np.arange(start, start + to.nbytes // SIZES[self.code]) % self.width
            to.view(self._dtype)[:] = self._padding[column]

    @cached_property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(np.float64 if self.code == "F64" else np.float32)

    def _read(self, number: int, start: int, to: NDArray[np.uint8]) -> None:
        """Elements of a model's own table, in the dtype of this one."""
        model, code = self.models[number], self._codes[number]
        if code == self.code:
            model.read_range(self.name, start, to)
            return
        stored = np.empty(to.nbytes // SIZES[self.code] * SIZES[code], np.uint8)
        model.read_range(self.name, start, stored)
        to.view(self._dtype)[:] = decoded(stored, code)

    @property
    def _padding(self) -> NDArray[Any]:
        """The mean over all rows that tokens have."""
        with self._lock:
            if self._mean is None:
                total, count = np.zeros(self.width), 0
                step = max(1, BLOCK // self.width)
                for run in range(len(self.starts) - 1):
                    first, last = int(self.starts[run]), int(self.starts[run + 1])
                    if not self.rows.token[first]:
                        continue
                    count += last - first
                    for row in range(first, last, step):
                        block = np.empty((min(row + step, last) - row, self.width), self._dtype)
                        self._fill(first, row * self.width, block.reshape(-1).view(np.uint8))
                        total += block.sum(0, dtype=np.float64)
                self._mean = (total / max(count, 1)).astype(self._dtype)
            return self._mean


def _runs(rows: Rows) -> NDArray[np.int64]:
    """Where rows that lie one after the other begin, and the end: rows of one model, zeros, padding, or means over the
    same models."""
    source, row, held = rows.source, rows.row, rows.held
    same = (source[1:] == source[:-1]) & (rows.token[1:] == rows.token[:-1])
    follows = row[1:] == row[:-1] + 1
    alike = ((held >= 0)[:, 1:] == (held >= 0)[:, :-1]) & ((held[:, 1:] == held[:, :-1] + 1) | (held[:, 1:] < 0))
    goes_on = np.where(source[1:] >= 0, follows, np.where(source[1:] == MEAN, alike.all(0), True))
    return np.concatenate([[0], 1 + np.flatnonzero(~(same & goes_on)), [len(source)]]).astype(np.int64)


def parts_by_run(
    starts: NDArray[np.int64], width: int, size: int, start: int, out: Flat
) -> Iterator[tuple[int, int, NDArray[np.uint8]]]:
    """The parts of a range that fall into runs of rows, each with the first row of its run and its first element.

    Args:
        starts: the row at which each run begins, and at the end the number of rows.
        width: elements of a row.
        size: bytes of an element.
        start: the first element of the range.
        out: its memory.

    Example:
        >>> parts = parts_by_run(np.array([0, 2, 3]), 2, 1, 3, np.zeros(3, np.uint8))
        >>> [(first, at, len(part)) for first, at, part in parts]
        [(0, 3, 1), (2, 4, 2)]
    """
    to = out if isinstance(out, np.ndarray) else as_bytes(out)
    at, stop = start, start + to.nbytes // size
    run = int(np.searchsorted(starts, at // width, "right")) - 1
    while at < stop:
        end = min(int(starts[run + 1]) * width, stop)
        yield int(starts[run]), at, to[(at - start) * size : (end - start) * size]
        at, run = end, run + 1
