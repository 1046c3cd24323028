"""TSV-Merge: T1 to T5 and checks 1 to 6 of the specification (continual and optimised, 4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.methods import tsv
from twinmerge.methods.kit.base import Known, Place, Tile

E1, E2 = np.outer([1, 0], [1, 0]), np.outer([0, 1], [0, 1])
VV = np.outer([0.6, 0.8], [0.6, 0.8])


def stack(*matrices):
    return torch.tensor(np.stack(matrices), dtype=torch.float32)


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-5):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


@pytest.mark.parametrize(
    "experts, want",
    [
        ((2 * E1, 3 * E2), [[2, 0], [0, 3]]),
        ((2 * E1, 3 * VV), [[2.1, 0.3], [0.3, 2.9]]),
        ((2 * E1, 2 * E1), [[2, 0], [0, 0]]),
    ],
    ids=["T1 orthogonal", "T2 oblique", "T3 identical of rank 1"],
)
def test_values_of_the_specification(merge_rows, experts, want):
    close(merge_rows("tsv", stack(*experts)), want, rtol=1e-6)


def test_task_arithmetic_interferes_where_tsv_does_not(merge_rows):
    close(merge_rows("task_arithmetic", stack(2 * E1, 3 * VV), scale=1.0), [[3.08, 1.44], [1.44, 1.92]])


def test_t4_polar_factors_by_gram_matrices_give_the_same(merge_rows):
    x = deltas(3, 12, 9)
    left, values, right = [], [], []
    for delta in x.double().numpy():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        left.append(u[:, :3]), values.append(s[:3]), right.append(vt[:3].T)

    def gram_polar(a):
        size, vectors = np.linalg.eigh(a.T @ a)
        return a @ (vectors / np.sqrt(size)) @ vectors.T

    want = gram_polar(np.hstack(left)) * np.concatenate(values) @ gram_polar(np.hstack(right)).T
    close(merge_rows("tsv", x), want)


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 14, 20])
@pytest.mark.parametrize("side", [49, 512, 768, 3072])
def test_t5_rank_per_expert_is_the_floor_for_usual_sizes(monkeypatch, experts, side):
    asked = []

    def spy(deltas, weights, k, name):
        asked.append(k)
        return deltas[0]

    monkeypatch.setattr(tsv, "merge_singular", spy)
    at = Place("w", (side, side + 1))
    tsv.Tsv().combine(torch.zeros(1).expand(experts, side, side + 1), (1.0,) * experts, at)
    assert asked == [side // experts]
    assert int(side * (1 / experts)) == side // experts  # the authors' way of writing it


def alike(kind, m, n, rng):
    """A change many of whose singular values are equal, as sparse updates of 16-bit weights have them."""
    if kind == "identity":
        return torch.eye(max(m, n))[:m, :n] / 128
    if kind == "sparse":
        return (torch.rand(m, n, generator=rng) < 0.1).float() / 128
    return torch.kron(torch.eye(2), torch.randn(-(-m // 2), -(-n // 2), generator=rng))[:m, :n].bfloat16().float()


@pytest.mark.parametrize("work", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["identity", "sparse", "blocks"])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (24, 24)])
@pytest.mark.parametrize("weights", [(0.3, 0.7, 1.7), (0.1, 0.2, -0.7), (0.0, 1.0, 0.3)])
def test_equal_experts_are_one_whatever_their_weights(shape, kind, work, weights):
    """U, V of equal experts are the same columns: the merge is their own k leading triplets times Σ ±|w| over the
    number of them."""
    at, x = Place("w", shape, 0, tuple("abc")), alike(kind, *shape, torch.Generator().manual_seed(1)).expand(3, *shape)
    base, used = torch.zeros(shape), [w for w in weights if w]
    one = tsv.Tsv().apply(Tile(x, base, at, work), Known()).double().numpy()
    got = tsv.Tsv(weights=weights).apply(Tile(x, base, at, work), Known()).double().numpy()
    close(got, sum(used) / len(used) * one)


def test_merged_rank_is_at_most_that_of_the_parts(merge_rows):
    s = torch.linalg.svdvals(merge_rows("tsv", deltas(3, 10, 8)).double())
    assert int((s > 1e-5 * s[0]).sum()) == 6  # 3 experts of rank floor(8 / 3)


def test_one_expert_is_that_expert(combine, same_bits):
    x = deltas(2, 6, 5)
    base = {"w": torch.zeros(6, 5)}
    assert same_bits(combine("tsv", base, {"a": {"w": x[0]}})["w"], x[0])


@pytest.mark.parametrize("c", [2.0, -3.0, 1e-12, 1e12, 1e-30, 1e30])
def test_scaled_deltas_scale_the_merge(merge_rows, c):
    x = deltas(3, 7, 9)
    close(merge_rows("tsv", c * x).double() / c, merge_rows("tsv", x))


def test_the_order_of_the_experts_only_permutes_columns(merge_rows):
    x = deltas(4, 9, 11)
    close(merge_rows("tsv", x[[2, 0, 3, 1]]), merge_rows("tsv", x))


def test_scale_zero_and_unchanged_tensors_are_the_base_to_the_bit(combine, same_bits):
    base = deltas(1, 4, 4)[0]
    base[0, 0] = -0.0
    moved = {"a": {"w": base + 1}, "b": {"w": base - deltas(1, 4, 4, seed=1)[0]}}
    assert same_bits(combine("tsv", {"w": base}, moved, scale=0.0)["w"], base)
    assert same_bits(combine("tsv", {"w": base}, {"a": {"w": base}, "b": {"w": base}})["w"], base)


def test_an_expert_that_changed_nothing_takes_only_its_share_of_the_rank(merge_rows):
    x = deltas(2, 6, 6)
    u, s, vt = np.linalg.svd(x[0].double().numpy())
    close(merge_rows("tsv", torch.stack([x[0], 0 * x[1]])), u[:, :3] * s[:3] @ vt[:3])


def test_convolution_kernels_are_matrices_of_output_channels(combine):
    x = deltas(3, 8, 3, 2, 2)
    kernel = combine("tsv", {"w": torch.zeros(8, 3, 2, 2)}, {f"e{i}": {"w": d} for i, d in enumerate(x)})["w"]
    flat = combine("tsv", {"w": torch.zeros(8, 12)}, {f"e{i}": {"w": d.reshape(8, 12)} for i, d in enumerate(x)})["w"]
    assert torch.equal(kernel.reshape(8, 12), flat)


@pytest.mark.parametrize("shape", [(5,), (), (1, 6), (6, 1), (4, 1, 1, 1), (0,)])
def test_all_other_tensors_are_meant(merge_rows, shape):
    x = deltas(3, *shape)
    torch.testing.assert_close(merge_rows("tsv", x), x.double().mean(0).float(), rtol=2e-7, atol=0)


def test_more_experts_than_the_short_side_keep_one_direction_each(merge_rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 2))
    parts = [np.linalg.svd(np.float32(d).astype(np.float64), full_matrices=False) for d in x]
    polars = []
    for a in (np.stack([u[:, 0] for u, _, _ in parts], 1), np.stack([vt[0] for _, _, vt in parts], 1)):
        p, _, q = np.linalg.svd(a, full_matrices=False)
        polars.append(p @ q)
    want = polars[0] * [s[0] for _, s, _ in parts] @ polars[1].T
    close(merge_rows("tsv", x), want)


def test_weights_scale_each_experts_delta(merge_rows):
    x = deltas(2, 5, 6)
    got = merge_rows("tsv", x, weights={"a": 0.5, "b": 2.0})
    close(got, merge_rows("tsv", torch.stack([0.5 * x[0], 2 * x[1]])))


def test_base_and_scale_are_applied_to_matrices(merge_rows):
    x, base = deltas(2, 4, 4), deltas(1, 4, 4, seed=9)[0]
    tile = Tile(x, base, Place("w", (4, 4)))
    close(tsv.Tsv(scale=0.25).apply(tile, Known()) - base, 0.25 * merge_rows("tsv", x).numpy())
