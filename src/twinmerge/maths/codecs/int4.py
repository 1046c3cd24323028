"""Four bits with a scale for each 64 numbers of a slice."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.maths.codec import TINY, Codec, divisor, rounded_up

LEVELS = 7
GROUP = 64  # numbers that share a scale
MANTISSA = 8  # bits of a scale, which is bfloat16
LEAST = 2.0**-126  # of a scale that keeps all its bits in bfloat16


class Int4(Codec):
    """Four bits: q = round(x / s), with s = max |x| / 7 of each 64 numbers of a slice, rounded up to bfloat16.

    Two numbers to a byte, the earlier one in the low half, 8 more than q.
    """

    packs = True

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        grouped = _grouped(rows)
        scales = rounded_up(grouped.abs().amax(2) / LEVELS, MANTISSA)
        scales = torch.where(scales < LEAST, 0.0, scales)
        q = (grouped / divisor(scales)[..., None]).round().add(8).to(torch.uint8).flatten(1)
        q = q[:, : rows.shape[1] + rows.shape[1] % 2]
        return q[:, 0::2] | q[:, 1::2] << 4, scales.bfloat16()

    def decode(self, stored: Tensor, scales: Tensor | None, length: int) -> Tensor:
        if stored.dtype != torch.uint8 or stored.shape[1:] != (-(-length // 2),):
            raise ValueError("four bits")
        if scales is None or scales.shape != (len(stored), -(-length // GROUP)):
            raise ValueError("scales of four bits")
        q = torch.stack([stored & 15, stored >> 4], 2).flatten(1)[:, :length]
        return (q.float() - 8) * scales.float().repeat_interleave(GROUP, 1)[:, :length]

    def slice_bytes(self, length: int) -> int:
        return -(-length // 2) + 2 * -(-length // GROUP)

    def bound(self, rows: Tensor) -> Tensor:
        steps = _grouped(rows).abs().amax(2) * (0.504 / LEVELS) + TINY
        return steps.repeat_interleave(GROUP, 1)[:, : rows.shape[1]]


def _grouped(rows: Tensor) -> Tensor:
    """(slices, groups, 64), the last group padded with zeros."""
    padded: Tensor = F.pad(rows, (0, -rows.shape[1] % GROUP))
    return padded.reshape(len(rows), -1, GROUP)
