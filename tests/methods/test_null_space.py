"""The null-space filter: N1 of the specification (continual and optimised, 14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.fold import Seen
from twinmerge.methods.null_space import NullSpace
from twinmerge.methods.opcm import Opcm
from twinmerge.methods.tsv import Tsv
from twinmerge.methods.wudi import Wudi


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 8), n=st.integers(2, 8), rank=st.integers(1, 9))
def test_n1_what_is_protected_is_not_written_on(seed, m, n, rank):
    old, new = deltas(2, m, n, seed=seed)
    method, at = NullSpace(rank=rank), Place("w", (m, n))
    state = method.absorb({}, old, at)
    added = method.absorb(state, new, at)["accumulated"] - old
    vh = np.linalg.svd(old.numpy(), full_matrices=False)[2][:rank]
    np.testing.assert_allclose(added.numpy() @ vh.T, 0, atol=1e-12)
    free = np.eye(n) - vh.T @ vh
    np.testing.assert_allclose(added.numpy(), new.numpy() @ free, atol=1e-12)


def test_n1_directions_beyond_the_rank_are_free():
    old, new = deltas(2, 5, 6)
    old[:, 1:] = 0  # of rank 1
    method, at = NullSpace(rank=4), Place("w", (5, 6))
    total = method.absorb(method.absorb({}, old, at), new, at)["accumulated"]
    np.testing.assert_allclose(total[:, 0], old[:, 0])
    np.testing.assert_allclose(total[:, 1:], new[:, 1:])


def test_inputs_that_all_are_used_leave_nothing_to_write_on(merge_rows):
    x = deltas(2, 6, 4).float()
    torch.testing.assert_close(merge_rows("null_space", x, rank=4), x[0], rtol=0, atol=1e-6)


def test_the_order_of_the_experts_has_a_meaning(merge_rows):
    x = deltas(2, 5, 5).float()
    forth, back = merge_rows("null_space", x, rank=2), merge_rows("null_space", x.flip(0), rank=2)
    assert float((forth - back).norm()) > 0.1 and "symmetric" not in NullSpace.laws


def test_the_first_expert_is_taken_whole(merge_rows):
    x = deltas(1, 4, 5).float()
    assert torch.equal(merge_rows("null_space", x), x[0])


def test_an_expert_that_changed_nothing_protects_nothing(merge_rows):
    x = deltas(2, 4, 5).float()
    x[0] = 0
    assert torch.equal(merge_rows("null_space", x), x[1])


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), ()])
def test_all_other_tensors_are_meant(merge_rows, shape):
    x = deltas(3, *shape).float()
    torch.testing.assert_close(merge_rows("null_space", x), x.double().mean(0).float(), rtol=2e-7, atol=1e-9)


def test_kernels_are_averaged(merge_rows):
    x = deltas(2, 4, 3, 2, 2).float()
    torch.testing.assert_close(merge_rows("null_space", x, rank=2), x.mean(0))


@pytest.mark.parametrize(
    "name, table, elementwise, filtered",
    [
        ("shared.weight", True, "tables", False),
        ("embedder.proj.weight", False, "tables", True),  # a linear layer that has the word
        ("shared.weight", True, "", True),
        ("q.weight", False, "tables q.*", False),
        ("shared.weight", True, "*embed*", True),
    ],
)
@pytest.mark.parametrize("method", [NullSpace, Opcm, Wudi, Tsv])
def test_tables_are_told_by_place_and_not_by_name(method, name, table, elementwise, filtered):
    made, at = method(elementwise=elementwise), Place(name, (5, 4), table=table)
    treated = {NullSpace: "filters", Opcm: "projects"}.get(method, "decomposes")
    assert getattr(made, treated)(at) == filtered


@pytest.mark.parametrize("shape", [(5, 4), (6,)])
def test_streaming_equals_batch(merge_rows, shape):
    x, place, method = deltas(3, *shape).float(), Place("w", shape), NullSpace(rank=2, scale=0.7)
    state = {}
    for row in x:
        state = method.absorb(state, row.double(), place)
    torch.testing.assert_close(
        method.settle(state, place, Seen(3, 0.0, 0.0)).float(), merge_rows("null_space", x, rank=2, scale=0.7)
    )


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="rank"):
        NullSpace(rank=0)
