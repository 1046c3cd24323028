"""Task arithmetic: checks 1 to 7 of the specification (static methods, 6.0)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.kit.registry import make_method

ROWS = [
    [0.9, -0.1, 0.5, 0, -0.7, 0.2, 0.05, -0.3, 0.6, -0.02],
    [0.8, 0.3, -0.6, 0.1, 0.7, -0.2, 0.04, -0.4, -0.1, 0.01],
    [-0.2, 0.25, 0.55, -0.9, 0.1, 0.3, -0.06, -0.5, 0, 0.03],
]


def test_scale_one_nth_is_the_average(merge_rows):
    torch.testing.assert_close(
        merge_rows("task_arithmetic", ROWS, scale=1 / 3), merge_rows("average", ROWS), rtol=2e-7, atol=0
    )


def test_scale_zero_is_the_base_to_the_bit(combine, same_bits):
    base = torch.tensor([-0.0, 0.0, 1e-45, -3.5, 65504.0])
    experts = {"a": {"w": base + 1}, "b": {"w": base - 3}}
    assert same_bits(combine("task_arithmetic", {"w": base}, experts, scale=0.0)["w"], base)


def test_unchanged_entries_are_the_base_to_the_bit(combine, same_bits):
    base = torch.tensor([-0.0, 0.0, 0.1])
    assert same_bits(combine("task_arithmetic", {"w": base}, {"a": {"w": base}})["w"], base)


def test_one_expert_at_scale_one_is_that_expert_within_one_ulp(combine):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=rng)
    expert = base + 1e-3 * torch.randn(1000, generator=rng)
    got = combine("task_arithmetic", {"w": base}, {"a": {"w": expert}}, scale=1.0)["w"]
    assert ((got - expert).abs().numpy() <= np.spacing(expert.abs().numpy())).all()


def test_weights_of_the_specification(merge_rows):
    got = merge_rows("task_arithmetic", [[2.0, 3.0], [4.0, 7.0]], weights={"a": 0.25, "b": 0.75}, scale=1.0)
    assert got.tolist() == [3.5, 6.0]


def test_negation_forgets_a_task(combine):
    base, expert = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.25, -2.5, 0.5])
    got = combine("task_arithmetic", {"w": base}, {"a": {"w": expert}}, scale=-1.0)["w"]
    assert torch.equal(got, 2 * base - expert)


@pytest.mark.parametrize(
    "rows, want",
    [
        (ROWS, [0.6, 0.18, 0.18, -0.32, 0.04, 0.12, 0.012, -0.48, 0.2, 0.008]),
        ([[0.5], [0.4], [-0.6]], [0.12]),
    ],
)
def test_rows_of_the_specification(merge_rows, rows, want):
    torch.testing.assert_close(merge_rows("task_arithmetic", rows, scale=0.4), torch.tensor(want), rtol=0, atol=1e-6)


def test_the_default_scale_is_that_of_the_paper(merge_rows):
    assert merge_rows("task_arithmetic", [[1.0]]).item() == pytest.approx(0.3, rel=1e-7)


def test_sum_and_base_are_rounded_once():
    # Exactly 1 + 2^-24 + 2^-48, which rounds up; the deltas' sum rounded on its own is 2^-24, and 1 + 2^-24 rounds to 1.
    x, base = torch.tensor([[2.0**-24, 1e8], [2.0**-48, 1.0], [0.0, -1e8]]), torch.tensor([1.0, 0.0])
    got = make_method("task_arithmetic", ("a", "b", "c"), {"scale": 1.0}).apply(Tile(x, base, Place("w", (2,))), {})
    assert got.tolist() == [1 + 2.0**-23, 1.0]


@pytest.mark.parametrize(
    "weights, want", [({"a": 1, "b": 3}, 2.5), ({"a": 1, "b": -1}, -2.0), ({"a": -1, "b": -1}, 2.0)]
)
def test_weighted_mean_of_the_task_vectors(merge_rows, weights, want):
    """τ = 1 and 3; weights that cancel leave the sum as it is."""
    assert merge_rows("task_arithmetic", [[1.0], [3.0]], weights=weights, normalize=True, scale=1.0).tolist() == [want]
