"""Stochastic rounding: one of the two neighbours, the mean kept, everything that the dtype has left alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinmerge.maths.rounding import stochastic

HALVES = (torch.bfloat16, torch.float16)
LAST = 2**24 - 1
G = torch.Generator().manual_seed(0)


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest number of `dtype` up to |x| and the smallest from |x| on, both with x's sign."""
    nearest = x.abs().to(dtype)
    bits = nearest.view(torch.int16)
    down = torch.where(nearest.float() > x.abs(), bits - 1, bits).view(dtype)
    up = torch.where(nearest.float() < x.abs(), bits + 1, bits).view(dtype)
    return down.copysign(x.to(dtype)), up.copysign(x.to(dtype))


@pytest.mark.parametrize(
    ("dtype", "x", "draw", "expected"),
    [
        # 1 + 3/4 of a step of 2^-7: up where the draw is at least 2^24 / 4
        (torch.bfloat16, 1 + 3 * 2**-9, 2**22 - 1, 1.0),
        (torch.bfloat16, 1 + 3 * 2**-9, 2**22, 1 + 2**-7),
        (torch.bfloat16, -1 - 3 * 2**-9, 2**22 - 1, -1.0),
        (torch.bfloat16, -1 - 3 * 2**-9, 2**22, -1 - 2**-7),
        # into the next binade, half way: 2 - 2^-8
        (torch.bfloat16, 2 - 2**-8, 2**23 - 1, 2 - 2**-7),
        (torch.bfloat16, 2 - 2**-8, 2**23, 2.0),
        # float32's smallest number is 2^-149, bfloat16's 2^-133
        (torch.bfloat16, 2**-149, LAST, 2**-133),
        (torch.bfloat16, 2**-149, LAST - 256, 0.0),
        # 1 + 1/4 of a step of 2^-10
        (torch.float16, 1 + 2**-12, 3 * 2**22 - 1, 1.0),
        (torch.float16, 1 + 2**-12, 3 * 2**22, 1 + 2**-10),
        # subnormal: 5/8 of the smallest number, and 3 and a half of it
        (torch.float16, 5 * 2**-27, 3 * 2**21 - 1, 0.0),
        (torch.float16, 5 * 2**-27, 3 * 2**21, 2**-24),
        (torch.float16, -7 * 2**-25, 2**23 - 1, -3 * 2**-24),
        (torch.float16, -7 * 2**-25, 2**23, -4 * 2**-24),
        # from the largest subnormal number to the smallest normal one
        (torch.float16, 2**-14 - 2**-25, 2**23 - 1, 2**-14 - 2**-24),
        (torch.float16, 2**-14 - 2**-25, 2**23, 2**-14),
        # a share below the precision of the draws
        (torch.float16, 2**-60, LAST, 0.0),
        (torch.float16, 2**-48, LAST, 2**-24),
    ],
)
def test_worked_by_hand(dtype: torch.dtype, x: float, draw: int, expected: float) -> None:
    got = stochastic(torch.tensor([x]), dtype, torch.tensor([draw], dtype=torch.int32))
    assert got.dtype == dtype and got.item() == expected


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("draw", [0, 2**23, LAST])
def test_every_number_of_the_dtype_stays_to_the_bit(dtype: torch.dtype, draw: int) -> None:
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    got = stochastic(every.float(), dtype, torch.full(every.shape, draw, dtype=torch.int32))
    number = ~every.isnan()
    assert torch.equal(got.view(torch.int16)[number], every.view(torch.int16)[number])  # both zeros and infinities too
    assert bool(got.isnan()[~number].all())


@pytest.mark.parametrize("dtype", HALVES)
def test_mean_over_all_draws_is_the_number(dtype: torch.dtype) -> None:
    """All values of the bits that are used, so this is the probability itself: exact where no bit lies below them."""
    bits = 16 if dtype == torch.bfloat16 else 13
    draws = torch.arange(2**bits, dtype=torch.int32) << (24 - bits)
    x = torch.cat([torch.randn(20, generator=G), torch.tensor([6e-5, -1.9999, 3e4, 7 * 2.0**-25])])
    for value in x:
        got = stochastic(value.expand(len(draws)), dtype, draws).double()
        assert got.mean().item() == value.item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("scale", [1.0, 3e-6, 1e4])
