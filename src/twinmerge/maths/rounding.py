"""Rounding up or down by chance, so that the mean over many numbers is kept where rounding to nearest would lose it."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 2.0**-14  # float16's smallest normal number; below, its numbers are 2^-24 apart


def stochastic(x: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Round each number to one of its two neighbours in `dtype`, to the nearer one more often: the mean is x.

    A number that `dtype` has stays what it is, and -x is rounded as x is. Beyond the largest finite number, and for
    NaN, it is rounding to nearest. The bits are a function of x and `draws` alone.

    Args:
        x: float32.
        dtype: bfloat16 or float16; float32 and float64 have every x, so nothing is drawn.
        draws: int32 of x's shape, uniform over 0 ... 2^24 - 1; a number goes away from zero if its draw is high
            enough.

    Returns:
        `dtype`, of x's shape.

    Raises:
        ValueError: another dtype.

    Example:
        >>> x = torch.full((4,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7
        >>> stochastic(x, torch.bfloat16, torch.tensor([0, 2**23, 3 * 2**22 - 1, 3 * 2**22], dtype=torch.int32))
        tensor([1.0000, 1.0000, 1.0000, 1.0078], dtype=torch.bfloat16)

    Source: Gupta et al., Deep learning with limited numerical precision (ICML 2015), section 3.
    """
    if dtype in (torch.float32, torch.float64):
        return x.to(dtype)
    if dtype == torch.bfloat16:
        # The 16 bits to drop plus 16 random ones carry into the bits that stay with just the right probability.
        down = (x.view(torch.int32) + (draws >> 8)).bitwise_and_(-1 << 16).view(torch.float32)
    elif dtype == torch.float16:
        # The same in float64: there tiny numbers, moved up by 2^-14, have 42 bits to drop as all others do.
        lift = torch.where(x.abs() < _TINY, _TINY, 0.0).copysign_(x).double()
        bits = (x + lift).view(torch.int64) + (draws.long() << 18)
        down = bits.bitwise_and_(-1 << 42).view(torch.float64).sub_(lift).copysign_(x)
    else:
        raise ValueError(f"expected bfloat16, float16, float32 or float64, not {dtype}")
    return torch.where(x.abs() <= torch.finfo(dtype).max, down.to(dtype), x.to(dtype))
