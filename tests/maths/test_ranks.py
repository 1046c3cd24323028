"""Tables by rank against a sort, and against the specification's numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths.ranks import DRAWS, band, kept_by_rank, limit, rising


@pytest.mark.parametrize("length", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("density, epsilon", [(0.5, 0.4), (0.7, 0.07), (0.3, 0.0), (0.0, 0.2), (1.0, 0.2)])
def test_shares_rise_in_even_steps_around_the_density(length, density, epsilon):
    table = rising(length, density, epsilon, True)
    shares = table.below / DRAWS
    assert table.length == length
    assert not length or shares.mean() == pytest.approx(density, abs=1e-7)
    if length > 1 and 0 < density < 1:
        np.testing.assert_allclose(shares, np.linspace(density - epsilon, density + epsilon, length), atol=1e-7)
    else:
        np.testing.assert_allclose(shares, density, atol=1e-7)
    if density:
        np.testing.assert_allclose(shares * table.factors, 1.0, rtol=1e-6)
    assert table.draws is (0 < density < 1 and length > 0)
    assert (rising(length, density, epsilon, False).factors == 1).all()


def test_limits_are_those_of_one_share_each():
    table = rising(300, 0.5, 0.4, False)
    assert table.below.tolist() == [limit(0.5 + 0.4 * (2 * r / 299 - 1)) for r in range(300)]


@pytest.mark.parametrize("cut, keep", [(0, 0), (0, 7), (2, 3), (6, 1), (7, 0), (3, 9), (0, 3)])
def test_a_band_is_counted_from_the_top(cut, keep):
    x = torch.tensor([3.0, -7, 1, 0, 5, -2, 4])
    order = np.argsort(-np.abs(x.numpy()), kind="stable")[cut : cut + keep]
    want = np.zeros(7, np.float32)
    want[order] = x.numpy()[order]
    table = band(7, cut, keep)
    assert kept_by_rank(x, table, None).tolist() == want.tolist() and not table.draws


@pytest.mark.parametrize("shape", [(0,), (1,), (4, 1), (3, 50), (2, 3, 9), (0, 5)])
def test_every_row_by_itself_with_its_factors(shape):
    rng = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(shape, generator=rng)).round()  # equals and zeros
    draws = torch.randint(DRAWS, shape, generator=rng, dtype=torch.int32)
    table = rising(shape[-1], 0.6, 0.3, True)
    got = kept_by_rank(x, table, draws)
    assert got.shape == x.shape
    for row, draw, found in zip(*(of.reshape(-1, max(1, shape[-1])) for of in (x, draws, got)), strict=True):
        for rank, i in enumerate(np.argsort(np.abs(row.numpy()), kind="stable")):
            want = float(row[i]) * table.factors[rank] if int(draw[i]) < table.below[rank] else 0.0
            assert found[i].item() == np.float32(want)


def test_tables_are_made_once():
    assert rising(9, 0.5, 0.1, True) is rising(9, 0.5, 0.1, True) and band(9, 1, 2) is band(9, 1, 2)
