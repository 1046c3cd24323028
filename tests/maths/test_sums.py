"""Blocked sums: the same bits for any tiling and thread count, and right to float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.sums import BLOCK, block_sums, blocked_dot, total

G = torch.Generator().manual_seed(0)
X = torch.randn(20 * BLOCK + 12_345, generator=G)
Y = torch.randn(20 * BLOCK + 12_345, generator=G) + X


@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.integers(0, 20), max_size=5))
def test_any_tiling_by_whole_blocks_has_the_same_bits(cuts: list[int]) -> None:
    edges = [0, *(c * BLOCK for c in sorted(cuts)), len(X)]
    tiles = [slice(a, b) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat([blocked_dot(X[t], Y[t]) for t in tiles]), blocked_dot(X, Y))
    assert torch.equal(torch.cat([block_sums(X[t]) for t in tiles]), block_sums(X))


def test_any_thread_count_has_the_same_bits() -> None:
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(blocked_dot(X, Y))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_right_to_float64() -> None:
    exact = math.fsum((X.double() * Y.double()).tolist())
    assert total(blocked_dot(X, Y)) == pytest.approx(exact, rel=1e-14)
    assert total(block_sums(X)) == pytest.approx(math.fsum(X.tolist()), rel=1e-12)
    assert block_sums(X).dtype == torch.float64 and len(block_sums(X)) == 21


def test_order_of_the_partial_sums_does_not_matter() -> None:
    partials = blocked_dot(X, Y)
    assert total(partials) == total(partials.flip(0)) == total(partials[:7], partials[7:].tolist())


def test_shapes_dtypes_and_nothing() -> None:
    matrix = torch.ones(3, 5, dtype=torch.bfloat16)
    assert block_sums(matrix).tolist() == [15.0]
    assert block_sums(torch.tensor(2.0)).tolist() == [2.0]
    assert block_sums(torch.empty(0)).shape == blocked_dot(torch.empty(0, 3), torch.empty(0, 3)).shape == (0,)
    assert total() == total(torch.empty(0)) == 0.0
    with pytest.raises(ValueError, match="zip"):
        blocked_dot(X, X[: 16 * BLOCK])
