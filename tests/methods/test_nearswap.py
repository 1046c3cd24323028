"""NearSwap: by hand, its ends to the bit, and below the least difference."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def transcription(x, experts, p):
    out = {}
    for name, (a, b) in x.items():
        s = np.clip(p.t / np.maximum(np.abs(b - a), 1e-6), 0, 1)
        out[name] = s * b + (1 - s) * a
    return out


@pytest.mark.parametrize(
    "t, want",
    [
        (0.0, [1.0, 1.0, 1.0, -1.0]),
        (0.5, [1.25, 1.5, 0.5, -1.0]),
        (10.0, [1.25, 3.0, -1.0, -1.0]),
        (-1.0, [1.0, 1.0, 1.0, -1.0]),
    ],
)
def test_values_by_hand(merge_rows, t, want):
    assert merge_rows("nearswap", [[1.0, 1.0, 1.0, -1.0], [1.25, 3.0, -1.0, -1.0]], t=t).tolist() == want


def test_a_t_below_a_millionth_takes_a_share_of_small_differences(merge_rows):
    got = merge_rows("nearswap", [[0.0, 0.0], [1e-7, 1.0]], t=5e-7)
    torch.testing.assert_close(got, torch.tensor([5e-8, 5e-7]), rtol=1e-6, atol=0)


def test_its_ends_are_the_models_to_the_bit(merge_rows, same_bits):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    a[:2], b[:2] = torch.tensor([-0.0, 0.0]), torch.tensor([0.0, -0.0])
    assert same_bits(merge_rows("nearswap", [a, b], t=0.0), a)
    assert same_bits(merge_rows("nearswap", [a, b], t=1e3), b)


def test_a_difference_of_just_t_is_taken_to_the_bit(merge_rows, same_bits):
    for t in torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5:
        got = merge_rows("nearswap", [[0.0], [t]], t=t.item())
        assert same_bits(got, t.reshape(1))


def test_no_entry_goes_further_than_t(merge_rows):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    got = merge_rows("nearswap", [a, b], t=0.01)
    assert (got - a).abs().max() <= 0.01 + 1e-6
    assert torch.equal((got - a).sign(), (b - a).sign())


def test_in_mergekit_every_step_is_rounded_to_float32(merge_rows):
    a, b = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    got = merge_rows("nearswap", [a, b], t=0.3, compat="mergekit")
    share = (0.3 / (a - b).abs()).clamp(max=1)
    assert torch.equal(got, share * b + (1 - share) * a)
    ours = merge_rows("nearswap", [a, b], t=0.3)
    assert not torch.equal(got, ours)
    torch.testing.assert_close(got, ours, rtol=1e-6, atol=1e-7)
