"""What an adapter makes of one tensor of its base, in whatever pieces it is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from twinmerge.maths.lowrank import Factors
from twinmerge.models.opened import OpenedModel, as_tensor
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import torch_dtype

if TYPE_CHECKING:
    from twinmerge.store.ranges import Flat


class Stack(NamedTuple):
    """Low-rank products of the matrices (m, n) along a tensor's leading axis: experts in one tensor (E, m, n)."""

    of: Sequence[Factors]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.of), *self.of[0].shape

    def to(self, dtype: torch.dtype) -> Stack:
        """The same in another dtype."""
        return Stack([each.to(dtype) for each in self.of])

    def entries(self, start: int, stop: int) -> Tensor:
        """Entries start ... stop − 1, flat.

        Example:
            >>> one = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]))
            >>> Stack([one, one]).entries(2, 6).tolist()
            [6.0, 8.0, 3.0, 4.0]
        """
        _, m, n = self.shape
        size = m * n
        parts = []
        for e in range(start // size, -(-stop // size)):
            parts.append(self.of[e].entries(max(start - e * size, 0), min(stop - e * size, size)))
        return torch.cat(parts) if parts else torch.empty(0)


class Rows(NamedTuple):
    """Rows of a table that were trained: `at` (k,), `values` (k, n)."""

    at: Tensor
    values: Tensor

    def put(self, flat: Tensor, start: int) -> None:
        """Put what falls into the entries from `start` on there.

        Example:
            >>> flat = torch.zeros(3)
            >>> Rows(torch.tensor([1]), torch.tensor([[5.0, 6.0]])).put(flat, 1)
            >>> flat.tolist()
            [0.0, 5.0, 6.0]
        """
        width = self.values.shape[1]
        for row, values in zip(self.at.tolist(), self.values, strict=True):
            low, high = max(row * width, start), min((row + 1) * width, start + len(flat))
            if low < high:
                flat[low - start : high - start] = values[low - row * width : high - row * width]


class Change(NamedTuple):
    """x = round(x0 − taken) + added, where x0 is the stored tensor, or `dense` or `rows` in its place.

    dense: the whole tensor; taken: what PEFT takes from the base's weight when it loads the adapter, after which it
    rounds to the stored dtype; added: the adapter's product, with its scaling.
    """

    dense: Tensor | None = None
    rows: Rows | None = None
    taken: Factors | None = None
    added: Factors | Stack | None = None

    @property
    def low(self) -> Factors | None:
        """All of it as one product, where it is one (but for the rounding of what is taken from 16 bits)."""
        if self.dense is not None or self.rows is not None or not isinstance(self.added, Factors):
            return None
        if self.taken is None:
            return self.added
        return Factors(torch.cat([self.added.b, -self.taken.b], 1), torch.cat([self.added.a, self.taken.a]))

    @property
    def elsewhere(self) -> bool:
        """Whether nothing of the stored tensor is read."""
        return self.dense is not None

    @property
    def read_of(self) -> Sequence[tuple[OpenedModel, str]]:
        """Other tensors that it is made of: none."""
        return ()

    def range_code(self, stored: str) -> str:
        """The dtype of what is read: float32 at least where a product is added."""
        return stored if self.added is None or stored == "F64" else "F32"

    def read_range(self, stored: Callable[[int, Flat], None], spec: Spec, start: int, out: Flat) -> None:
        """Fill `out` with elements of the changed tensor from `start` on, flat."""
        to = as_tensor(out, torch_dtype(self.range_code(spec.code)))
        if self.dense is not None:
            values = self.dense.reshape(-1)[start : start + len(to)].clone()
        else:
            values = torch.empty(len(to), dtype=spec.dtype)
            stored(start, values)
        self.apply(values, start, to)

    def apply(self, stored: Tensor, start: int, out: Tensor) -> None:
        """Entries of the changed tensor from those of the stored one, flat, from `start` on, in float32, or in float64 where `out` is;
        `stored` is used up."""
        stop = start + len(stored)
        if self.rows is not None:
            self.rows.put(stored, start)
        if self.added is None:
            out.copy_(stored)
            return
        if self.taken is not None:
            stored = (stored.float() - self.taken.entries(start, stop)).to(stored.dtype)
        added = self.added.to(out.dtype) if out.dtype == torch.float64 else self.added
        torch.add(stored.to(out.dtype), added.entries(start, stop), out=out)
