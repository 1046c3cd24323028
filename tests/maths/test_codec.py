"""Eight bits and half precision: bounded errors, and bytes that do not change when they are written again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.maths.codec import CODECS, decode, encode, pack, projected, unpack

numbers = st.floats(-1e6, 1e6, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=6),
    dim=st.integers(0, 1),
)
def test_int8_is_within_half_a_step_and_the_same_bytes_again(rows, dim):
    x = torch.tensor(rows)
    stored, scale = encode(x, "int8", dim)
    assert stored.dtype == torch.int8 and scale is not None and scale.dtype == torch.float32
    again = decode(stored, scale, dim)
    step = scale.reshape([-1 if d == dim else 1 for d in range(2)])
    assert bool(((x - again).abs() <= 0.5001 * step).all())
    assert bool((scale * 127 <= x.abs().amax(1 - dim) * (1 + 2**-14)).all())
    twice, same = encode(again, "int8", dim)
    assert same is not None and torch.equal(twice, stored) and torch.equal(same, scale)


def test_zeros_numbers_near_zero_and_nothing_at_all():
    for x in (torch.zeros(2, 3), torch.full((2, 3), 1e-44), torch.empty(0, 3), torch.empty(2, 0)):
        got = projected(x, "int8", 0)
        assert got.shape == x.shape and bool(got.isfinite().all()) and torch.equal(projected(got, "int8", 0), got)


@pytest.mark.parametrize("codec", CODECS)
def test_pack_and_unpack_are_the_projection(codec):
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(5, 7, generator=generator), "b": torch.randn(7, generator=generator)}
    stored, header = pack(tensors, codec, {"w": 0})
    found = unpack(stored, header)
    assert torch.equal(found["w"], projected(tensors["w"], codec, 0))
    assert torch.equal(found["b"], projected(tensors["b"], codec)) and found.keys() == tensors.keys()
    again, _ = pack(found, codec, {"w": 0})
    assert all(torch.equal(again[n], stored[n]) for n in stored)
    sizes = {"none": 4 * 42, "float16": 2 * 42, "int8": 35 + 4 * 5 + 2 * 7}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sizes[codec]


def test_what_cannot_be_stored_or_read():
    with pytest.raises(TwinmergeError, match=r"7e\+04 is beyond half precision"):
        encode(torch.tensor([7e4]), "float16")
    with pytest.raises(TwinmergeError, match="Unknown codec 'int9'. Did you mean 'int8'"):
        encode(torch.ones(1), "int9")
    stored, header = pack({"w": torch.ones(2, 2)}, "int8", {"w": 0})
    del stored["w#scale"]
    with pytest.raises(TwinmergeError, match="scale of 'w' is missing"):
        unpack(stored, header)
    with pytest.raises(TwinmergeError, match="'int1' is unknown"):
        unpack(stored, {**header, "codec": "int1"})
