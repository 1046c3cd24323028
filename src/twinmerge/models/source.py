"""What a model's tensors are read from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat


class Source(Protocol):
    """Where a model's tensors are read from, by their stored names."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat, in the stored dtype."""

    def place(self, name: str) -> tuple[int, int]:
        """Where it lies, for reading in the order of the disk: file number and offset."""
