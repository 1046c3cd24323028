"""DARE: checks 1 to 7 of the specification (static methods, 3.3)."""

from __future__ import annotations

import math

import pytest
import torch


@pytest.fixture
def fixed_mask(monkeypatch):
    """Keeps exactly the entries that are 1 in the mask, whatever the density above 0."""

    def fix(*mask):
        bits = -torch.tensor(mask, dtype=torch.int32)
        monkeypatch.setattr("twinmerge.methods.dare.kept_bits", lambda *key: bits[key[3] : key[3] + key[4]])

    return fix


def ones(combine, names, size, density, scale=1.0, **chosen):
    experts = {e: {"w": torch.ones(size)} for e in names}
    return combine("dare", {"w": torch.zeros(size)}, experts, density=density, scale=scale, **chosen)["w"]


def test_drop_and_rescale_of_the_specification(merge_rows, fixed_mask):
    fixed_mask(1, 0, 0, 1)
    got = merge_rows("dare", [[0.002, -0.001, 0.0005, 0.003]], density=0.5, scale=1.0)
    torch.testing.assert_close(got, torch.tensor([0.004, 0, 0, 0.006]), rtol=1e-7, atol=0)


@pytest.mark.parametrize("rescale", ["inverse_keep", "l1", "none"])
def test_keeping_all_is_task_arithmetic_and_keeping_none_is_the_base(combine, same_bits, rescale):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0])
    experts = {"a": {"w": torch.tensor([1.0, -0.3, 1.1, -2.0])}, "b": {"w": torch.tensor([0.5, 0.7, 0.9, -2.2])}}
    whole = combine("dare", {"w": base}, experts, density=1.0, rescale=rescale)["w"]
    assert same_bits(whole, combine("task_arithmetic", {"w": base}, experts)["w"])
    assert same_bits(combine("dare", {"w": base}, experts, density=0.0, rescale=rescale)["w"], base)


@pytest.mark.parametrize("drop, variance", [(0.5, 1.0), (0.9, 9.0), (0.99, 99.0)])
def test_mean_stays_and_variance_is_that_of_the_theory(combine, drop, variance):
    size = 200_000
    got = ones(combine, "a", size, round(1 - drop, 2)).double()
    assert abs(got.mean().item() - 1) < 3 * math.sqrt(variance / size)
    assert got.var().item() == pytest.approx(variance, rel=0.07)


@pytest.mark.parametrize(
    "rescale, want", [("inverse_keep", [2.0, 4, 0, 0]), ("l1", [10 / 3, 20 / 3, 0, 0]), ("none", [1.0, 2, 0, 0])]
)
def test_rescales_of_the_specification(merge_rows, fixed_mask, rescale, want):
    fixed_mask(1, 1, 0, 0)
    got = merge_rows("dare", [[1.0, 2, 3, 4]], density=0.5, scale=1.0, rescale=rescale)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-7, atol=0)


def test_l1_restores_the_norm_of_each_tensor_and_expert(combine):
    rng = torch.Generator().manual_seed(0)
    expert = {n: torch.randn(300, generator=rng) for n in "ab"}
    got = combine("dare", {n: torch.zeros(300) for n in "ab"}, {"x": expert}, density=0.3, scale=1.0, rescale="l1")
    for n in "ab":
        assert got[n].double().abs().sum().item() == pytest.approx(expert[n].double().abs().sum().item(), rel=1e-6)


def test_l1_of_a_tensor_that_was_dropped_whole_is_zero(merge_rows, fixed_mask):
    fixed_mask(0, 0)
    assert merge_rows("dare", [[1.0, 2.0]], density=0.5, rescale="l1").tolist() == [0, 0]


def test_masks_do_not_depend_on_other_tensors_or_experts(combine, same_bits):
    x = torch.ones(1000)
    alone = combine("dare", {"w": 0 * x}, {"math": {"w": x}}, seed=3)["w"]
    more = combine(
        "dare", {"a": 0 * x, "w": 0 * x}, {"math": {"a": x, "w": x}, "code": {"a": 0 * x, "w": 0 * x}}, seed=3
    )
    assert same_bits(more["w"], alone)
    assert not torch.equal(more["a"], alone)  # another tensor, another mask


def test_masks_depend_on_the_seed(combine):
    assert not torch.equal(ones(combine, "a", 1000, 0.5, seed=0), ones(combine, "a", 1000, 0.5, seed=1))


def test_experts_have_independent_masks(combine):
    size = 200_000
    both = (ones(combine, "ab", size, 0.1, rescale="none") == 2).double().mean().item()
    assert both == pytest.approx(0.01, abs=5 * math.sqrt(0.01 * 0.99 / size))


@pytest.mark.parametrize("copies", [16, 256])
def test_the_average_of_many_copies_converges_to_the_delta(combine, copies):
    names = [f"copy{i}" for i in range(copies)]
    got = ones(combine, names, 2000, 0.5, scale=1 / copies)
    assert (got.double() - 1).square().mean().sqrt().item() == pytest.approx(1 / math.sqrt(copies), rel=0.1)


def test_the_kept_count_is_binomial_and_not_fixed(combine):
    size, density = 2000, 0.3
    counts = [int((ones(combine, "a", size, density, seed=s) != 0).sum()) for s in range(20)]
    assert max(abs(c - density * size) for c in counts) < 5 * math.sqrt(size * density * (1 - density))
    assert len(set(counts)) > 5


def test_each_expert_has_its_own_density(combine):
    size = 10_000
    got = ones(combine, "ab", size, {"a": 1.0, "b": 0.1}, rescale="none")
    assert (got == 2).double().mean().item() == pytest.approx(0.1, abs=0.015) and got.min() == 1


def test_zero_dimensional_tensors_take_every_rescale(combine):
    got = combine(
        "dare", {"w": torch.tensor(1.0)}, {"a": {"w": torch.tensor(3.0)}}, density=1.0, scale=1.0, rescale="l1"
    )
    assert got["w"].shape == () and got["w"].item() == 3
