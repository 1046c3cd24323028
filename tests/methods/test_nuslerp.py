"""nuslerp: by hand, by tensor, row and column, and where there is no angle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from twinmerge.engine.ranges import rows_of


def between(a: np.ndarray, b: np.ndarray, t: float, compat: str) -> np.ndarray:
    """Of two vectors, by the definition."""
    norms = np.linalg.norm(a), np.linalg.norm(b)
    if compat == "mergekit":
        cosine = a @ b / (max(norms[0], 1e-7) * max(norms[1], 1e-7))
    elif min(norms) == 0:
        cosine = 1.0
    else:
        cosine = a @ b / (norms[0] * norms[1])
    if 1 - cosine**2 < 1e-10:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def transcription(x, experts, p):
    out = {}
    first, second = np.broadcast_to(p.weights, 2)
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    for name, v in x.items():
        if p.flatten or v.ndim < 3:
            out[name] = between(v[0].ravel(), v[1].ravel(), t, p.compat).reshape(v.shape[1:])
            if p.flatten or v.ndim < 3:
                continue
        moved = np.moveaxis(v, 1, -1) if p.row_wise else v
        rows = moved.reshape(2, -1, moved.shape[-1])
        merged = np.stack([between(a, b, t, p.compat) for a, b in zip(*rows, strict=True)]).reshape(moved.shape[1:])
        out[name] = np.moveaxis(merged, -1, 0) if p.row_wise else merged
    return out


@pytest.mark.parametrize(
    "a, b, weights, want",
    [
        ((1, 0), (0, 1), (1, 1), (0.707107, 0.707107)),
        ((1, 0), (0, 1), (3, 1), (0.92388, 0.382683)),
        ((2, 0), (0, 1), (1, 1), (1.414214, 0.707107)),
        ((1, 0), (math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)), (1, 1), (0.5, 0.866025)),
        ((1, 2), (-1, -2), (1, 1), (0, 0)),
        ((1, 2), (-1, -2), (1, 3), (-0.5, -1)),
        ((0, 0), (1, 1), (1, 1), (0.5, 0.5)),
        ((1, 1), (0, 0), (3, 1), (0.75, 0.75)),
        ((1, 0), (0, 1), (1, 0), (1, 0)),
        ((1, 0), (0, 1), (1, -1), (0.707107, 0.707107)),  # no sum to divide by: t = 0.5
        ((1, 0), (0, 1), (2, -1), (0, -1)),  # t = −1: as far to the other side
    ],
    ids=["right", "quarter", "lengths", "120", "opposite", "opposite 3/4", "zero a", "zero b", "t 0", "cancel", "t -1"],
)
@pytest.mark.parametrize("on_base", [False, True])
def test_values_by_hand(combine, a, b, weights, want, on_base):
    base = torch.tensor([3.0, -1.0]) if on_base else torch.zeros(2)
    experts = {n: {"w": base + torch.tensor(v, dtype=torch.float32)} for n, v in (("a", a), ("b", b))}
    chosen = {"weights": dict(zip("ab", weights, strict=True))}
    got = combine("nuslerp", {"w": base} if on_base else None, experts, **chosen)["w"]
    torch.testing.assert_close(got, base + torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("a, b, want", [((0, 0), (1, 1), (0.707107, 0.707107)), ((2, 0), (0, 0), (1.414214, 0))])
def test_in_mergekit_a_zero_tensor_is_at_a_right_angle(merge_rows, a, b, want):
    got = merge_rows("nuslerp", [a, b], compat="mergekit")
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6)


def test_in_mergekit_norms_have_a_floor(merge_rows):
    """Two equal vectors of length 1e-8 have the cosine 0.01 there."""
    angle = math.acos(0.01)
    got = merge_rows("nuslerp", [(1e-8, 0), (1e-8, 0)], compat="mergekit")[0].item()
    assert got == pytest.approx(2e-8 * math.sin(angle / 2) / math.sin(angle), rel=1e-6)
    assert merge_rows("nuslerp", [(1e-8, 0), (1e-8, 0)])[0].item() == pytest.approx(1e-8, rel=1e-6)


def test_opposite_ones_but_for_rounding_go_straight(merge_rows):
    """On the sphere they would be the noise of their rounding, made 10 million times as large."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    got = merge_rows("nuslerp", [x, -x * (1 + 1e-7)])
    assert got.abs().max() < 1e-6


def test_unchanged_tensors_stay_as_they_are(combine, same_bits):
    base = torch.tensor([[-0.0, 1.0], [2.0, -3.0]])
    for chosen in ({}, {"flatten": False}, {"flatten": False, "row_wise": True}):
        for compat in ("paper", "mergekit"):
            got = combine("nuslerp", {"w": base}, {"a": {"w": base}, "b": {"w": base}}, compat=compat, **chosen)["w"]
            assert same_bits(got, base)


def test_by_row_and_by_column(merge_rows):
    """Rows (1, 0) and (0, 1) of the one meet (0, 1) and (0, 1) of the other; so do columns, turned."""
    a, b = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]
    half = math.sqrt(0.5)
    got = merge_rows("nuslerp", [a, b], flatten=False)
    torch.testing.assert_close(got, torch.tensor([[half, half], [0.0, 1.0]]))
    turned = merge_rows("nuslerp", [np.transpose(a), np.transpose(b)], flatten=False, row_wise=True)
    torch.testing.assert_close(turned, got.T)
    assert torch.equal(merge_rows("nuslerp", [a, b], row_wise=True), merge_rows("nuslerp", [a, b]))


def test_columns_over_several_blocks_of_rows(methods):
    shape = (rows_of((2048, 512)) // 512 + 3, 512)
    rng = torch.Generator().manual_seed(0)
    experts = {e: {"w": torch.randn(shape, generator=rng)} for e in "ab"}
    chosen = {"flatten": False, "row_wise": True}
    got = methods.combine("nuslerp", None, experts, **chosen)["w"]
    want = methods.transcribe("nuslerp", None, experts, **chosen)["w"]
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-7, atol=1e-7)
