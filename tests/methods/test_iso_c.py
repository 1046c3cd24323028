"""Iso-C: I1 to I3, I6 and I7 of the specification (continual and optimised, 5)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.methods.iso_c import IsoC
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import Seen


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def streamed(method, rows, place, count=None):
    """The experts absorbed one by one, in float64."""
    state = {}
    for row in rows:
        state = method.absorb(state, row.double(), place)
    return method.settle(state, place, Seen(count or len(rows), 0.0, 0.0))


def test_i1_flat_spectrum(merge_rows):
    close(merge_rows("iso_c", [torch.diag(torch.tensor([3.0, 1.0]))]), [[2, 0], [0, 2]])


@pytest.mark.parametrize("c", [-1.0, 2.0, -3.0, 1e-12, 1e12, 1e-30, 1e30])
def test_i2_odd_and_homogeneous(merge_rows, c):
    x = deltas(3, 7, 9)
    close(merge_rows("iso_c", c * x).double() / c, merge_rows("iso_c", x), 2e-6)


@pytest.mark.parametrize("over, want", [("size", 2.0), ("rank", 4.0)])
def test_i3_no_direction_beyond_the_rank(merge_rows, over, want):
    close(merge_rows("iso_c", [[[4.0, 0.0], [0.0, 0.0]]], mean_over=over), [[want, 0], [0, 0]])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(2, 12),
    n=st.integers(2, 12),
    rank=st.integers(1, 12),
    over=st.sampled_from(["size", "rank"]),
)
def test_i3_i6_all_singular_values_that_are_there_are_equal(merge_rows, seed, m, n, rank, over):
    rank = min(m, n, rank)
    x = deltas(1, m, rank, seed=seed)[0] @ deltas(1, rank, n, seed=seed + 1)[0]
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    k = int((s > s[0] * max(m, n) * np.finfo(np.float32).eps).sum())
    got = np.linalg.svd(merge_rows("iso_c", [x], mean_over=over).double().numpy(), compute_uv=False)
    want = s[:k].sum() / (min(m, n) if over == "size" else k)
    np.testing.assert_allclose(got[:k], want, rtol=1e-5)
    np.testing.assert_allclose(got[k:], 0, atol=1e-5 * want)


def test_i6_of_many_experts(merge_rows):
    x = deltas(5, 9, 6)
    s = torch.linalg.svdvals(merge_rows("iso_c", x).double()).numpy()
    np.testing.assert_allclose(s, torch.linalg.svdvals(x.double().sum(0)).mean(), rtol=1e-6)


@pytest.mark.parametrize("parameters", [{}, {"mean_over": "rank", "scale": 1.5}, {"rest": "sum"}, {"elementwise": "w"}])
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (7,), (1, 5), ()])
def test_i7_streaming_equals_batch_in_any_order(merge_rows, shape, parameters):
    x, place = deltas(3, *shape), Place("w", shape)
    whole = merge_rows("iso_c", x, **parameters)
    for order in itertools.permutations(range(3)):
        got = streamed(IsoC(**parameters), x[list(order)], place)
        assert got.shape == shape
        close(got, whole)


def test_i7_taking_an_expert_out_leaves_the_others(merge_rows):
    x, place, method = deltas(3, 6, 5), Place("w", (6, 5)), IsoC()
    state = {}
    for row in x:
        state = method.absorb(state, row.double(), place)
    left = method.release(state, x[1].double(), place)
    close(left["sum"], x.double()[[0, 2]].sum(0), 1e-15)
    close(method.settle(left, place, Seen(2, 0.0, 0.0)), merge_rows("iso_c", x[[0, 2]]))


def test_the_state_is_one_model():
    assert IsoC().parts(Place("w", (6, 5))) == {"sum": (6, 5)}


def test_experts_that_cancel_leave_the_base_to_the_bit(combine, same_bits):
    base, x = {"w": torch.tensor([[-0.0, 2.0], [1.0, -4.0]])}, torch.tensor([[0.5, 0.25], [-1.0, 2.0]])
    got = combine("iso_c", base, {"a": {"w": base["w"] + x}, "b": {"w": base["w"] - x}})
    assert same_bits(got["w"], base["w"])


def test_weights_scale_each_experts_delta(merge_rows):
    x = deltas(2, 5, 6)
    got = merge_rows("iso_c", x, weights={"a": 0.5, "b": 2.0})
    close(got, merge_rows("iso_c", torch.stack([0.5 * x[0], 2 * x[1]])))


@pytest.mark.parametrize("rest, want", [("mean", 2.0), ("sum", 4.0), ("base", 0.0)])
def test_vectors_and_what_elementwise_names_take_the_rest(merge_rows, rest, want):
    np.testing.assert_array_equal(merge_rows("iso_c", [[1.0], [3.0]], rest=rest), [want])
    full = merge_rows("iso_c", [np.full((2, 2), 1.0), np.full((2, 2), 3.0)], rest=rest, elementwise="x* w")
    np.testing.assert_array_equal(full, np.full((2, 2), want))


def test_numbers_near_the_largest_float_are_not_taken_for_zero(merge_rows):
    x = torch.diag(torch.tensor([3e38, 3e38]))
    x[0, 1] = 3e38
    want = float(torch.linalg.svdvals(x.double()).mean())
    close(torch.linalg.svdvals(merge_rows("iso_c", [x], scale=0.5).double()), [want / 2, want / 2])


@pytest.mark.parametrize(
    "bad", [{"mean_over": "all"}, {"rest": "median"}, {"calibration": -1.0}, {"scale": float("inf")}]
)
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        IsoC(**bad)
