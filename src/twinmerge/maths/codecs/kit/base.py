"""A codec, and the exact scales that codecs are written with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from twinmerge.errors import ModelError

if TYPE_CHECKING:  # the command's help names the codecs, without PyTorch's import
    from torch import Tensor

TINY = 2.0**-120  # numbers nearer to 0 may be stored as 0


class Codec(ABC):
    """How slices of numbers are stored; what is read encodes to the same bytes again.

    Class attributes
        sliced: each slice has scales of its own; without, numbers are stored one by one, and all come as one slice.
        packs: a stored slice has not one entry for each number, so that the shape is noted beside it.

    Example:
        >>> class Plain(Codec):
        ...     sliced = False
        ...     def encode(self, rows):
        ...         return rows, None
        ...     def decode(self, stored, scales, length):
        ...         return stored
        ...     def slice_bytes(self, length):
        ...         return 4 * length
        ...     def bound(self, rows):
        ...         return 0 * rows
        >>> Plain().slice_bytes(384)
        1536
    """

    sliced: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    @abstractmethod
    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Numbers as they are stored, and the scales of each slice.

        Args:
            rows: (slices, length) float32, neither of them 0 where `sliced`.

        Returns:
            stored: (slices, length), or (slices, …) where it `packs`; scales: (slices, …), None where not `sliced`.
        """

    @abstractmethod
    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        """What `encode` stored, (slices, length) float32.

        Raises:
            ValueError: stored numbers or scales of another dtype or shape.
        """

    @abstractmethod
    def slice_bytes(self, length: int) -> int:
        """Bytes of a slice of so many numbers, with its scales."""

    @abstractmethod
    def bound(self, rows: Tensor) -> Tensor:
        """No number of (slices, length) is off by more, in that shape."""


def half(x: Tensor) -> Tensor:
    """Numbers in half precision.

    Raises:
        ModelError: numbers beyond it.
    """
    found = x.half()
    if not bool(found.isfinite().all()):
        raise ModelError(f"{float(x.abs().max()):.4g} is beyond half precision. Use no codec.")
    return found


def divisor(scales: Tensor) -> Tensor:
    """What numbers are divided by: the scales, and 1 where all is zero."""
    return scales.where(scales > 0, 1.0)


def rounded_up(scales: Tensor, bits: int) -> Tensor:
    """To the next number of so many bits, so that a level times its scale is exact; zero, and numbers that are nearly
    zero, stay what they are."""
    import torch

    mantissa, exponent = torch.frexp(scales.double())
    return torch.ldexp((mantissa * 2**bits).ceil() / 2**bits, exponent).float()
