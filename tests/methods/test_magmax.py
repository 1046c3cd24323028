"""MagMax: checks 1 to 4 and 6 of the specification (continual and optimised methods, section 11)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from twinmerge.engine.calls import merge
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.kit.registry import make_method

ROWS = [[1.0, -2.0, 0.0], [-1.0, 1.0, 0.0]]


def test_the_largest_and_of_equal_ones_the_later(merge_rows):
    assert merge_rows("magmax", ROWS, scale=1.0).tolist() == [-1.0, -2.0, 0.0]
    assert merge_rows("magmax", ROWS[::-1], scale=1.0).tolist() == [1.0, -2.0, 0.0]
    assert merge_rows("magmax", [*ROWS, [1.0, 2.0, 0.0]], scale=1.0).tolist() == [1.0, 2.0, 0.0]


def test_the_default_scale_is_a_half(merge_rows):
    assert merge_rows("magmax", ROWS).tolist() == [-0.5, -1.0, 0.0]


def test_an_expert_given_twice_counts_once(combine, same_bits):
    rng = torch.Generator().manual_seed(0)
    base, one, other = (torch.randn(500, generator=rng) for _ in range(3))
    once = combine("magmax", {"w": base}, {"a": {"w": one}, "b": {"w": other}})["w"]
    twice = combine("magmax", {"w": base}, {"a": {"w": one}, "b": {"w": other}, "c": {"w": one}, "d": {"w": other}})
    assert same_bits(twice["w"], once)


def test_one_expert_at_scale_one_is_that_expert_within_one_ulp(combine):
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(1000, generator=rng)
    expert = base + 1e-3 * torch.randn(1000, generator=rng)
    got = combine("magmax", {"w": base}, {"a": {"w": expert}}, scale=1.0)["w"]
    assert ((got - expert).abs().numpy() <= np.spacing(expert.abs().numpy())).all()


@settings(deadline=None)
@given(st.permutations(range(4)))
def test_without_ties_the_order_has_no_meaning(merge_rows, same_bits, order):
    rows = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    assert same_bits(merge_rows("magmax", rows[list(order)]), merge_rows("magmax", rows))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_entry_by_entry_by_hand(merge_rows, rows):
    want = [sorted(enumerate(of), key=lambda item: (abs(item[1]), item[0]))[-1][1] for of in zip(*rows, strict=True)]
    assert merge_rows("magmax", rows, scale=1.0).tolist() == want


def test_weights_count_before_the_comparison(merge_rows):
    got = merge_rows("magmax", [[1.0, 3.0], [2.0, 2.0]], weights={"a": 1.5, "b": -1.0}, scale=1.0)
    assert got.tolist() == [-2.0, 4.5]


def test_unchanged_entries_and_scale_zero_are_the_base_to_the_bit(combine, same_bits):
    base = torch.tensor([-0.0, 0.0, 0.1])
    assert same_bits(combine("magmax", {"w": base}, {"a": {"w": base}, "b": {"w": base}})["w"], base)
    assert same_bits(combine("magmax", {"w": base}, {"a": {"w": base + 1}}, scale=0.0)["w"], base)


def test_the_tile_is_left_as_it_is():
    x = torch.tensor(ROWS)
    for work in (torch.float32, torch.float64):
        make_method("magmax", ("a", "b"), {}).apply(Tile(x, torch.zeros(3), Place("w", (3,)), work), {})
        assert x.tolist() == ROWS


def test_order_and_integers_of_checkpoints(tmp_path):
    files = {}
    for name, row in {"base": [0.0] * 3, "b": ROWS[0], "a": ROWS[1]}.items():
        (tmp_path / name).mkdir()
        tensors = {"w": torch.tensor(row), "steps": torch.tensor([len(files)])}
        save_file(tensors, tmp_path / name / "model.safetensors")
        files[name] = str(tmp_path / name)
    base = files.pop("base")
    for order in ("ba", "ab"):
        got = merge("magmax", base=base, experts={n: files[n] for n in order}, scale=1.0, progress=False).state_dict()
        assert got["steps"].tolist() == [0]
        assert got["w"].tolist() == [-1.0 if order[-1] == "a" else 1.0, -2.0, 0.0]


@pytest.mark.parametrize(
    "given, said", [({"sclae": 1}, "Did you mean 'scale'"), ({"scale": float("nan")}, "scale=nan")]
)
def test_mistakes(given, said):
    with pytest.raises(TwinmergeError, match=said):
        make_method("magmax", ("a", "b"), given)
