"""Exact-k selection: the sorted reference, any tiling, bfloat16 ties, the densities that floats get wrong."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.maths.select import (
    bracket,
    coarse,
    fine,
    in_bracket,
    keep_above,
    keep_count,
    largest,
    locate,
    magnitude_bits,
    narrowed,
    never,
    pin,
    ties,
)


def by_sorting(x: np.ndarray, k: int) -> np.ndarray:
    """The reference: a stable sort by magnitude, largest first."""
    mask = np.zeros(x.shape, dtype=bool)
    mask[np.argsort(-np.abs(x), kind="stable")[:k]] = True
    return mask


def in_three_passes(tiles: list[Tensor], k: Tensor) -> Tensor:
    """What the streaming route keeps, tiles in order; passes 1 and 2 read them backwards to prove they may."""
    high = sum((coarse(t) for t in reversed(tiles)), torch.zeros((), dtype=torch.int64))
    bins, rest = locate(high, k)
    low = sum((fine(t, bins) for t in reversed(tiles)), torch.zeros((), dtype=torch.int64))
    thresholds, take = pin(bins, low, rest)
    left, kept = take.copy(), []
    for t in tiles:
        out = torch.full_like(t, torch.nan)
        for row, to, bits, room in zip(t.contiguous(), out, thresholds.tolist(), left.tolist(), strict=True):
            keep_above(row, bits, room, to)
        kept.append(out)
        left = np.maximum(left - ties(t, thresholds), 0)
    return torch.cat(kept, dim=1)


values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -3e38, 0.1, float(np.nextafter(np.float32(1), np.float32(2)))])


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(
        st.lists(values | st.floats(width=32, allow_nan=False), min_size=24, max_size=24),
        max_size=3,
        min_size=1,
    ),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    k=st.lists(st.integers(0, 30), min_size=3, max_size=3),
)
def test_equals_sorting_for_any_tiling(rows: list[list[float]], cuts: list[int], k: list[int]) -> None:
    x = torch.tensor(rows, dtype=torch.float32)
    wanted = torch.tensor(k[: len(x)])
    expected = np.stack([by_sorting(row, n) for row, n in zip(x.numpy(), k, strict=False)])
    edges = [0, *sorted(cuts), 24]
    tiles = [x[:, a:b] for a, b in itertools.pairwise(edges)]
    assert np.array_equal(in_three_passes(tiles, wanted).numpy(), np.where(expected, x, 0))
    assert np.array_equal(largest(x, wanted).numpy(), expected)
    assert np.array_equal(largest(x.view(-1, 4, 6), wanted).view(-1, 24).numpy(), expected)


def test_large_tensor_with_zeros_and_duplicates_equals_partition() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal(200_000).astype(np.float32)
    x[rng.integers(0, x.size, 1000)] = 0
    x[rng.integers(0, x.size, 100)] = x[7]
    for k in (1, 40_000, 100_000, 199_500, 200_000):
        mask = largest(torch.from_numpy(x)[None], k)[0].numpy()
        assert np.array_equal(mask, by_sorting(x, k))
        threshold = np.partition(np.abs(x), x.size - k)[x.size - k]
        assert np.abs(x)[mask].min() == threshold


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_bfloat16_ties_keep_exactly_k(density: float) -> None:
    g = torch.Generator().manual_seed(0)
    base = (torch.randn(200_000, generator=g) * 0.02).bfloat16()
    expert = (base.float() + torch.randn(200_000, generator=g) * 3e-4).bfloat16()
    delta = expert.float() - base.float()
    k = keep_count(density, delta.numel())
    mask = largest(delta[None], k)[0]
    assert int(mask.sum()) == k == round(density * 200_000)
    threshold = delta.abs().sort(descending=True).values[k - 1]
    assert int((delta.abs() >= threshold).sum()) > k * 1.01  # what a threshold would have kept
    assert np.array_equal(mask.numpy(), by_sorting(delta.numpy(), k))


def test_bracket_of_a_sample_holds_the_rank_and_counts_what_is_above() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 400_000, generator=g)
    x[1] = (x[1] * 64).round() / 64  # many equal values
    bits = magnitude_bits(x)
    for share in (0.01, 0.2, 0.5, 0.9):
        k = int(share * x.shape[1])
        found = bracket(bits[:, ::2], torch.full((2,), k // 2))
        assert found is not None
        for e, row in enumerate(x):
            above, bins, ties, between = in_bracket(row, found, e)
            inside = len(bins) + sum(ties)
            assert above < k <= above + inside and inside < 0.05 * x.shape[1] and not between
            at, size, shared = int(found.low[e]), int(found.width[e]), found.shared[e].tolist()
            values = [b for b in magnitude_bits(row[None])[0].tolist() if at <= b < at + size]
            assert ties == [values.count(v) for v in shared]
            assert sorted(bins.tolist()) == sorted(b - at >> int(found.shift[e]) for b in values if b not in shared)
        exact = bits[1].sort(descending=True).values[k - 1]
        assert int(exact) in found.shared[1]


def test_bracket_of_an_expert_that_keeps_nothing_is_above_all_numbers() -> None:
    found = bracket(torch.tensor([[1, 2, 3], [1, 2, 3]], dtype=torch.int32), torch.tensor([0, 2]), 1 << 31)
    assert found is not None and found.low.tolist() == [never(), 0]
    row = torch.tensor([0.0, float("inf"), -3.4e38])
    above, bins, ties, between = in_bracket(row, found, 0)
    assert (above, bins.tolist(), ties, between) == (0, [], [0] * 4, 0)


def test_bracket_is_none_where_too_many_values_lie_inside() -> None:
    assert bracket(torch.tensor([[1, 2, 2**30]], dtype=torch.int32), torch.tensor([2])) is None


def test_small_examples() -> None:
    x = torch.arange(1.0, 11.0)[None]
    assert largest(x, keep_count(0.2, 10)).nonzero()[:, 1].tolist() == [8, 9]
    assert largest(-x, 2).nonzero()[:, 1].tolist() == [8, 9]
    equal = torch.full((1, 5), 0.5)
    assert largest(equal, keep_count(0.2, 5)).tolist() == [[True, False, False, False, False]]


def test_nothing_everything_and_tiny_tensors() -> None:
    x = torch.tensor([[0.0, -0.0, 5.0], [float("inf"), 0.0, 1.0]])
    assert not largest(x, 0).any()
    assert largest(x, 3).all() and largest(x, 99).all()
    assert largest(x, torch.tensor([0, 1])).tolist() == [[False] * 3, [True, False, False]]
    scalars = torch.tensor([1.0, 0.0])  # two experts of a 0-d tensor
    assert largest(scalars, 1).tolist() == [True, True] and not largest(scalars, 0).any()
    assert largest(torch.zeros(2, 0), 3).shape == (2, 0)
    assert largest(torch.zeros(2, 3, 0, 4), 0).shape == (2, 3, 0, 4)


def test_a_view_that_is_not_contiguous_is_read_in_its_own_order() -> None:
    x = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])
    assert largest(x.mT, 1).tolist() == largest(x.mT.contiguous(), 1).tolist() == [[[False, True], [False, False]]]


def test_only_float32_and_float64() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        largest(torch.zeros(1, 2, dtype=torch.bfloat16), 1)


wide = st.sampled_from([0.0, -0.0, 1.0, 1 + 2.0**-52, -1.0, 1 - 2.0**-53, 5e-324, -1e308, 1e-45, float("inf")])


@settings(deadline=None, max_examples=60)
@given(st.lists(wide | st.floats(allow_nan=False), min_size=1, max_size=24), st.integers(0, 26))
def test_float64_equals_sorting(numbers: list[float], k: int) -> None:
    x = torch.tensor([numbers], dtype=torch.float64)
    kept = by_sorting(x[0].numpy(), k)
    assert np.array_equal(largest(x, k)[0].numpy(), kept)
    if k >= x.numel():
        return
    bits = int(magnitude_bits(x)[0].sort(descending=True).values[k - 1]) if k else never(wide=True)
    room = k - int((magnitude_bits(x)[0] > bits).sum())
    out = torch.empty_like(x[0])
    keep_above(x[0], bits, room, out)
    assert np.array_equal(out.numpy(), np.where(kept, x[0].numpy(), 0))


@settings(deadline=None, max_examples=200)
@given(st.floats(min_value=0, allow_nan=False), st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_a_float64_threshold_among_float32_numbers(threshold: float, numbers: list[float]) -> None:
    bits, equal = narrowed(int(magnitude_bits(torch.tensor([[threshold]], dtype=torch.float64))))
    x = torch.tensor([*numbers, threshold, -threshold])
    exact = x.double().abs()
    assert torch.equal(magnitude_bits(x[None])[0] > bits, exact > threshold)
    if equal:
        assert torch.equal(magnitude_bits(x[None])[0] == bits, exact == threshold)
    else:
        assert not (exact == threshold).any()


def test_histograms_of_an_array_are_those_of_a_tensor() -> None:
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    x[0, :9] = torch.tensor([0.0, -0.0, 1e-45, float("inf"), 1, -1, 3e38, -1e-38, 0.5])
    own, bins = x.numpy(), np.array([0x3F80, 0x3F00])
    assert np.array_equal(coarse(own), coarse(x)) and np.array_equal(fine(own, bins), fine(x, bins))
    assert np.array_equal(magnitude_bits(own), magnitude_bits(x)) and isinstance(magnitude_bits(own), np.ndarray)


def test_locate_counts_from_the_top() -> None:
    counts = torch.tensor([[5, 0, 4, 1]])
    found = {k: tuple(t.item() for t in locate(counts, k)) for k in (0, 1, 2, 5, 6, 10, 11)}
    assert found == {0: (3, 0), 1: (3, 1), 2: (2, 1), 5: (2, 4), 6: (0, 1), 10: (0, 5), 11: (0, 5)}


@pytest.mark.parametrize(
    "density, total, kept",
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 3, 0),
        (1 / 3, 3, 1),
        (0.2, 10, 2),
        (0, 7, 0),
        (1, 7, 7),
        (0.5, 1, 0),
        (1.0, 70_000_000_000, 70_000_000_000),
        (0.7, 10**11, 7 * 10**10),
        (0.001, 1000, 1),
        (0.2, 0, 0),
    ],
)
def test_keep_count(density: float, total: int, kept: int) -> None:
    assert keep_count(density, total) == kept


@pytest.mark.parametrize("density", [-0.1, 1.0001, 20, float("nan"), float("inf")])
def test_density_outside_0_1_is_refused(density: float) -> None:
    with pytest.raises(TwinmergeError, match=r"outside \[0, 1\]"):
        keep_count(density, 10)


def test_every_two_digit_density_is_read_as_written() -> None:
    assert [keep_count(i / 100, 100) for i in range(101)] == list(range(101))
