"""EMR: checks E1 to E3 and (4) to (6) of the specification (continual and optimised, 8)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.bits import pack, unpack
from twinmerge.methods.emr import Emr
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method


def tile_of(rows, name="w"):
    x = torch.tensor(rows, dtype=torch.float32)
    return Tile(x, torch.zeros_like(x[0]), Place(name, tuple(x.shape[1:]), 0, tuple("abcdefgh"[: len(x)])))


def merged(method, model):
    """tensor -> rows; gives vectors, masks and scales of the model."""
    vectors, masks, masses, sizes = {}, {}, {}, {}
    for name, rows in model.items():
        tile = tile_of(rows, name)
        vector = method.one_vector(tile, Known())
        vectors[name], masks[name] = method.vector_and_masks(tile, Known())
        masses[name] = method.masses(tile, vector, masks[name]).sum(2).tolist()
        sizes[name] = vector.numel()
    count = len(next(iter(model.values())))
    return vectors, masks, method.scales(masses, sizes, count)


def bits(masks):
    return ["".join(map(str, row)) for row in masks.int().tolist()]


def test_e1_two_experts():
    vectors, masks, scales = merged(Emr(), {"w": [[2.0, -1, 0], [-1, -3, 4]]})
    assert vectors["w"].tolist() == [2, -3, 4] and bits(masks["w"]) == ["110", "011"]
    assert scales == pytest.approx([0.6, 8 / 7]) and scales[1] == pytest.approx(1.142857, abs=1e-6)


def test_e2_one_expert_comes_back():
    row = [0.5, 0.0, -2.0, -0.0]
    vectors, masks, scales = merged(Emr(), {"w": [row]})
    assert scales == [1.0] and bits(masks["w"]) == ["1010"]
    assert (masks["w"][0] * vectors["w"]).tolist() == row


def test_e3_entries_or_means_of_tensors():
    model = {"a": [[4.0], [1.0]], "b": [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]}
    assert merged(Emr(), model)[2][0] == pytest.approx(7 / 10)  # (4 + 3) / (4 + 6)
    assert merged(Emr(compat="official"), model)[2][0] == pytest.approx(5 / 6)  # (4 + 1) / (4 + 2)


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_4_an_expert_that_changes_nothing_has_scale_zero(compat):
    vectors, masks, scales = merged(Emr(compat=compat), {"w": [[0.0, -0.0], [1.0, -1.0]], "empty": [[], []]})
    assert scales == [0.0, 1.0] and bits(masks["w"]) == ["00", "11"] and vectors["empty"].shape == (0,)
    assert merged(Emr(compat=compat), {"w": [[0.0], [0.0]]})[2] == [0.0, 0.0]


def test_4_an_expert_that_is_outvoted_everywhere_has_scale_zero():
    vectors, masks, scales = merged(Emr(), {"w": [[-1.0, 1.0], [3.0, -3.0]]})
    assert scales == [0.0, 1.0] and bits(masks["w"]) == ["00", "11"] and vectors["w"].tolist() == [3, -3]


def test_5_masks_are_one_bit_and_come_back():
    x = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    masks = Emr().vector_and_masks(tile_of(x.tolist()), Known())[1]
    packed = [pack(mask) for mask in masks]
    assert {len(row) for row in packed} == {126}
    assert all(torch.equal(unpack(row, 1001), mask) for row, mask in zip(packed, masks, strict=True))


numbers = st.lists(st.integers(-8, 8).map(lambda n: n / 8), min_size=5, max_size=5)


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(numbers, min_size=2, max_size=5), data=st.data())
def test_6_another_order_of_the_experts_permutes_masks_only(rows, data):
    order = data.draw(st.permutations(range(len(rows))))
    one, masks, scales = merged(Emr(), {"w": rows})
    other, turned, permuted = merged(Emr(), {"w": [rows[i] for i in order]})
    assert one["w"].numpy().tobytes() == other["w"].numpy().tobytes()
    assert torch.equal(masks["w"][order], turned["w"]) and permuted == [scales[i] for i in order]


def test_votes_that_cancel_go_to_the_negative_entries():
    vectors, masks, _ = merged(Emr(), {"w": [[1.0, -2.0, 0.0], [-1.0, 2.0, -0.0]]})
    assert vectors["w"].tolist() == [-1, -2, 0] and bits(masks["w"]) == ["010", "100"]
    assert not vectors["w"].signbit()[2]  # 0.0, not -0.0, where nobody changes anything
    assert not merged(Emr(), {"w": [[-0.0, 0.0], [-0.0, -0.0]]})[0]["w"].signbit().any()


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(numbers, min_size=1, max_size=5))
def test_the_mean_change_of_each_expert_stays(rows):
    vectors, masks, scales = merged(Emr(), {"w": rows})
    for row, mask, scale in zip(rows, masks["w"], scales, strict=True):
        kept = float((scale * mask * vectors["w"]).abs().sum())
        assert kept == pytest.approx(sum(map(abs, row)) if bool(mask.any()) else 0.0, rel=1e-6)


def test_parameters():
    assert make_method("emr", ("a",), {"compat": "official"}) == Emr(compat="official")
