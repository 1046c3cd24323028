"""Breadcrumbs before the election of TIES: values by hand."""

from __future__ import annotations

import pytest
import torch

SLOW_VARIANTS = [
    {"density": 0.5, "gamma": 0.2, "merge": "sum"},
    {"density": 0.4, "gamma": 0.3, "scope": "row", "merge": "max"},
]
SLOW_OTHERS = [
    {"compat": "mergekit", "density": 0.5, "gamma": 0.1, "rescale": "l1", "merge": "sum"},
    {"tie": "majority", "density": 0.5},
]

ROWS = [[8.0, 1, -4, 3], [1.0, -9, 3, 2], [-2.0, -3, 8, 1]]


@pytest.mark.parametrize(
    "chosen, want",  # left: (0, 0, -4, 3), (0, 0, 3, 2), (-2, -3, 0, 0)
    [
        ({}, [-2.0, -3, -4, 2.5]),
        ({"merge": "sum"}, [-2.0, -3, -4, 5]),
        ({"merge": "max"}, [-2.0, -3, -4, 3]),
        ({"weights": {"a": 0.25, "b": 1.0, "c": 1.0}}, [-2.0, -3, -4, 2.2]),
        # weighed before the election, -1 and 3 stand against each other
        ({"weights": {"a": 0.25, "b": 1.0, "c": 1.0}, "compat": "mergekit"}, [-2.0, -3, 3, 2.2]),
        ({"compat": "mergekit", "merge": "sum", "scale": 0.5}, [-1.0, -1.5, -2, 2.5]),
    ],
)
def test_the_band_is_elected(merge_rows, chosen, want):
    got = merge_rows("breadcrumbs_ties", ROWS, density=0.5, gamma=0.25, **chosen)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-6, atol=0)


def test_cancelled_votes_change_nothing_and_in_mergekit_go_up(merge_rows):
    rows = [[5.0, 1.0, 0], [6.0, -1.0, 0]]
    chosen = {"density": 0.34, "gamma": 0.34}
    assert merge_rows("breadcrumbs_ties", rows, **chosen).tolist() == [0, 0, 0]
    assert merge_rows("breadcrumbs_ties", rows, compat="mergekit", **chosen).tolist() == [0, 1, 0]


@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_without_a_cut_it_is_ties_by_tensor(merge_rows, same_bits, merge):
    rows = torch.randn(4, 60, generator=torch.Generator().manual_seed(1))
    got = merge_rows("breadcrumbs_ties", rows, density=0.4, gamma=0.0, merge=merge)
    assert same_bits(got, merge_rows("ties", rows, density=0.4, scope="tensor", merge=merge))


def test_the_norm_is_restored_before_the_votes(merge_rows):
    """(0, 2, 1) of norm 9 against (0, -2.5, 0) of norm 5.5: 6 against 5.5."""
    rows = [[6.0, 2, 1], [3.0, -2.5, 0]]
    chosen = {"density": 0.67, "gamma": 0.34, "merge": "sum"}
    torch.testing.assert_close(merge_rows("breadcrumbs_ties", rows, **chosen), torch.tensor([0, -2.5, 1.0]))
    got = merge_rows("breadcrumbs_ties", rows, rescale="l1", **chosen)
    torch.testing.assert_close(got, torch.tensor([0, 6.0, 3.0]))
