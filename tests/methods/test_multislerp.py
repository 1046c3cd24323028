"""multislerp: by hand, by mergekit's own steps, and where directions cancel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError


def transcription(x, experts, p):
    """With mergekit's step from the mean direction, which is 0 but for rounding."""
    out = {}
    w = np.broadcast_to(np.asarray(p.weights, np.float64), (len(experts),))
    w = w / w.sum() if p.normalize_weights else w
    for name, v in x.items():
        y = v.reshape(len(v), -1)
        lengths = np.linalg.norm(y, axis=1)
        u = y / (lengths + p.eps)[:, None]
        mean = w @ u
        if len(v) == 1 or np.linalg.norm(mean) < max(p.eps, 1e-6 * np.abs(w).sum()):
            out[name] = (y[0] if len(v) == 1 else w @ y).reshape(v.shape[1:])
            continue
        m = mean / np.linalg.norm(mean)
        z = w @ (u - np.outer(u @ m, m))
        r = np.linalg.norm(z) + p.eps
        direction = math.cos(r) * m + math.sin(r) * z / r
        if p.eps > 1e-6:  # its cosine is one of the step's length, which is left out
            direction = direction / math.cos(p.eps)
        out[name] = (direction * (w @ lengths)).reshape(v.shape[1:])
    return out


@pytest.mark.parametrize(
    "rows, weights, want",
    [
        ([(1, 0), (0, 1)], (1, 1), (0.707107, 0.707107)),
        ([(1, 0), (0, 3)], (1, 1), (1.414214, 1.414214)),
        ([(2, 0), (0, 2)], (3, 1), (6 / math.sqrt(10), 2 / math.sqrt(10))),
        ([(1, 0), (0, 0)], (1, 1), (0.5, 0)),
        ([(1, 0), (-1, 0)], (1, 1), (0, 0)),
        ([(3, 0), (-1, 0)], (1, 1), (1, 0)),  # as two inputs are: Σ w x
        ([(2, 0), (-1, 1), (-1, -1)], (1, 2**-0.5, 2**-0.5), (0.242641, 0)),  # and three: (2 − √2) / (1 + √2)
        ([(0, 0), (0, 0), (0, 0)], (1, 1, 1), (0, 0)),
        ([(1, 0)], (0.3,), (1, 0)),
    ],
    ids=["right", "lengths", "weights", "zero", "opposite", "opposite lengths", "three cancel", "all zero", "one"],
)
def test_values_by_hand(merge_rows, rows, weights, want):
    chosen = {"weights": dict(zip("abc", weights, strict=False))}
    got = merge_rows("multislerp", rows, **chosen)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6)


def test_weights_as_they_are_scale_the_length(merge_rows):
    one, double = (merge_rows("multislerp", [(1, 0), (0, 1)], weights=w, normalize_weights=False) for w in (0.5, 1.0))
    torch.testing.assert_close(one, torch.full((2,), math.sqrt(0.5)))
    assert torch.equal(double, 2 * one)


def test_a_tensor_that_no_expert_changed_stays_the_bases(combine, same_bits):
    base = torch.tensor([-0.0, 1.0, 2.0])
    assert same_bits(combine("multislerp", {"w": base}, {e: {"w": base} for e in "abc"})["w"], base)


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-8])
def test_directions_that_cancel_but_for_rounding_have_no_mean(merge_rows, eps):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert merge_rows("multislerp", [x, -x * (1 + 1e-7)], eps=eps).abs().max() < 1e-6


def test_weights_that_add_up_to_nothing_are_refused(merge_rows):
    rows = [(1, 0), (0, 1)]
    with pytest.raises(TwinmergeError, match="multislerp: the weights add up to 0"):
        merge_rows("multislerp", rows, weights={"a": 1.0, "b": -1.0})
    with pytest.raises(TwinmergeError, match="add up to -1"):
        merge_rows("multislerp", rows, weights={"a": 1.0, "b": -2.0})
    got = merge_rows("multislerp", rows, weights={"a": 1.0, "b": -2.0}, compat="mergekit")
    torch.testing.assert_close(got, torch.tensor([-1.0, 2.0]) / math.sqrt(5))
