"""Spherical interpolation: checks 1 to 8 of the specification (static methods, 6.7)."""

from __future__ import annotations

import math

import pytest
import torch

from twinmerge.errors import TwinmergeError


@pytest.mark.parametrize(
    "a, b, t, want",
    [
        ((1, 0), (0, 1), 0.5, (0.707107, 0.707107)),
        ((1, 0), (0, 1), 0.25, (0.92388, 0.382683)),
        ((2, 0), (0, 1), 0.5, (1.414214, 0.707107)),
        ((1, 0), (1, 0.01), 0.5, (1, 0.005)),
        ((1, 0), (math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)), 0.5, (0.5, 0.866025)),
        ((1, 2), (-1, -2), 0.5, (0, 0)),
        ((0, 0), (1, 1), 0.5, (0.5, 0.5)),
        ((1, 1), (0, 0), 0.25, (0.75, 0.75)),
    ],
    ids=["right angle", "quarter", "lengths", "nearly parallel", "120 degrees", "antiparallel", "zero a", "zero b"],
)
def test_values_of_the_specification(merge_rows, a, b, t, want):
    torch.testing.assert_close(
        merge_rows("slerp", [a, b], t=t), torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
def test_a_factor_of_one_is_not_the_end_of_the_way(merge_rows, compat):
    # tφ = 180° − φ, so that sin tφ / sin φ is 1
    got = merge_rows("slerp", [(-4, -4), (-2, 3)], t=0.7767260879989132, compat=compat)
    torch.testing.assert_close(got, torch.tensor([-3.5689291, 1.4310709]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [-0.1, 1.5])
def test_past_the_models_only_as_mergekit_does(merge_rows, t):
    got = merge_rows("slerp", [(1, 0), (0, 1)], t=t, compat="mergekit")
    angle = t * math.pi / 2
    torch.testing.assert_close(got, torch.tensor([math.cos(angle), math.sin(angle)]), rtol=0, atol=1e-6)
    with pytest.raises(TwinmergeError, match="lies past the models"):
        merge_rows("slerp", [(1, 0), (0, 1)], t=t)


def test_unit_vectors_stay_on_the_sphere(merge_rows):
    got = merge_rows("slerp", [(1, 0), (-0.5, math.sqrt(0.75))], t=0.3)
    assert got.norm().item() == pytest.approx(1, abs=1e-6)


def vectors(size=40):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, size, generator=rng)


def test_ends_are_the_experts_to_the_bit(merge_rows, same_bits):
    a, b = vectors()
    a[0], b[0] = -0.0, 1.0
    assert same_bits(merge_rows("average", [a]), a)  # that the rows arrive with their bits
    assert same_bits(merge_rows("slerp", [a, b], t=0.0), a)
    assert same_bits(merge_rows("slerp", [b, a], t=1.0), a)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_equal_models_stay_as_they_are(merge_rows, same_bits, t):
    a, _ = vectors()
    assert same_bits(merge_rows("slerp", [a, a], t=t), a)
    assert merge_rows("slerp", [(1, 2), (1, 2)], t=t).tolist() == [1, 2]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("near", [True, False])
def test_the_way_back_is_the_way_there(merge_rows, t, near):
    a, b = vectors()
    b = a + 1e-3 * b if near else b
    torch.testing.assert_close(
        merge_rows("slerp", [a, b], t=t), merge_rows("slerp", [b, a], t=1 - t), rtol=2e-7, atol=1e-7
    )


def test_the_first_expert_given_is_where_t_is_zero(combine):
    x = {"zebra": {"w": torch.tensor([1.0, 0.0])}, "ant": {"w": torch.tensor([0.0, 1.0])}}
    assert combine("slerp", {"w": torch.zeros(2)}, x, t=0.0)["w"].tolist() == [1, 0]


@pytest.mark.parametrize("cosine, on_the_sphere", [(0.9994, True), (0.9996, False)])
def test_the_line_begins_above_a_cosine_of_0_9995(merge_rows, cosine, on_the_sphere):
    got = merge_rows("slerp", [(1, 0), (cosine, math.sqrt(1 - cosine**2))], t=0.5)
    length = got.double().norm().item()
    assert length == pytest.approx(1 if on_the_sphere else math.sqrt((1 + cosine) / 2), abs=1e-6)
    assert on_the_sphere == (length > 0.99999)


def test_each_tensor_has_its_own_angle(combine):
    a = {"m": torch.tensor([1.0, 0.0]), "k": torch.tensor([[2.0, 0.0]])}
    b = {"m": torch.tensor([0.0, 1.0]), "k": torch.tensor([[4.0, 0.0]])}
    got = combine("slerp", a, {"a": a, "b": b})
    torch.testing.assert_close(got["m"], torch.full((2,), math.sqrt(0.5)))
    assert got["k"].tolist() == [[3.0, 0.0]]


def test_tiny_and_huge_tensors_have_an_angle(merge_rows):
    for size in (1e-30, 1e30):
        got = merge_rows("slerp", [(size, 0), (0, size)], t=0.5)
        torch.testing.assert_close(got, torch.full((2,), size * math.sqrt(0.5)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("a, b, want", [((0, 0), (1, 1), (0.707107, 0.707107)), ((2, 0), (0, 0), (1.414214, 0))])
def test_in_mergekit_a_zero_tensor_is_at_a_right_angle(merge_rows, a, b, want):
    got = merge_rows("slerp", [a, b], t=0.5, compat="mergekit")
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6)
