"""The Karcher mean: against vectors in full length, what makes it least, and where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch


def mean(x: np.ndarray, max_iter: int, tol: float, compat: str) -> np.ndarray:
    """Of vectors (experts, size), by the definition, on the vectors themselves."""
    lengths = np.linalg.norm(x, axis=1)
    u = x[lengths > tol] / lengths[lengths > tol, None]
    if len(x) == 1 or not len(u):
        return x.mean(0) if len(x) == 1 or compat == "paper" else 0 * x[0]
    m = u.mean(0)
    if np.linalg.norm(m) < max(tol, 1e-6):
        if compat == "paper":
            return x.mean(0)
        m = u[0]
    m = m / np.linalg.norm(m)
    for _ in range(max_iter):
        step = np.zeros_like(m)
        for each in u:
            cosine = np.clip(each @ m, -1, 1)
            angle = np.arccos(cosine)
            if cosine > -1 + 1e-10 and angle > (tol if compat == "mergekit" else 0):
                step += angle / np.sin(angle) * (each - cosine * m) / len(u)
        length = np.linalg.norm(step)
        if length < max(tol, 1e-12):
            break
        m = np.cos(length) * m + np.sin(length) * step / length
        m /= np.linalg.norm(m)
    return m * lengths.mean()


def transcription(x, experts, p):
    return {n: mean(v.reshape(len(v), -1), p.max_iter, p.tol, p.compat).reshape(v.shape[1:]) for n, v in x.items()}


@pytest.mark.parametrize(
    "rows, want",
    [
        ([(1, 0), (0, 1)], (0.707107, 0.707107)),
        ([(1, 0), (0, 3)], (1.414214, 1.414214)),
        ([(1, 0), (1, 0), (0, 1)], (math.cos(math.pi / 6), 0.5)),  # a third of the way to the right angle
        ([(2, 0), (2, 0)], (2, 0)),
        ([(1, 0), (0, 0)], (0.5, 0)),  # it counts in the mean length alone
        ([(0, 0), (0, 0)], (0, 0)),
        ([(3, 0)], (3, 0)),
        ([(1, 0), (1, 0), (-1, 0)], (1, 0)),  # the opposite one pulls nowhere
        ([(1, 0), (-1, 0)], (0, 0)),
        ([(3, 0), (-1, 0)], (1, 0)),
    ],
    ids=["right", "lengths", "two to one", "equal", "zero", "all zero", "one", "one opposite", "opposite", "no mean"],
)
def test_values_by_hand(merge_rows, rows, want):
    got = merge_rows("karcher", rows)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6)


def test_in_mergekit_it_starts_at_the_first_where_there_is_no_mean(merge_rows):
    turned = [(1, 0), (-0.5, math.sqrt(0.75)), (-0.5, -math.sqrt(0.75))]
    assert merge_rows("karcher", turned).abs().max() < 1e-6
    got = merge_rows("karcher", turned, compat="mergekit", tol=1e-5)
    torch.testing.assert_close(got, torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


def test_in_mergekit_tensors_shorter_than_tol_become_zeros(merge_rows):
    rows = [(3e-6, 0), (0, 3e-6)]
    assert merge_rows("karcher", rows, compat="mergekit", tol=1e-5).tolist() == [0, 0]
    assert merge_rows("karcher", rows[:1], compat="mergekit", tol=1e-5)[0] == torch.tensor(3e-6)
    torch.testing.assert_close(merge_rows("karcher", rows), torch.full((2,), 3e-6 * math.sqrt(0.5)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spread", [1e-3, 0.3, 1.5])
def test_the_squared_angles_add_up_to_least(merge_rows, spread):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=6) + spread * rng.normal(size=(4, 6))
    u = rows / np.linalg.norm(rows, axis=1)[:, None]

    def cost(m: np.ndarray) -> float:
        return float((np.arccos(np.clip(u @ m / np.linalg.norm(m), -1, 1)) ** 2).sum())

    got = merge_rows("karcher", rows.astype(np.float32)).double().numpy()
    assert np.linalg.norm(got) == pytest.approx(np.linalg.norm(rows, axis=1).mean(), rel=1e-6)
    nearby = [cost(got + 1e-2 * np.linalg.norm(got) * step) for step in rng.normal(size=(100, 6))]
    assert cost(got) < min(nearby)


def test_many_steps_are_no_more_than_it_takes(merge_rows, monkeypatch):
    """Recipes have tol 1e-9 and max_iter 20000, at which float32 never ends by itself."""
    steps = []
    arccos = np.arccos
    monkeypatch.setattr(np, "arccos", lambda x: steps.append(1) or arccos(x))
    x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    merge_rows("karcher", x, max_iter=20_000, tol=0.0, compat="mergekit")
    assert 3 < len(steps) < 60


def test_steps_may_be_a_number_with_a_point(merge_rows):
    rows = [(1, 0), (0, 1), (0, 1)]
    assert torch.equal(merge_rows("karcher", rows, max_iter=2.0), merge_rows("karcher", rows, max_iter=2))
    with pytest.raises(ValueError, match="max_iter=2.5 is not allowed"):
        merge_rows("karcher", rows, max_iter=2.5)
