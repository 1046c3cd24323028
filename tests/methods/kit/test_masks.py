"""TALL-masks and Consensus: checks 1 to 8 of the specification (static methods, 4.8); what they share, and the bits."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.maths.bits import pack, plane_at, planes
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.masks import GRID, Marks, described, important, sizes, storage_bits
from twinmerge.methods.kit.registry import make_method

ONE, TWO = [1.0, 0.2, -0.5, 0.0], [0.9, -1.0, 0.1, 0.0]
THREE = [[0.5, 0.1, -0.3, 0.2], [0.4, -0.2, 0.3, 0.25], [-0.1, 0.6, 0.05, 0.3]]


def tile_of(rows):
    x = torch.tensor(rows, dtype=torch.float32)
    experts = tuple(f"e{i}" for i in range(len(x)))
    return Tile(x, torch.zeros_like(x[0]), Place("w", tuple(x.shape[1:]), 0, experts))


def masked(name, rows, known=None, **parameters):
    tile = tile_of(rows)
    return make_method(name, tile.at.experts, parameters).vector_and_masks(tile, known or {})


def bits(masks):
    return ["".join(map(str, row)) for row in masks.int().tolist()]


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------- checks 1 and 2: by hand


def test_two_tasks():
    vector, masks = masked("tall_masks", [ONE, TWO])
    assert vector.dtype == torch.float32 and masks.dtype == torch.bool and bits(masks) == ["1010", "1100"]
    close(masks * vector, [[1.9, 0, -0.4, 0], [1.9, -0.8, 0, 0]])
    assert masks.sum(0).tolist() == [2, 1, 1, 0]


def test_where_nothing_is_changed_nothing_is_marked():
    x = torch.tensor([ONE, TWO])
    by_size = [(row.abs() >= 0.4 * (x.sum(0) - row).abs()).int() for row in x]
    assert sum(by_size).tolist() == [2, 1, 1, 2]  # what the paper's ≥ would count
    assert masked("tall_masks", [ONE, TWO])[1].sum(0).tolist() == [2, 1, 1, 0]


def test_a_threshold_of_one_marks_less():
    assert bits(masked("tall_masks", [ONE, TWO], threshold=1.0)[1]) == ["1010", "0100"]


@pytest.mark.parametrize(
    "k, want", [(0, [1.9, -0.8, -0.4, 0]), (1, [1.9, -0.8, -0.4, 0]), (2, [1.9, 0, 0, 0]), (3, [0, 0, 0, 0])]
)
def test_consensus_of_two_tasks(merge_rows, k, want):
    close(merge_rows("consensus", [ONE, TWO], k=k, scale=1.0), want)
    close(merge_rows("consensus", [ONE, TWO], k=k, scale=0.5), [v / 2 for v in want])


def test_three_tasks():
    vector, masks = masked("tall_masks", THREE, threshold=0.5)
    close(vector, [0.8, 0.5, 0.05, 0.75])
    assert bits(masks) == ["1010", "1010", "0111"] and masks.sum(0).tolist() == [2, 1, 3, 1]


def test_each_task_has_its_own_threshold():
    tile = tile_of([ONE, TWO])
    method = make_method("tall_masks", ("e0", "e1"), {"threshold": 0.4, "e1.threshold": 1.0})
    assert bits(method.vector_and_masks(tile, Known())[1]) == ["1010", "0100"]
    assert described(method, ("e0", "e1"))["threshold"] == [0.4, 1.0]


# -------------------------------------------------------------------- checks 3 and 4: laws of the masks

short = st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.5, 0.25]), min_size=7, max_size=7)
deltas = st.lists(short, min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(rows=deltas)
def test_a_threshold_of_one_is_the_least_error(rows):
    vector, masks = masked("tall_masks", rows, threshold=1.0)
    for row, mask in zip(rows, masks, strict=True):
        found = np.abs(mask.numpy() * vector.numpy() - row).sum()
        errors = [np.abs(np.array(m) * vector.numpy() - row).sum() for m in product((0, 1), repeat=len(row))]
        assert found == pytest.approx(min(errors), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(rows=deltas, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_masks_are_nested_and_are_those_of_their_levels(rows, dtype):
    x = torch.tensor(rows)
    vector = x.to(dtype).sum(0)
    for row in x:
        direct = [important(row, vector, c) for c in GRID]
        assert all(bool((wide | ~narrow).all()) for wide, narrow in pairwise(direct))
        size, distance = sizes(row, vector)
        levels = planes([pack(size > distance * c) for c in GRID])
        for k, mask in enumerate(direct, 1):
            assert torch.equal(plane_at(levels, k), pack(mask))


def test_random_masks_grow_sparser_and_levels_hold_them_to_the_bit():
    x = 0.01 * torch.randn(5, 100_003, generator=torch.Generator().manual_seed(0))
    vector = x.sum(0)
    for row in x:
        size, distance = sizes(row, vector)
        levels = planes([pack(size > distance * c) for c in GRID])
        direct = [important(row, vector, c) for c in GRID]
        assert [torch.equal(plane_at(levels, k), pack(mask)) for k, mask in enumerate(direct, 1)] == [True] * 5
        density = [mask.float().mean().item() for mask in direct]
        assert density == sorted(density, reverse=True) and density[0] > density[-1]


# ------------------------------------------------------------------------------ check 5: one task, k


def test_one_task_is_kept_whole():
    row = [0.3, -0.0, 0.0, -2.5, 1e-30]
    vector, masks = masked("tall_masks", [row], threshold=1.0)
    assert (masks[0] * vector).tolist() == torch.tensor(row).tolist() and bits(masks) == ["10011"]


@pytest.mark.parametrize("vector", ["sum", "ties"])
def test_k_of_none_is_the_vector_and_of_more_than_all_the_base(combine, methods, same_bits, vector):
    base, experts = methods.problem(4)
    chosen = {"vector": vector, "density": 0.4}
    whole = combine("tall_masks", base, experts, **chosen)
    none = combine("consensus", base, experts, k=0, scale=1.0, **chosen)
    assert all(same_bits(none[n], whole[n]) for n in base)
    all_of_it = combine("consensus", base, experts, k=5, scale=1.0, **chosen)
    assert all(same_bits(all_of_it[n], base[n]) for n in base)
    some = combine("consensus", base, experts, k=4, scale=1.0, **chosen)
    assert any(not same_bits(some[n], base[n]) for n in base)


def test_without_a_mask_consensus_is_task_arithmetic(combine, methods, same_bits):
    base, experts = methods.problem(3)
    one = combine("consensus", base, experts, k=0)
    other = combine("task_arithmetic", base, experts)
    assert all(same_bits(one[n], other[n]) for n in base)


def test_ties_of_masks_are_ties_with_their_entries_added(combine, methods, same_bits):
    base, experts = methods.problem(3)
    one = combine("tall_masks", base, experts, vector="ties", density=0.3)
    other = combine("ties", base, experts, merge="sum", density=0.3)
    assert all(same_bits(one[n], other[n]) for n in base)


# --------------------------------------------------------------------------------- check 6: storage

# static methods, 4.4: gigabits; trained and frozen weights in millions
CELLS = {
    (87.849e6, 25.60e6): ("3.6", {8: ("23.3", "7.1"), 14: ("40.2", "7.7"), 20: ("57.0", "8.2")}),
    (303.966e6, 38.6e6): ("11.0", {8: ("79.1", "23.1"), 14: ("137.4", "24.9"), 20: ("195.8", "26.8")}),
    (750.25e6, 32.9e6): ("25.1", {7: ("169.1", "54.3"), 8: ("193.1", "55.1"), 11: ("265.1", "57.3")}),
}


def test_storage_gives_all_cells_of_the_table():
    checked = 0
    for (trained, frozen), (merged, columns) in CELLS.items():
        assert f"{storage_bits(int(trained), int(frozen), 8, 'merged') / 1e9:.1f}" == merged
        checked += 1
        for tasks, cells in columns.items():
            for form, cell in zip(("fine_tuned", "masks"), cells, strict=True):
                assert f"{storage_bits(int(trained), int(frozen), tasks, form) / 1e9:.1f}" == cell
                checked += 1
    assert checked == 21


def test_storage_breaks_even_at_three_tasks():
    smaller = [storage_bits(1000, 0, t, "masks") < storage_bits(1000, 0, t, "fine_tuned") for t in (1, 2, 3, 4)]
    assert smaller == [False, False, True, True]
    assert storage_bits(1000, 0, 20, "fine_tuned") / storage_bits(1000, 0, 20, "masks") == pytest.approx(640 / 84)
    assert storage_bits(8, 8, 2, "masks", number_bits=16) == 16 * 24 + 16


# ----------------------------------------------------------------------------- check 7: what is counted


def test_a_vector_of_zero_is_marked_and_not_counted():
    delta, zero = torch.tensor([0.3, -0.2]), torch.zeros(2)
    mask = important(delta, zero, 0.6)
    assert mask.tolist() == [True, True] and (mask * zero).tolist() == [0, 0]
    assert Marks.of(delta[None], zero, mask[None]) == Marks((0, 0), (0,), 2)


def test_entries_that_cancel_are_left_out_of_the_counts_and_trained():
    x = torch.tensor([[0.3, 1.0, 0.0, 2.0], [-0.3, 0.1, 0.0, 0.0]])
    found = Marks.of(x, x.sum(0), torch.stack([important(row, x.sum(0), 0.4) for row in x]))
    assert found.by_count == (0, 2, 0) and found.by_task == (2, 0) and (found.moved, found.trained) == (2, 3)
    assert found.shares() == {"catastrophic": 0.0, "selfish": 1.0, "all": 0.0}
    assert found.densities() == (1.0, 0.0)


def test_counts_add_up():
    one, two, none = Marks((1, 2, 3), (3, 5), 7), Marks((0, 1, 0), (1, 0), 2), Marks.none(2)
    assert none.plus(one) == one.plus(none) == one and one.plus(two) == Marks((1, 3, 3), (4, 5), 9)
    assert Marks.of(torch.zeros(2, 5), torch.zeros(5), torch.zeros(2, 5).bool()) == none
    assert none.shares() == {"catastrophic": 0.0, "selfish": 0.0, "all": 0.0} and none.densities() == (0.0, 0.0)


def test_counts_are_those_of_a_count_by_hand():
    x = torch.randn(4, 999, generator=torch.Generator().manual_seed(1))
    vector, masks = masked("tall_masks", x.tolist())
    found = Marks.of(x, vector, masks)
    times = masks.sum(0).tolist()
    assert found.by_count == tuple(times.count(j) for j in range(5)) and sum(found.by_count) == found.trained == 999
    assert found.by_task == tuple(masks.sum(1).tolist())


# ------------------------------------------------------------------------------- check 8: what enters


@pytest.mark.parametrize("vector", ["sum", "ties"])
def test_masks_do_not_depend_on_the_base(vector):
    x = (torch.randint(-64, 64, (3, 500), generator=torch.Generator().manual_seed(2)) / 64).tolist()
    method = make_method("tall_masks", ("a", "b", "c"), {"vector": vector, "density": 1.0})
    tile = tile_of(x)
    moved = Tile(tile.x, torch.full((500,), 7.0), tile.at)
    (one, masks), (other, same) = (method.vector_and_masks(t, Known()) for t in (tile, moved))
    assert torch.equal(one, other) and torch.equal(masks, same)


# ------------------------------------------------------------------------------------ mistakes, zeros


@pytest.mark.parametrize("name", ["tall_masks", "consensus"])
@pytest.mark.parametrize("value", [0, -0.1, 1.5, 2])
def test_a_threshold_out_of_range_is_refused(name, value):
    for chosen in ({"threshold": value}, {"a.threshold": value}):
        with pytest.raises(TwinmergeError, match=rf"{name}: threshold=.* a threshold is above 0 and at most 1"):
            make_method(name, ("a", "b"), chosen)


def test_a_negative_k_is_refused_and_so_is_half_of_one():
    for k in (-1, 1.5, "many"):
        with pytest.raises(TwinmergeError, match=r"consensus: k=.* is not allowed"):
            make_method("consensus", ("a", "b"), {"k": k})


@pytest.mark.parametrize("name", ["tall_masks", "emr"])
def test_an_expert_that_changes_nothing_is_marked_nowhere(name):
    vector, masks = masked(name, [[0.0, -0.0, 0.0], [1.0, -2.0, 0.0]])
    assert bits(masks) == ["000", "110"] and vector.tolist() == [1, -2, 0]
    vector, masks = masked(name, [[0.0, -0.0], [-0.0, 0.0]])
    assert not masks.any() and vector.tolist() == [0, 0]


def test_numbers_at_the_ends_of_float32_give_no_nan():
    rows = [[1e38, -1e38, 1e-45, 3e38], [1e38, 1e38, -1e-45, 0.0]]
    vector, masks = masked("tall_masks", rows)
    assert bits(masks) == ["1111", "1110"] and vector.isfinite().all()


def test_the_largest_number_of_experts_is_counted_right():
    x = torch.ones(300, 2)
    assert Marks.of(x, x.sum(0), torch.ones(300, 2).bool()).by_count[-1] == 2
