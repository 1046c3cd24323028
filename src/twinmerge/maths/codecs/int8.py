"""Eight bits with a scale for each slice."""

from __future__ import annotations

import torch
from torch import Tensor

from twinmerge.maths.codec import TINY, Codec, divisor, rounded_up

LEVELS = 127
MANTISSA = 16  # bits of a scale: level · scale is then exact, so that decoded numbers encode to the same bytes


class Int8(Codec):
    """Eight bits: q = round(x / s), with s = max |x| / 127 of each slice, rounded up to 16 bits, in float32."""

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scales = rounded_up(rows.abs().amax(1) / LEVELS, MANTISSA)
        return (rows / divisor(scales)[:, None]).round().to(torch.int8), scales

    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        if stored.dtype != torch.int8 or scales is None or scales.shape != stored.shape[:1]:
            raise ValueError("eight bits with a scale for each slice")
        return stored.float() * scales[:, None]

    def slice_bytes(self, length: int) -> int:
        return length + 4

    def bound(self, rows: Tensor) -> Tensor:
        return (rows.abs().amax(1, keepdim=True) * (0.5001 / LEVELS) + TINY).expand_as(rows)
