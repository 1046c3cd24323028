"""Which part of a stored tensor goes into a merge: all of it, some rows, one matrix of a stack, or its axes in
another order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import RecipeError

Axis = int | range | tuple[int, ...] | None
"""Of one axis: one index (the axis goes), a run of them, the indices to take one by one, or all."""

Read = Callable[[int, NDArray[np.uint8]], None]
"""Fills bytes with a stored tensor's elements from a flat index on."""

KINDS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8"), 1: np.dtype("u1")}


@dataclass(frozen=True)
class View:
    """A part of a tensor, as NumPy's `x[np.ix_(...)].transpose(order)` would give it.

    Attributes:
        axes: for each leading axis what is taken of it; axes that are not named are taken whole.
        order: the axes of what was taken, in the order in which the view has them; empty for as they are.

    Example:
        >>> (View((2,)).shape((8, 4, 3)), View((range(1, 3),)).shape((8, 4)),
        ...  View((None, (3, 0, 1)), (1, 0)).shape((8, 4)))
        ((4, 3), (2, 4), (3, 8))
    """

    axes: tuple[Axis, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it is the tensor as it is."""
        return not self.order and all(axis is None for axis in self.axes)

    def shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """The shape of the view of a tensor.

        Args:
            stored: the tensor's shape.

        Raises:
            RecipeError: the tensor has no such axis or index.
        """
        self._check(stored)
        axes = self._axes(stored)
        sizes = [len(axis) for axis in axes if not isinstance(axis, int)]
        if self.order and sorted(self.order) != list(range(len(sizes))):
            raise RecipeError(f"The order of axes {list(self.order)} is none of {len(sizes)} axes. Name each once.")
        return tuple(sizes[i] for i in self.order) if self.order else tuple(sizes)

    def read(self, read: Read, stored: Sequence[int], itemsize: int, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the view's elements from `start` on, flat.

        Rows that follow each other are read at once. A view that has its axes in another order reads the whole tensor.

        Args:
            read: gives the stored tensor's elements.
            stored: its shape.
            itemsize: bytes of one element.
            start: the first element of the view that is wanted.
            out: bytes to fill, whole elements.
        """
        count = out.nbytes // itemsize
        if not count:
            return
        if self.whole:
            read(start, out)
            return
        kind, axes = KINDS[itemsize], self._axes(stored)
        lead = next((i for i, axis in enumerate(axes) if not isinstance(axis, int)), len(axes))
        offset = sum(at * math.prod(stored[i + 1 :]) for i, at in enumerate(axes[:lead]) if isinstance(at, int))
        if lead == len(axes):  # one number
            read(offset, out)
            return
        own, inner = stored[lead:], axes[lead:]
        if self.order:
            numbers = _taken(_rows(read, offset, own, range(own[0]), kind), inner)
            out[:] = (
                np.ascontiguousarray(numbers.transpose(self.order)).reshape(-1)[start : start + count].view(np.uint8)
            )
            return
        first = inner[0]
        assert not isinstance(first, int)
        wide = math.prod(len(axis) for axis in inner[1:] if not isinstance(axis, int))
        top, end = start // wide, -(-(start + count) // wide)
        rows = _rows(read, offset, own, first[top:end], kind)
        numbers = _taken(rows, (range(len(rows)), *inner[1:])).reshape(-1)
        out[:] = numbers[start - top * wide :][:count].view(np.uint8)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data; empty for the whole tensor."""
        found: dict[str, Any] = {}
        if any(axis is not None for axis in self.axes):
            found["axes"] = [_plain(axis) for axis in self.axes]
        return found | ({"order": list(self.order)} if self.order else {})

    @classmethod
    def of(cls, raw: object, where: str) -> View:
        """Out of plain data.

        Raises:
            RecipeError: it is no view.

        Example:
            >>> View.of({"axes": [2, None, {"from": 0, "to": 4}]}, "here")
            View(axes=(2, None, range(0, 4)), order=())
        """
        keys = raw.keys() if isinstance(raw, dict) else {None}
        if not keys <= {"axes", "order"}:
            raise RecipeError(f"{where}: {raw!r:.80} is no view. It has axes (a list) and order (a list).")
        assert isinstance(raw, dict)
        axes, order = raw.get("axes", []), raw.get("order", [])
        if not isinstance(axes, list) or not _numbers(order):
            raise RecipeError(f"{where}: {raw!r:.80} is no view. It has axes (a list) and order (a list).")
        return cls(tuple(_axis(axis, where) for axis in axes), tuple(order))

    def _check(self, stored: Sequence[int]) -> None:
        if len(self.axes) > len(stored):
            raise RecipeError(f"A view names {len(self.axes)} axes of a tensor of shape {list(stored)}.")
        for axis, size in zip(self.axes, stored, strict=False):
            low, high = (0, 0) if axis is None or axis in (range(0), ()) else _bounds(axis)
            if axis is not None and not 0 <= low <= high < max(size, 1):
                raise RecipeError(f"A view asks for index {low if low < 0 else high} of an axis of {size}.")
            if isinstance(axis, int) and not size:
                raise RecipeError("A view asks for an index of an axis of 0.")

    def _axes(self, stored: Sequence[int]) -> list[int | range | tuple[int, ...]]:
        named = [*self.axes, *[None] * (len(stored) - len(self.axes))]
        return [range(size) if axis is None else axis for axis, size in zip(named, stored, strict=True)]


WHOLE = View()


def _bounds(axis: int | range | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(axis, range):  # of step 1, and maybe longer than any loop
        return axis.start, axis.stop - 1
    return (axis, axis) if isinstance(axis, int) else (min(axis), max(axis))


def _rows(
    read: Read, offset: int, shape: Sequence[int], rows: range | tuple[int, ...], kind: np.dtype[Any]
) -> NDArray[Any]:
    """Some rows of a tensor that begins at `offset`; those that follow each other are read at once."""
    wide = math.prod(shape[1:])
    found = np.empty((len(rows), *shape[1:]), kind)
    flat = found.reshape(len(rows), wide)
    at = 0
    while at < len(rows):
        stop = at + 1
        while stop < len(rows) and rows[stop] == rows[stop - 1] + 1:
            stop += 1
        if wide:
            read(offset + rows[at] * wide, flat[at:stop].reshape(-1).view(np.uint8))
        at = stop
    return found


def _taken(x: NDArray[Any], axes: Sequence[int | range | tuple[int, ...]]) -> NDArray[Any]:
    """Of each axis what is named."""
    for i in reversed(range(len(axes))):  # from the last, since one index takes its axis away
        axis = axes[i]
        x = x.take(axis if isinstance(axis, int) else np.asarray(axis, np.int64), axis=i)
    return x


def _numbers(raw: object) -> bool:
    return isinstance(raw, list) and all(type(each) is int for each in raw)


def _plain(axis: Axis) -> Any:
    if isinstance(axis, range):
        return {"from": axis.start, "to": axis.stop}
    return list(axis) if isinstance(axis, tuple) else axis


def _axis(raw: object, where: str) -> Axis:
    if raw is None or type(raw) is int:
        return raw
    if isinstance(raw, dict) and raw.keys() == {"from", "to"} and _numbers(list(raw.values())):
        return range(raw["from"], raw["to"])
    if _numbers(raw):
        return tuple(raw)  # type: ignore[arg-type]
    raise RecipeError(
        f"{where}: {raw!r:.80} is no part of an axis. Write an index, a list of them, {{from: …, to: …}}, or null "
        "for all."
    )