def test_unbiased_within_four_sigma(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = scale * torch.randn(200_000, generator=generator)
    draws = torch.randint(0, 2**24, x.shape, generator=generator, dtype=torch.int32)
    error = stochastic(x, dtype, draws).double() - x.double()
    down, up = neighbours(x, dtype)
    step, share = (up.double() - down.double()).abs(), (x.double() - down.double()).abs()
    variance = (share * (step - share)).sum().item()
    assert abs(error.sum().item()) <= 4 * math.sqrt(variance) and variance > 0
    assert error.square().sum().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_float64_is_rounded_once_and_without_bias(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for scale in (1.0, 2 * torch.finfo(dtype).tiny):  # also numbers below the smallest normal one
        x = scale * torch.randn(200_000, generator=generator, dtype=torch.float64)
        draws = torch.randint(0, 2**24, x.shape, generator=generator, dtype=torch.int32)
        got = stochastic(x, dtype, draws)
        nearest = x.to(dtype)
        further = torch.nextafter(nearest.float(), torch.where(nearest.double() < x, torch.inf, -torch.inf).float())
        if dtype == torch.float32:
            assert bool(((got == nearest) | (got == further)).all())
        step = torch.finfo(dtype).eps * x.abs().clamp_min(torch.finfo(dtype).tiny)
        error = got.double() - x
        assert bool((error.abs() <= step).all()) and got.dtype == dtype
        assert abs(error.mean().item()) <= 5 * error.std().item() / math.sqrt(len(x))
        assert 0.3 * step.mean() < error.abs().mean() + step.mean() * 0.2


def test_a_double_between_two_floats_goes_to_each_by_its_distance() -> None:
    x = torch.tensor([1 + 2.0**-25], dtype=torch.float64)  # a quarter of the way to the next float32
    up = [
        stochastic(x, torch.float32, torch.tensor([d], dtype=torch.int32)).item() > 1
        for d in (3 * 2**22 - 1, 3 * 2**22)
    ]
    assert up == [False, True]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1), st.integers(0, LAST))
def test_neighbours_only_and_odd(numbers: list[float], draw: int) -> None:
    x = torch.tensor(numbers)
    draws = torch.full(x.shape, draw, dtype=torch.int32)
    for dtype in HALVES:
        got = stochastic(x, dtype, draws)
        down, up = neighbours(x, dtype)
        inside = x.abs() <= torch.finfo(dtype).max
        assert bool(((got == down) | (got == up))[inside].all())
        assert torch.equal(got[~inside], x.to(dtype)[~inside])
        assert torch.equal(stochastic(-x, dtype, draws).view(torch.int16), (-got).view(torch.int16))


def test_beyond_the_largest_number_is_rounding_to_nearest() -> None:
    for dtype, numbers in [
        (torch.float16, [65504.0, 65519.99, 65520.0, -65519.99, -65520.0, 1e30, math.inf, -math.inf]),
        (torch.bfloat16, [3.3895314e38, 3.3961775e38, 3.4e38, -3.3895314e38, -3.4e38, math.inf, -math.inf]),
    ]:
        x = torch.tensor(numbers)
        for draw in (0, LAST):
            got = stochastic(x, dtype, torch.full(x.shape, draw, dtype=torch.int32))
            assert torch.equal(got, x.to(dtype))


def test_nan_stays_nan_whatever_its_bits() -> None:
    x = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    for dtype in HALVES:
        for draw in (0, LAST):
            assert bool(stochastic(x, dtype, torch.full(x.shape, draw, dtype=torch.int32)).isnan().all())


def test_wide_dtypes_shapes_and_another_dtype() -> None:
    x = torch.randn(3, 4, generator=G).T
    draws = torch.randint(0, 2**24, x.shape, generator=G, dtype=torch.int32)
    kept = x.clone()
    assert torch.equal(stochastic(x, torch.float32, draws), x)
    assert torch.equal(stochastic(x, torch.float64, draws), x.double())
    for dtype in HALVES:
        got = stochastic(x, dtype, draws)
        assert got.shape == x.shape and torch.equal(got[2], stochastic(x[2].clone(), dtype, draws[2].clone()))
        assert stochastic(torch.empty(0, 2), dtype, torch.empty(0, 2, dtype=torch.int32)).shape == (0, 2)
        assert stochastic(torch.tensor(1.5), dtype, torch.tensor(7, dtype=torch.int32)).item() == 1.5
    assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="expected bfloat16, float16, float32 or float64, not torch.float8_e5m2"):
        stochastic(x, torch.float8_e5m2, draws)
