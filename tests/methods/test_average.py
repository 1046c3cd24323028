"""Weighted average: the specification's values (static methods, 6.0)."""

from __future__ import annotations

import pytest
import torch

ROWS = [
    [0.9, -0.1, 0.5, 0, -0.7, 0.2, 0.05, -0.3, 0.6, -0.02],
    [0.8, 0.3, -0.6, 0.1, 0.7, -0.2, 0.04, -0.4, -0.1, 0.01],
    [-0.2, 0.25, 0.55, -0.9, 0.1, 0.3, -0.06, -0.5, 0, 0.03],
]


def test_weights_of_the_specification(merge_rows):
    assert merge_rows("average", [[2.0, 3.0], [4.0, 7.0]], weights={"a": 0.25, "b": 0.75}).tolist() == [3.5, 6.0]


def test_rows_of_the_specification(merge_rows):
    want = torch.tensor([0.5, 0.15, 0.15, -0.2667, 0.0333, 0.1, 0.01, -0.4, 0.1667, 0.0067])
    torch.testing.assert_close(merge_rows("average", ROWS), want, rtol=0, atol=5e-5)


def test_plain_average_of_a_contested_entry(merge_rows):
    assert merge_rows("average", [[0.5], [0.4], [-0.6]]).item() == pytest.approx(0.1, rel=1e-6)


def test_weights_count_relative_to_their_sum(merge_rows):
    one = merge_rows("average", ROWS, weights={"a": 1, "b": 2, "c": 5})
    assert torch.equal(one, merge_rows("average", ROWS, weights={"a": 4, "b": 8, "c": 20}))


def test_weight_zero_leaves_an_expert_out(merge_rows):
    assert torch.equal(merge_rows("average", ROWS, weights={"b": 0}), merge_rows("average", ROWS[::2]))


def test_large_numbers_do_not_overflow_on_the_way(merge_rows):
    big = torch.finfo(torch.float32).max
    assert merge_rows("average", [[big], [big], [big]]).item() == big


def test_cancelling_experts_leave_the_small_rest(merge_rows):
    assert merge_rows("average", [[1e8], [3.0], [-1e8]]).item() == 1.0  # float32 sums give 0


def test_sum_instead_of_mean(merge_rows):
    got = merge_rows("average", [[2.0, 3.0], [4.0, 7.0]], weights={"a": 0.5, "b": 0.25}, normalize=False)
    assert got.tolist() == [2.0, 3.25]


def test_negative_sum_in_mergekit(merge_rows):
    assert merge_rows("average", [[2.0], [4.0]], weights={"a": 1, "b": -3}, compat="mergekit").tolist() == [5.0]
