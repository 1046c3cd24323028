"""Continual TIES, the baseline of the specification (continual and optimised, 1.6)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.methods.continual_ties import ContinualTies
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import Seen


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_two_experts_by_hand(merge_rows):
    """A = 0.5 (2, −2) = (1, −1); then the election of (1, −1) and (4, 4): (1 + 4, 4), of which half is added."""
    np.testing.assert_array_equal(merge_rows("continual_ties", [[2, -2], [4, 4]], density=1.0), [3.5, 1.0])


def test_it_compounds(merge_rows):
    """One expert three times, λ = 0.5: a ← a + (a + 1)/2."""
    np.testing.assert_array_equal(merge_rows("continual_ties", [[1.0]] * 3, density=1.0), [2.375])


def test_votes_that_cancel_add_nothing(merge_rows):
    np.testing.assert_array_equal(merge_rows("continual_ties", [[4.0], [-2.0]], density=1.0), [2.0])


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_the_first_expert_is_not_trimmed(merge_rows, density):
    np.testing.assert_array_equal(merge_rows("continual_ties", [[1.0, -2.0, 3.0]], density=density), [0.5, -1.0, 1.5])


def test_density_is_an_exact_count_of_each_tensor(merge_rows):
    got = merge_rows("continual_ties", [[0.0] * 5, [1.0, 1.0, 1.0, 1.0, 5.0]], density=0.4, scale=1.0)
    np.testing.assert_array_equal(got, [1, 0, 0, 0, 5])  # 2 of 5, of equals the first


def test_what_was_merged_is_trimmed_with_the_newcomer(merge_rows):
    """A = (4, 3, 0, 0) keeps one entry of 4 in the second election: its 3 stays, but is not added again."""
    got = merge_rows("continual_ties", [[4.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]], density=0.25, scale=1.0)
    np.testing.assert_array_equal(got, [8.0, 3.0, 0.0, 2.0])


@pytest.mark.parametrize("parameters", [{}, {"density": 0.0}, {"density": 0.6, "scale": 1.0}])
@pytest.mark.parametrize("shape", [(6, 5), (7,), (4, 3, 2, 2), (), (0,)])
def test_streaming_equals_batch(merge_rows, shape, parameters):
    x, place, method = deltas(3, *shape), Place("w", shape), ContinualTies(**parameters)
    state = {}
    for row in x:
        state = method.absorb(state, row.double(), place)
    got = method.settle(state, place, Seen(3, 0.0, 0.0))
    torch.testing.assert_close(got.float(), merge_rows("continual_ties", x, **parameters), rtol=2e-7, atol=0)


def test_the_order_of_the_experts_has_a_meaning(merge_rows):
    x = deltas(3, 20)
    assert not torch.equal(merge_rows("continual_ties", x), merge_rows("continual_ties", x.flip(0)))
    assert "symmetric" not in ContinualTies.laws and not ContinualTies.keeps_sums


def test_scale_zero_is_the_base_to_the_bit(combine, same_bits):
    base = {"w": torch.tensor([-0.0, 1.0, 2.0])}
    got = combine("continual_ties", base, {"a": {"w": base["w"] + 1}, "b": {"w": base["w"] - 2}}, scale=0.0)
    assert same_bits(got["w"], base["w"])


@pytest.mark.parametrize("bad", [{"density": 1.5}, {"density": -0.1}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="density"):
        ContinualTies(**bad)
