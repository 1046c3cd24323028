"""Rounding up or down by chance, so that the mean over many numbers is kept where rounding to nearest would lose it."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}  # of the mantissa


def stochastic(x: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Round each number to one of its two neighbours in `dtype`, to the nearer one more often: the mean is x.

    A number that `dtype` has stays what it is, and -x is rounded as x is. Beyond the largest finite number, and for
    NaN, it is rounding to nearest. The bits are a function of x and `draws` alone.

    Args:
        x: float32 or float64.
        dtype: nothing is drawn where it has every x.
        draws: int32 of x's shape, uniform over 0 ... 2^24 - 1; a number goes away from zero if its draw is high
            enough.

    Returns:
        `dtype`, of x's shape.

    Raises:
        ValueError: another dtype than bfloat16, float16, float32 or float64.

    Example:
        >>> x = torch.full((4,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7
        >>> stochastic(x, torch.bfloat16, torch.tensor([0, 2**23, 3 * 2**22 - 1, 3 * 2**22], dtype=torch.int32))
        tensor([1.0000, 1.0000, 1.0000, 1.0078], dtype=torch.bfloat16)

    Source: Gupta et al., Deep learning with limited numerical precision (ICML 2015), section 3.
    """
    if dtype == torch.float64 or dtype == x.dtype == torch.float32:
        return x.to(dtype)
    if dtype == torch.bfloat16 and x.dtype == torch.float32:
        # The 16 bits to drop plus 16 random ones carry into the bits that stay with just the right probability.
        down = (x.view(torch.int32) + (draws >> 8)).bitwise_and_(-1 << 16).view(torch.float32)
    elif dtype in _BITS:
        # The same in float64: there numbers below the smallest normal one of the dtype, moved up by it, have as many
        # bits to drop as all others do.
        drop, least = 52 - _BITS[dtype], torch.finfo(dtype).tiny
        wide = x.double()
        lift = torch.where(x.abs() < least, least, 0.0).double().copysign_(wide)
        bits = (wide + lift).view(torch.int64) + (draws.long() << (drop - 24))
        down = bits.bitwise_and_(-1 << drop).view(torch.float64).sub_(lift).copysign_(wide)
    else:
        raise ValueError(f"expected bfloat16, float16, float32 or float64, not {dtype}")
    return torch.where(x.abs() <= torch.finfo(dtype).max, down.to(dtype), x.to(dtype))
