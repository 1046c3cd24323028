"""DARE-TIES: drop, then trim, elect and merge."""

from __future__ import annotations

import pytest
import torch

ROWS = [[0.5, -0.1, 1.0, 0.3], [0.4, 0.2, -2.0, 0.3], [-0.6, 0.3, 0.5, 0.0]]


@pytest.fixture
def fixed_masks(monkeypatch):
    """One row of 1 (kept) and 0 for each expert."""

    def fix(**masks):
        bits = {e: -torch.tensor(mask, dtype=torch.int32) for e, mask in masks.items()}
        monkeypatch.setattr("twinmerge.methods.dare.kept_bits", lambda seed, expert, *rest: bits[expert])

    return fix


@pytest.mark.parametrize("chosen", [{}, {"merge": "sum"}, {"compat": "official"}, {"tie": "majority"}], ids=str)
def test_dropping_nothing_is_ties(merge_rows, same_bits, chosen):
    got = merge_rows("dare_ties", ROWS, density=1.0, trim_density=0.5, **chosen)
    assert same_bits(got, merge_rows("ties", ROWS, density=0.5, **chosen))


def test_one_expert_is_dare_at_scale_one(merge_rows, same_bits):
    row = torch.linspace(-1, 1, 501)
    got = merge_rows("dare_ties", [row], density=0.5, seed=5)
    assert same_bits(got, merge_rows("dare", [row], density=0.5, scale=1.0, seed=5))
    assert 0 < int((got == 0).sum()) < 501


def test_the_election_sees_what_the_drop_left(merge_rows, fixed_masks):
    fixed_masks(a=[1, 0, 1, 0], b=[1, 1, 0, 0], c=[1, 1, 1, 0])
    got = merge_rows("dare_ties", ROWS, density=0.5)
    torch.testing.assert_close(got, torch.tensor([0.9, 0.5, 1.5, 0]), rtol=1e-6, atol=0)
    got = merge_rows("dare_ties", ROWS, density=0.5, merge="max", rescale="none")
    torch.testing.assert_close(got, torch.tensor([0.5, 0.3, 1.0, 0]), rtol=1e-6, atol=0)


def test_different_densities_change_the_election(merge_rows, fixed_masks):
    fixed_masks(a=[1], b=[1])
    assert merge_rows("dare_ties", [[1.0], [-2.0]], density={"a": 1.0, "b": 1.0}).item() == -2
    assert merge_rows("dare_ties", [[1.0], [-2.0]], density={"a": 0.25, "b": 1.0}).item() == 4


def test_the_trim_takes_the_largest_of_what_is_left(merge_rows, fixed_masks):
    fixed_masks(a=[1, 1, 1, 1, 1, 1, 1, 1, 0, 0])
    row = [1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    got = merge_rows("dare_ties", [row], density=0.5, trim_density=0.2)
    assert got.tolist() == [0, 0, 0, 0, 0, 0, 14, -16, 0, 0]


def test_l1_restores_each_experts_norm_before_the_trim(merge_rows, fixed_masks):
    fixed_masks(a=[1, 1, 0, 0], b=[0, 0, 1, 1])
    got = merge_rows("dare_ties", [[1.0, 2, 3, 4], [4.0, 3, 2, 2]], density=0.5, rescale="l1", merge="sum")
    torch.testing.assert_close(got, torch.tensor([10 / 3, 20 / 3, 5.5, 5.5]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("nothing", [{"density": 0.0}, {"trim_density": 0.0}, {"scale": 0.0}], ids=str)
def test_nothing_kept_is_the_base_to_the_bit(combine, same_bits, nothing):
    base = torch.tensor([-0.0, 0.0, 1e-45, -3.5])
    experts = {"a": {"w": base + 1}, "b": {"w": base - 3}}
    assert same_bits(combine("dare_ties", {"w": base}, experts, **nothing)["w"], base)
