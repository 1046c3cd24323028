"""Model Stock: the checks of the specification (static methods, 6.6), and by row."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError

TURNED = (math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3))


def ratio(d: np.ndarray, compat: str) -> float:
    """t of vectors (experts, size), by the definition."""
    n, cosines = len(d), []
    for a, b in itertools.combinations(d, 2):
        norms = np.linalg.norm(a) * np.linalg.norm(b)
        if compat == "mergekit":
            cosines.append(np.clip(a @ b / max(norms, 1e-6), -1, 1))
        else:
            cosines.append(a @ b / norms if norms > 0 else 0.0)
    c = np.mean(cosines)
    if compat == "paper" and c <= 0:
        return 0.0
    return 0.0 if abs(1 + (n - 1) * c) < 1e-6 else n * c / (1 + (n - 1) * c)


def transcription(x, experts, p):
    out = {}
    for name, v in x.items():
        width = max(1, v.shape[-1] if p.filter_wise and v.ndim > 1 else v[0].size)
        rows = v.reshape(len(v), v[0].size // width, width)
        t = np.array([ratio(rows[:, i], p.compat) for i in range(rows.shape[1])])
        out[name] = (t[:, None] * rows.mean(0)).reshape(v.shape[1:])
    return out


@pytest.mark.parametrize(
    "rows, want",
    [
        ([(1, 0), (1, 1)], (0.828427, 0.414214)),
        ([(2, -1), (2, -1)], (2, -1)),
        ([(1, 0), (0, 1)], (0, 0)),
        ([(1, 0), (-1, 0)], (0, 0)),
        ([(1, 0), TURNED], (0, 0)),
        ([(1, 0), (0, 1), (1, 1)], (0.7279 * 2 / 3, 0.7279 * 2 / 3)),
        ([(1, 0), (0, 0)], (0, 0)),
        ([(0, 0), (0, 0)], (0, 0)),
    ],
    ids=["45 degrees", "equal", "right angle", "opposite", "120 degrees", "three", "zero", "all zero"],
)
def test_values_of_the_specification(merge_rows, rows, want):
    got = merge_rows("model_stock", rows)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "rows, want",
    [
        ([(1, 0), TURNED], (-0.5, -0.866025)),  # t = −2
        ([(1, 0), (-1, 0)], (0, 0)),  # 1 + c = 0
        ([(1, 0), TURNED, (TURNED[0], -TURNED[1])], (0, 0)),  # 1 + 2c = 0
        ([(1e-4, 0), (1e-4, 0)], (1.980198e-6, 0)),  # c = 1e-8 / 1e-6
    ],
    ids=["120 degrees", "opposite", "three at 120 degrees", "tiny"],
)
def test_in_mergekit_t_may_be_negative_and_norms_have_a_floor(merge_rows, rows, want):
    got = merge_rows("model_stock", rows, compat="mergekit")
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-7)


def test_t_does_not_depend_on_the_size_of_the_changes(merge_rows):
    for size in (1e-20, 1e-4, 1e15):
        got = merge_rows("model_stock", [(size, 0), (size, size)])
        torch.testing.assert_close(got / size, torch.tensor([0.828427, 0.414214]), rtol=1e-5, atol=0)


def test_by_row_every_row_is_a_merge_of_its_own(combine):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(3, 4, 5, generator=rng)
    experts = {e: base + 0.1 * torch.randn(base.shape, generator=rng) for e in "ab"}
    experts["b"][1, 2] = experts["a"][1, 2]
    experts["a"][0, 0] = experts["b"][0, 0] = base[0, 0]
    got = combine("model_stock", {"w": base}, {e: {"w": v} for e, v in experts.items()}, filter_wise=True)["w"]
    assert torch.equal(got[0, 0], base[0, 0])
    torch.testing.assert_close(got[1, 2], experts["a"][1, 2])
    for i, j in itertools.product(range(3), range(4)):
        row = combine("model_stock", {"w": base[i, j]}, {e: {"w": v[i, j]} for e, v in experts.items()})["w"]
        torch.testing.assert_close(got[i, j], row, rtol=1e-6, atol=1e-7)


def test_one_expert_has_no_angle(merge_rows):
    with pytest.raises(TwinmergeError, match="model_stock merges at least 2 experts, got 1"):
        merge_rows("model_stock", [(1, 0)])
