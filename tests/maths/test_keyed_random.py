"""Keyed random numbers: the same bits for any tiling, independent streams, frozen values."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.keyed_random import uniform

SIZE = 600_000  # more than two chunks of the generator
WHOLE = uniform(7, "math", "w", 0, SIZE)


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, SIZE), count=st.integers(0, 4000))
def test_any_range_has_the_same_bits(start: int, count: int) -> None:
    count = min(count, SIZE - start)
    assert torch.equal(uniform(7, "math", "w", start, count), WHOLE[start : start + count])


def test_a_tiling_across_chunks_has_the_same_bits() -> None:
    edges = [0, 1, 8, 17, 262_143, 262_144, 300_001, SIZE]
    tiles = [uniform(7, "math", "w", a, b - a) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(tiles), WHOLE)


def test_far_into_a_stream() -> None:
    start = 5 * 10**12 + 3
    assert torch.equal(uniform(0, "a", "w", start, 40)[9:], uniform(0, "a", "w", start + 9, 31))


def test_uniform_on_0_1() -> None:
    assert WHOLE.dtype == torch.float32 and WHOLE.shape == (SIZE,)
    assert 0 <= WHOLE.min() < 1e-4 and 1 - 1e-4 < WHOLE.max() < 1
    x = WHOLE.double()
    assert x.mean().item() == pytest.approx(1 / 2, abs=5 * (1 / 12 / SIZE) ** 0.5)
    assert x.var().item() == pytest.approx(1 / 12, abs=5 * (1 / 180 / SIZE) ** 0.5)
    counts = torch.histc(WHOLE, 64, 0, 1).double()
    assert ((counts - SIZE / 64).square() / (SIZE / 64)).sum() < 63 + 6 * (2 * 63) ** 0.5
    assert torch.equal(WHOLE * 2**24, (WHOLE * 2**24).round())


def test_streams_of_other_names_are_independent() -> None:
    names = [
        (7, "code", "w"),
        (7, "math", "v"),
        (8, "math", "w"),
        (-7, "math", "w"),
        (7, "mathw", ""),
        (7, "", "mathw"),
    ]
    streams = [WHOLE[:100_000], *(uniform(*name, 0, 100_000) for name in names)]
    correlation = torch.corrcoef(torch.stack(streams).double()) - torch.eye(len(streams))
    assert correlation.abs().max() < 6 / 100_000**0.5


def test_names_cannot_run_into_each_other() -> None:
    keys = [
        (1, "1a", "b"),
        (11, "a", "b"),
        (1, "1", "ab"),
        (1, "1a\0b", ""),
        (1, "", "1ab"),
        (1, "\u00e9", "b"),
        (1, "e\u0301", "b"),
    ]
    assert len({tuple(uniform(*key, 0, 4).tolist()) for key in keys}) == len(keys)


def test_frozen_values() -> None:
    """The stream is a promise: a mask made years ago can be made again."""
    words = (uniform(42, "math", "model.layers.0.mlp.weight", 5, 6) * 2**24).int().tolist()
    assert words == [5365117, 5316712, 7257472, 8050726, 16432631, 5565030]


def test_empty_and_wrong_ranges() -> None:
    assert uniform(0, "a", "w", 3, 0).shape == (0,)
    assert uniform(0, "a", "w", 8, 0).shape == (0,)
    for start, count in [(-1, 4), (0, -1)]:
        with pytest.raises(ValueError, match="cannot start"):
            uniform(0, "a", "w", start, count)
