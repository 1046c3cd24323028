"""One model as it is: what becomes of its bits, and mergekit's rounding of the scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError


def transcription(x, experts, p):
    return {name: np.ravel(p.scale)[0] * v[0] for name, v in x.items()}


def test_every_value_keeps_its_bits(merge_rows, same_bits):
    row = torch.tensor([-0.0, 0.0, 1e-45, -3.4e38, 0.1])
    assert same_bits(merge_rows("passthrough", [row]), row)


@pytest.mark.parametrize("scale, want", [(2.0, [2.0, -4.0]), (0.0, [0.0, 0.0]), (-0.5, [-0.5, 1.0])])
def test_the_scale_multiplies(merge_rows, scale, want):
    assert merge_rows("passthrough", [[1.0, -2.0]], scale=scale).tolist() == want


def test_in_mergekit_the_scale_is_rounded_to_float32(merge_rows):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ours, theirs = (merge_rows("passthrough", [x], scale=0.7, compat=c) for c in ("paper", "mergekit"))
    assert torch.equal(theirs, x * torch.tensor(0.7)) and not torch.equal(ours, theirs)


def test_it_takes_one_model(merge_rows):
    with pytest.raises(TwinmergeError, match="passthrough merges exactly 1"):
        merge_rows("passthrough", [[1.0], [2.0]])
