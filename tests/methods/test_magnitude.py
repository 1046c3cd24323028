"""Magnitude pruning: checks 1 to 7 of the specification (static methods, 6.1)."""

from __future__ import annotations

import pytest
import torch

SLOW_VARIANTS = [{"density": 0.5, "scope": "tensor", "rescale": "l1"}, {"density": 1.0}, {"density": 0.0}]


def one(merge_rows, rows, **chosen):
    return merge_rows("magnitude", rows, scale=1.0, **chosen)


def test_the_largest_are_kept_whatever_their_sign(merge_rows):
    row = [1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    assert one(merge_rows, [row], density=0.3).tolist() == [0] * 7 + [-8, 9, -10]
    assert one(merge_rows, [[-v for v in row]], density=0.3).tolist() == [0] * 7 + [8, -9, 10]


def test_a_density_of_one_is_task_arithmetic_and_of_zero_the_base(combine, same_bits):
    base = torch.tensor([-0.0, 0.5, 2.0])
    experts = {"a": {"w": torch.tensor([1.0, -0.3, 1.1])}, "b": {"w": torch.tensor([0.5, 0.7, 0.9])}}
    whole = combine("magnitude", {"w": base}, experts, density=1.0)["w"]
    assert same_bits(whole, combine("task_arithmetic", {"w": base}, experts)["w"])
    assert same_bits(combine("magnitude", {"w": base}, experts, density=0.0)["w"], base)


@pytest.mark.parametrize("scope, kept", [("model", [10, 9]), ("tensor", [10, 1.4])])
def test_scopes_of_the_specification(combine, scope, kept):
    experts = {"x": {"a": torch.tensor([10.0, 9, 8, 7, 6]), "b": torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4])}}
    base = {n: torch.zeros(5) for n in "ab"}
    got = combine("magnitude", base, experts, density=0.2, scope=scope, scale=1.0)
    assert [v for n in "ab" for v in got[n].tolist() if v] == pytest.approx(kept)


def test_the_l1_norm_is_restored(merge_rows):
    got = one(merge_rows, [[1.0, 2, 3, 4]], density=0.5, rescale="l1")
    torch.testing.assert_close(got, torch.tensor([0, 0, 30 / 7, 40 / 7]), rtol=1e-6, atol=0)


def test_equals_are_kept_in_order_and_counted_exactly(merge_rows):
    assert one(merge_rows, [[1.0, -1, 1, 1, -1]], density=0.4).tolist() == [1, -1, 0, 0, 0]
    rng = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(50_000, generator=rng)).bfloat16()
    delta = (base.float() + 1e-3 * torch.randn(50_000, generator=rng)).bfloat16().float() - base.float()
    assert int((one(merge_rows, [delta], density=0.29) != 0).sum()) == 14_500


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_entry_that_the_density_does_not_reach_is_left_alone(combine, shape):
    experts = {"a": {"w": torch.full(shape, 3.0)}}
    got = combine("magnitude", {"w": torch.ones(shape)}, experts, density=0.5, scope="tensor", scale=1.0)
    assert got["w"].tolist() == torch.ones(shape).tolist()
