"""Iso-CTS: I4 and I5 of the specification (continual and optimised, 5), and what is beyond the rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.methods.iso_cts import sizes


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=2e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def singular(x):
    return torch.linalg.svdvals(x.double()).numpy()


@pytest.mark.parametrize("experts, want", [(8, (616, 19)), (14, (614, 11)), (20, (608, 8))])
def test_i4_sizes_of_the_paper(experts, want):
    assert sizes(0.8, 768, experts) == want


def test_i4_halves_round_to_even():
    assert sizes(0.0, 10, 4) == (2, 2)  # 2.5 -> 2
    assert sizes(0.5, 20, 4) == (12, 2)  # 2.5 -> 2
    assert sizes(0.0, 14, 4) == (2, 3)  # 3.5 -> 4 would be 16 of 14: as many as there are


@given(common=st.floats(0, 1), short=st.integers(1, 4096), experts=st.integers(1, 64))
def test_i4_all_directions_are_given_out(common, short, experts):
    k, own = sizes(common, short, experts)
    assert 0 <= k <= short and own >= 0 and k + own * experts == short


@pytest.mark.parametrize("mean_over", ["size", "rank"])
@pytest.mark.parametrize("rank", [1, 2, 6])
@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (7, 7)])
def test_i5_all_in_common_is_iso_c(merge_rows, shape, rank, mean_over):
    """At any rank of the sum: three experts in one space, as adapters may be."""
    m, n = shape
    x = torch.einsum("mr,trn->tmn", deltas(1, m, rank)[0], deltas(3, rank, n, seed=1))
    given = {"mean_over": mean_over}
    close(merge_rows("iso_cts", x, common=1.0, **given), merge_rows("iso_c", x, **given), 1e-5)


def test_more_experts_than_directions_left_is_iso_c(merge_rows):
    x = deltas(7, 5, 6)  # T > d − k: 1 direction for 7 experts
    assert sizes(0.8, 5, 7) == (5, 0)
    close(merge_rows("iso_cts", x), merge_rows("iso_c", x))


def test_all_singular_values_are_equal(merge_rows):
    s = singular(merge_rows("iso_cts", deltas(3, 12, 9), common=0.5))
    np.testing.assert_allclose(s, s[0], rtol=1e-6)


def test_nothing_in_common_by_hand(merge_rows):
    x = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    close(merge_rows("iso_cts", x, common=0.0), [[2, 0], [0, 2]])


def test_common_and_own_directions_by_hand(merge_rows):
    """The common direction is e1; outside of it, expert a has e2 and expert b has e3."""
    a, b = torch.diag(torch.tensor([5.0, 1.0, 0.0])), torch.diag(torch.tensor([5.0, 0.0, 4.0]))
    assert sizes(0.4, 3, 2) == (1, 1)
    close(merge_rows("iso_cts", torch.stack([a, b]), common=0.4), 5.0 * np.eye(3))  # mean of 10, 1 and 4


@pytest.mark.parametrize("common", [0.0, 0.5, 0.8])
def test_experts_of_low_rank_give_no_direction_of_chance(merge_rows, common):
    """Ranks 2 + 2 + 2: a seventh direction would be LAPACK's."""
    x = (deltas(3, 12, 2).double() @ deltas(3, 2, 10, seed=1).double()).float()
    got = merge_rows("iso_cts", x, common=common).double().numpy()
    s = np.linalg.svd(got, compute_uv=False)
    np.testing.assert_allclose(s[6:], 0, atol=1e-5 * s[0])
    assert s[5] > 1e-2 * s[0]
    space = np.linalg.svd(np.concatenate(list(x.double().numpy()), 1))[0][:, :6]
    close(space @ space.T @ got, got, 1e-5)


@pytest.mark.parametrize("common", [0.0, 0.8])
def test_a_space_that_all_share_has_no_directions_beside_it(merge_rows, common):
    """Two experts of the same rank 1: what is left outside of the common space is rounding."""
    u, v = deltas(1, 9)[0], deltas(1, 8, seed=1)[0]
    x = torch.stack([torch.outer(u, v), 0.37 * torch.outer(u, v)])
    s = singular(merge_rows("iso_cts", x, common=common))
    assert s[0] > 0
    np.testing.assert_allclose(s[1:], 0, atol=1e-6 * s[0])


@pytest.mark.parametrize("mean_over, count", [("size", 6), ("rank", 3)])
def test_an_expert_that_changed_nothing_has_no_direction(merge_rows, mean_over, count):
    """Its three directions are 0, and in the mean over the size."""
    x = deltas(2, 6, 6)
    x[1] = 0
    got = merge_rows("iso_cts", x, common=0.0, mean_over=mean_over)
    s = singular(got)
    np.testing.assert_allclose(s[:3], singular(x[0])[:3].sum() / count, rtol=1e-5)
    np.testing.assert_allclose(s[3:], 0, atol=1e-5 * s[0])


def test_nothing_changed_stays_the_base(merge_rows):
    assert not merge_rows("iso_cts", torch.zeros(2, 4, 5)).any()


@pytest.mark.parametrize("c", [-2.0, 1e-20, 1e20])
def test_scaled_deltas_scale_the_merge(merge_rows, c):
    x = deltas(3, 7, 9)
    close(merge_rows("iso_cts", c * x).double() / c, merge_rows("iso_cts", x))


def test_calibration_is_refused(merge_rows):
    with pytest.raises(TwinmergeError, match="iso_cts leaves all singular values equal.*Leave calibration out"):
        merge_rows("iso_cts", deltas(2, 4, 4), calibration=0.1)
