"""Half precision, number by number."""

from __future__ import annotations

from torch import Tensor

from twinmerge.maths.codec import Codec, half


class Float16(Codec):
    """Half precision: two bytes a number, without scales."""

    sliced = False

    def encode(self, rows: Tensor) -> tuple[Tensor, None]:
        return half(rows), None

    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        return stored.float()

    def slice_bytes(self, length: int) -> int:
        return 2 * length

    def bound(self, rows: Tensor) -> Tensor:
        return rows.abs() * 2.0**-11 + 2.0**-25
