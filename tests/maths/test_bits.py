"""One bit for each entry, and levels in three: every length, NumPy's own bytes, and masks that come back as they
were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.maths.bits import MOST, byte_count, check, pack, plane_at, planes, unpack

masks = st.lists(st.booleans(), max_size=70).map(lambda row: torch.tensor(row, dtype=torch.bool))


@settings(max_examples=100, deadline=None)
@given(mask=masks)
def test_a_mask_of_any_length_comes_back(mask):
    bits = pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == byte_count(len(mask)) == (len(mask) + 7) // 8
    assert bits.numpy().tobytes() == np.packbits(mask.numpy(), bitorder="little").tobytes()
    assert torch.equal(unpack(bits, len(mask)), mask)
    for j, entry in enumerate(mask.tolist()):
        assert (int(bits[j // 8]) >> j % 8 & 1) == entry


def test_ten_bits_are_two_bytes_and_not_sixteen_bits():
    mask = torch.ones(10, dtype=torch.bool)
    bits = pack(mask)
    assert bits.tolist() == [255, 3]
    assert len(np.unpackbits(bits.numpy())) == 16  # what is read without a length
    assert unpack(bits, 10).tolist() == [True] * 10


def test_shapes_and_strides_are_read_flat():
    mask = torch.arange(24).reshape(4, 6) % 5 == 0
    assert torch.equal(unpack(pack(mask), 24), mask.flatten())
    assert torch.equal(unpack(pack(mask.T), 24), mask.T.flatten())
    assert pack(torch.tensor(True)).tolist() == [1] and pack(torch.zeros(0, 3, dtype=torch.bool)).tolist() == []


@pytest.mark.parametrize(
    "bits, count, what",
    [
        (torch.zeros(2, dtype=torch.uint8), 17, "17 bits are 3 bytes"),
        (torch.zeros(2, dtype=torch.uint8), 8, "8 bits are 1 bytes"),
        (torch.zeros(1, 2, dtype=torch.uint8), 16, "16 bits are 2 bytes"),
        (torch.zeros(2, dtype=torch.int8), 16, "of torch.int8"),
        (torch.tensor([0, 4], dtype=torch.uint8), 10, "beyond the 10"),
    ],
)
def test_bytes_of_another_length_are_refused(bits, count, what):
    for refuse in (check, unpack):
        with pytest.raises(ValueError, match=what):
            refuse(bits, count)


def test_only_masks_are_packed():
    with pytest.raises(ValueError, match=r"torch\.float32"):
        pack(torch.ones(3))


@settings(max_examples=100, deadline=None)
@given(levels=st.lists(st.integers(0, MOST), max_size=40), count=st.integers(1, MOST))
def test_nested_masks_come_back_out_of_their_levels(levels, count):
    level = torch.tensor(levels, dtype=torch.int64).clamp_max(count)
    nested = [pack(level >= k) for k in range(1, count + 1)]
    stored = planes(nested)
    assert stored.shape == (3, byte_count(len(level)))
    values = sum(unpack(row, len(level)).long() << plane for plane, row in enumerate(stored))
    assert torch.equal(values, level)
    for k, mask in enumerate(nested, 1):
        assert torch.equal(plane_at(stored, k), mask)
    for k in range(count + 1, MOST + 1):
        assert not plane_at(stored, k).any()


@pytest.mark.parametrize("least", [0, 8, -1])
def test_there_are_seven_levels(least):
    with pytest.raises(ValueError, match="a level of 1 to 7"):
        plane_at(torch.zeros(3, 1, dtype=torch.uint8), least)


def test_planes_of_too_many_masks_or_of_different_lengths_are_refused():
    one = torch.zeros(1, dtype=torch.uint8)
    for wrong in ([], [one] * 8, [one, torch.zeros(2, dtype=torch.uint8)]):
        with pytest.raises(ValueError, match="1 to 7 masks of one length"):
            planes(wrong)
