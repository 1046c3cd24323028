"""Model Breadcrumbs: checks 1 to 7 of the specification (static methods, 6.2), and mergekit's counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.registry import make_method

SLOW_VARIANTS = [
    {"density": 0.4, "gamma": 0.3, "scope": "row", "normalize": True},
    {"density": 0.5, "gamma": 0.2, "scale": 1.0},
    {"density": 0.7, "gamma": 0.5, "rescale": "l1"},
    {"density": 0.6, "gamma": 0.2, "scope": "row", "rescale": "l1"},
    {"density": 1.0, "gamma": 0.0},
]
SLOW_OTHERS = [{"compat": "mergekit", "density": 0.9, "gamma": 0.2}]

ONE_TO_TEN = [1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]


def band(row: np.ndarray, cut: int, keep: int) -> np.ndarray:
    """By a stable sort, flat."""
    order = np.argsort(-np.abs(row.ravel()), kind="stable")
    kept = np.zeros(row.size, bool)
    kept[order[cut : cut + keep]] = True
    return row * kept.reshape(row.shape)


def one(merge_rows: Any, rows: Any, **chosen: Any) -> torch.Tensor:
    return merge_rows("breadcrumbs", rows, scale=1.0, **chosen)


def kept(merge_rows: Any, size: int, **chosen: Any) -> list[int]:
    """Of the entries 1 … size those that are left."""
    return [int(v) for v in one(merge_rows, [np.arange(1.0, size + 1)], **chosen).tolist() if v]


def test_the_largest_and_the_small_are_left_out(merge_rows):
    got = one(merge_rows, [ONE_TO_TEN], density=0.7, gamma=0.1)
    assert got.tolist() == [0, 0, 3, -4, 5, -6, 7, -8, 9, 0]


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_without_a_cut_it_is_magnitude_pruning(merge_rows, same_bits, compat):
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    got = one(merge_rows, rows, density=0.5, gamma=0.0, compat=compat)
    assert same_bits(got, merge_rows("magnitude", rows, density=0.5, scope="tensor", scale=1.0))


def test_a_small_tensor_loses_no_more_than_its_share(merge_rows):
    assert kept(merge_rows, 50, density=0.9, gamma=0.01, compat="mergekit") == list(range(6, 51))


@pytest.mark.parametrize(
    "scope, want",
    [
        ("row", [[0.0, 0, 3, 0, 4], [0.0, 0, -30, 40, 0]]),
        ("tensor", [[0.0, -5, 0, 0, 0], [10.0, 20, -30, 0, 0]]),
    ],
)
def test_rows_and_tensors_of_the_specification(merge_rows, scope, want):
    rows = [[[1.0, -5, 3, 2, 4], [10.0, 20, -30, 40, 50]]]
    assert one(merge_rows, rows, density=0.4, gamma=0.2, scope=scope).tolist() == want


def test_shares_of_more_than_one_together(merge_rows):
    """The largest are always left out; mergekit rather keeps as many as the density says."""
    assert kept(merge_rows, 20, density=0.95, gamma=0.1) == list(range(1, 19))
    assert kept(merge_rows, 20, density=0.95, gamma=0.1, compat="mergekit") == list(range(1, 20))
    assert kept(merge_rows, 10, density=1.0, gamma=0.5) == [1, 2, 3, 4, 5]
    assert kept(merge_rows, 10, density=1.0, gamma=0.5, compat="mergekit") == list(range(1, 11))


@pytest.mark.parametrize(
    "density, gamma, counts",  # of 63, 6, 1, 96 and 2000 entries, as mergekit 0.1.5 left them
    [
        (0.9, 0.01, (56, 5, 0, 86, 1800)),
        (0.5, 0.1, (31, 3, 0, 48, 1000)),
        (0.95, 0.1, (59, 5, 0, 91, 1900)),
        (0.3, 0.9, (18, 1, 0, 28, 600)),
        (1.0, 0.5, (63, 6, 1, 96, 2000)),
        (0.0, 0.1, (0, 0, 0, 0, 0)),
        (0.05, 0.01, (3, 0, 0, 4, 100)),
    ],
)
def test_counts_of_mergekit(merge_rows, density, gamma, counts):
    for size, count in zip((63, 6, 1, 96, 2000), counts, strict=True):
        got = kept(merge_rows, size, density=density, gamma=gamma, compat="mergekit")
        top = 0 if density >= 1 else min(int(gamma * size), size - count)
        assert got == list(range(size - top - count + 1, size - top + 1))


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2, 1), (1, 6), (6, 1)])
def test_a_vector_is_one_row_and_a_column_has_rows_of_one(combine, shape):
    x = torch.tensor([1.0, -6, 2, 5, -3, 4]).reshape(shape)
    got = combine("breadcrumbs", {"w": 0 * x}, {"a": {"w": x}}, density=0.5, gamma=0.25, scope="row", scale=1.0)["w"]
    rows = [band(row, int(0.25 * shape[-1]), int(0.5 * shape[-1])) for row in x.reshape(-1, shape[-1]).numpy()]
    assert got.flatten().tolist() == np.array(rows).ravel().tolist()


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_equal_magnitudes_are_taken_in_order(merge_rows, scope):
    got = one(merge_rows, [[1.0, -1, 1, -1, 1, 1]], density=0.34, gamma=0.17, scope=scope)
    assert got.tolist() == [0, -1, 1, 0, 0, 0]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_task_vector_of_zeros_changes_nothing(combine, same_bits, scope):
    base = torch.tensor([[-0.0, 1.0], [2.0, -3.0]])
    got = combine("breadcrumbs", {"w": base}, {"a": {"w": base}, "b": {"w": base.clone()}}, scope=scope)
    assert same_bits(got["w"], base)


def test_experts_have_shares_of_their_own_also_where_one_keeps_all(combine):
    rng = torch.Generator().manual_seed(2)
    rows = {e: torch.randn(3000, generator=rng) for e in "ab"}
    chosen = {"density": {"a": 1.0, "b": 0.5}, "gamma": {"a": 0.3, "b": 0.1}, "scale": 1.0}
    got = combine(
        "breadcrumbs", {"w": torch.zeros(3000)}, {e: {"w": r} for e, r in rows.items()}, compat="mergekit", **chosen
    )["w"]
    want = rows["a"].double().numpy() + band(rows["b"].double().numpy(), 300, 1500)
    np.testing.assert_array_equal(got.numpy(), want.astype(np.float32))


def test_the_l1_norm_of_each_tensor_is_restored(combine):
    rng = torch.Generator().manual_seed(3)
    x = {n: torch.randn(400, generator=rng) for n in "ab"}
    got = combine(
        "breadcrumbs", {n: torch.zeros(400) for n in x}, {"e": x}, density=0.5, gamma=0.1, rescale="l1", scale=1.0
    )
    for n in x:
        assert int((got[n] != 0).sum()) == 200
        assert got[n].double().abs().sum().item() == pytest.approx(x[n].double().abs().sum().item(), rel=1e-6)


def test_mergekit_knows_no_rows():
    with pytest.raises(TwinmergeError, match="compat=mergekit goes with scope=tensor, got scope='row'"):
        make_method("breadcrumbs", ("a",), {"compat": "mergekit", "scope": "row"})


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_gamma_is_a_share(gamma):
    with pytest.raises(TwinmergeError, match="gamma is a share from 0 to 1"):
        make_method("breadcrumbs", ("a",), {"gamma": gamma})
    with pytest.raises(TwinmergeError, match="gamma is a share"):
        make_method("breadcrumbs", ("a", "b"), {"b.gamma": gamma})
