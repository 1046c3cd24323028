"""Arcee Fusion: by hand, against NumPy, and whole tensors against blocks of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.engine.ranges import rows_of
from twinmerge.methods.arcee_fusion import number, order


def importance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|b − a| · Σ p log(p / q) along the last axis, in float64, as float32 numbers."""

    def softmax(x: np.ndarray) -> np.ndarray:
        powers = np.exp(x - x.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True) + 1e-8

    if not a.size:
        return a
    p, q = softmax(np.atleast_1d(b)), softmax(np.atleast_1d(a))
    divergence = (p * np.log(p / q)).sum(-1, keepdims=True).astype(np.float32)
    size = np.abs(b.astype(np.float32) - a.astype(np.float32))
    return size * (divergence if a.ndim else divergence[0])


def transcription(x, experts, p):
    out = {}
    for name, (a, b) in x.items():
        score = importance(a, b)
        ordered = np.sort(score, axis=None)
        q25, q50, q75 = (ordered[int(q * (ordered.size - 1))] if ordered.size else 0.0 for q in (0.25, 0.5, 0.75))
        out[name] = np.where(score >= q50 + np.float32(1.5) * (q75 - q25), b, a)
    return out


def test_what_stands_out_is_taken(merge_rows):
    a, b = torch.zeros(2, 4), torch.tensor([[1.0, 2.0, 3.0, 40.0], [0.1, 0.2, 0.1, 0.0]])
    assert merge_rows("arcee_fusion", [a, b]).tolist() == [[0, 0, 0, 40], [0, 0, 0, 0]]


def test_quarters_by_hand(merge_rows):
    """One row, so that K is the same everywhere: sizes 0 … 8 have the quarters 2, 4 and 6, and 4 + 1.5 · 4 = 10."""
    b = torch.tensor([0.0, 8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0])
    assert merge_rows("arcee_fusion", [torch.zeros(9), b]).abs().max() == 0
    b[1] = 10.0
    assert merge_rows("arcee_fusion", [torch.zeros(9), b]).tolist() == [0, 10, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(), (1,), (9, 1), (3, 1, 1)])
def test_rows_of_one_entry_are_all_taken(merge_rows, shape):
    """Their softmax is 1 whatever they hold: K = 0, and so is the threshold."""
    b = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for compat in ("paper", "mergekit"):
        assert torch.equal(merge_rows("arcee_fusion", [torch.zeros(shape), b], compat=compat), b)


def test_entries_are_one_models_or_the_others_to_the_bit(merge_rows):
    a, b = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    got = merge_rows("arcee_fusion", [a, b])
    taken = got == b
    assert torch.equal(got, torch.where(taken, b, a)) and 0.01 < taken.float().mean() < 0.2


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_blocks_of_rows_are_the_whole(methods, combine, compat):
    """Their quarters are those of all entries, and every row has its own divergence."""
    shape = (rows_of((2048, 512)) // 512 + 3, 512)
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=rng)
    b = a + 0.1 * torch.randn(shape, generator=rng) * torch.rand(shape[0], 1, generator=rng)
    got = combine("arcee_fusion", None, {"a": {"w": a}, "b": {"w": b}}, compat=compat)["w"]
    want = transcription({"w": np.stack([a.double().numpy(), b.double().numpy()])}, "ab", None)["w"]
    differing = (got.double().numpy() != want).mean()
    assert differing < (1e-5 if compat == "paper" else 1e-3)


def test_order_is_that_of_the_numbers():
    x = torch.tensor([-1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1e30])
    keys = order(x).tolist()
    assert keys == sorted(keys) and [number(key).item() for key in keys] == x.tolist()
    assert min(keys) >= 0 and max(keys) < 1 << 32


def test_in_mergekit_what_is_taken_is_the_base_and_a_change(merge_rows):
    a, b = torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    got = merge_rows("arcee_fusion", [a, b], compat="mergekit")
    taken = got != a
    assert taken.any() and torch.equal(got, torch.where(taken, a + (b - a), a)) and not (got[taken] == b[taken]).all()
