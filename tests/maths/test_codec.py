"""Four bits, eight bits and half precision: bounded errors, and bytes that do not change when they are written
again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.maths.codec import codec_names, decode, encode, pack, projected, slice_bytes, unpack
from twinmerge.maths.codecs.int4 import GROUP

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
    again = decode(stored, scale, "int8", dim)
    step = scale.reshape([-1 if d == dim else 1 for d in range(2)])
    assert bool(((x - again).abs() <= 0.5001 * step).all())
    assert bool((scale * 127 <= x.abs().amax(1 - dim) * (1 + 2**-14)).all())
    twice, same = encode(again, "int8", dim)
    assert same is not None and torch.equal(twice, stored) and torch.equal(same, scale)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 63, 64, 65, 130])),
    seed=st.integers(0, 99),
    dim=st.integers(0, 1),
)
def test_int4_is_within_half_a_step_of_its_group_and_the_same_bytes_again(shape, seed, dim):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
    x = x if dim == 0 else x.T
    stored, scale = encode(x, "int4", dim)
    assert stored.dtype == torch.uint8 and scale is not None and scale.dtype == torch.bfloat16
    assert stored.shape == (shape[0], -(-shape[1] // 2)) and scale.shape == (shape[0], -(-shape[1] // GROUP))
    assert stored.nbytes + scale.nbytes == shape[0] * slice_bytes(shape[1], "int4")
    again = decode(stored, scale, "int4", dim, x.shape)
    for row, near, steps in zip(x.movedim(dim, 0), again.movedim(dim, 0), scale.float(), strict=True):
        for start, step in zip(range(0, shape[1], GROUP), steps, strict=True):
            group = slice(start, start + GROUP)
            assert bool(((row[group] - near[group]).abs() <= 0.5001 * step).all())
            assert float(step) * 7 <= float(row[group].abs().max()) * (1 + 2**-6)
    twice, same = encode(again, "int4", dim)
    assert same is not None and torch.equal(twice, stored) and torch.equal(same, scale)


def test_int4_bytes_of_known_numbers():
    stored, scale = encode(torch.tensor([[14.0, -14.0, 4.0], [0.0, 0.0, -0.5]]), "int4", 0)
    assert stored.tolist() == [[0xF | 0x1 << 4, 0xA | 0x8 << 4], [0x8 | 0x8 << 4, 0x1 | 0x8 << 4]]
    assert scale.tolist() == [[2.0], [0.07177734375]]  # 0.5 / 7, rounded up to 8 bits
    swapped, _ = encode(torch.tensor([[14.0], [-14.0], [4.0]]), "int4", 1)
    assert torch.equal(swapped, stored[:1])


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_zeros_numbers_near_zero_and_nothing_at_all(codec):
    for x in (torch.zeros(2, 3), torch.full((2, 3), 1e-44), torch.empty(0, 3), torch.empty(2, 0)):
        got = projected(x, codec, 0)
        assert got.shape == x.shape and bool(got.isfinite().all()) and torch.equal(projected(got, codec, 0), got)


@pytest.mark.parametrize("codec", codec_names())
def test_pack_and_unpack_are_the_projection(codec):
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": torch.randn(5, 7, generator=generator), "b": torch.randn(7, generator=generator)}
    stored, header = pack(tensors, codec, {"w": 0})
    found = unpack(stored, header)
    assert torch.equal(found["w"], projected(tensors["w"], codec, 0))
    assert torch.equal(found["b"], projected(tensors["b"], codec)) and found.keys() == tensors.keys()
    again, _ = pack(found, codec, {"w": 0})
    assert all(torch.equal(again[n], stored[n]) for n in stored)
    sizes = {"none": 4 * 42, "float16": 2 * 42, "int8": 35 + 4 * 5 + 2 * 7, "int4": 5 * (4 + 2) + 2 * 7}
    assert sum(t.numel() * t.element_size() for t in stored.values()) == sizes.get(
        codec, 5 * slice_bytes(7, codec) + 2 * 7
    )


def test_what_cannot_be_stored_or_read():
    with pytest.raises(TwinmergeError, match=r"7e\+04 is beyond half precision"):
        encode(torch.tensor([7e4]), "float16")
    with pytest.raises(TwinmergeError, match="Unknown codec 'int9'. Did you mean 'int8'"):
        encode(torch.ones(1), "int9")
    stored, header = pack({"w": torch.ones(2, 2)}, "int8", {"w": 0})
    del stored["w#scale"]
    with pytest.raises(TwinmergeError, match="scale of 'w' is missing"):
        unpack(stored, header)
    with pytest.raises(TwinmergeError, match="'int1', which neither this release nor"):
        unpack(stored, {**header, "codec": "int1"})
    stored, header = pack({"w": torch.ones(2, 5)}, "int4", {"w": 0})
    for damage in ({"w": stored["w"][:, :2]}, {"w": stored["w"].char()}, {"w#scale": stored["w#scale"][:1]}):
        with pytest.raises(ValueError, match="four bits"):
            unpack({**stored, **damage}, header)
    with pytest.raises(KeyError):
        unpack(stored, {**header, "shapes": {}})
