"""DELLA's drop by rank: checks 1 to 7 of the specification (static methods, 6.3), and what mergekit makes of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method

SLOW_VARIANTS = [
    {"density": 0.5, "epsilon": 0.4, "rescale": "l1", "seed": 3},
    {"density": 0.6, "epsilon": 0.3, "rescale": "none", "normalize": True},
    {"density": 1.0},
    {"density": 0.0},
]
SLOW_OTHERS = [{"compat": "mergekit", "rescale": "l1", "density": 0.5, "epsilon": 0.4}]


@pytest.fixture
def fixed_draws(monkeypatch):
    """Draws that are given, as numbers in [0, 1)."""

    def fix(draws):
        flat = (torch.tensor(draws, dtype=torch.float64).flatten() * (1 << 24)).floor().int()
        monkeypatch.setattr("twinmerge.methods.della_linear.draws24", lambda *key: flat[key[3] : key[3] + key[4]])

    return fix


def one(combine, x, **chosen):
    x = torch.as_tensor(x, dtype=torch.float32)
    return combine("della_linear", {"w": torch.zeros_like(x)}, {"a": {"w": x}}, scale=1.0, **chosen)["w"]


def test_kept_values_of_the_specification(combine, fixed_draws):
    fixed_draws([0.0] * 5)
    got = one(combine, [5.0, -1, 3, 2, -4], density=0.6, epsilon=0.1)
    want = torch.tensor([7.142857, -2, 5, 3.636364, -6.153846])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_the_chance_of_each_entry_is_that_of_its_rank(combine, fixed_draws):
    """Chances 0.7, 0.5, 0.6, 0.55 and 0.65, each met from below and above."""
    for less, kept in [(-1e-6, True), (1e-6, False)]:
        fixed_draws([q + less for q in (0.7, 0.5, 0.6, 0.55, 0.65)])
        assert (one(combine, [5.0, -1, 3, 2, -4], density=0.6, epsilon=0.1) != 0).tolist() == [kept] * 5


def test_of_equal_magnitudes_the_first_has_the_lower_chance(combine, fixed_draws):
    for less, kept in [(-1e-6, True), (1e-6, False)]:
        fixed_draws([q + less for q in (0.5, 0.6, 0.7)])
        assert (one(combine, [1.0, -1, 1], density=0.6, epsilon=0.1) != 0).tolist() == [kept] * 3


@pytest.mark.parametrize("rescale", ["inverse_keep", "l1", "none"])
@pytest.mark.parametrize("shape", [(600,), (20, 30), (600, 1), (6, 10, 10), ()])
def test_without_a_window_it_is_dare_to_the_bit(combine, same_bits, rescale, shape):
    rng = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(shape, generator=rng)}
    experts = {e: {"w": base["w"] + torch.randn(shape, generator=rng)} for e in "abc"}
    chosen = {"density": 0.5, "rescale": rescale, "seed": 4}
    got = combine("della_linear", base, experts, epsilon=0.0, **chosen)["w"]
    want = combine("dare", base, experts, **chosen)["w"]
    assert same_bits(got, want) or (rescale == "inverse_keep" and torch.allclose(got, want, rtol=2e-7, atol=0))


def test_the_mean_stays_and_shares_rise_in_even_steps(combine):
    """20,000 rows of the same five entries: each within 4 standard errors."""
    rows, count = torch.tensor([5.0, -1, 3, 2, -4]).expand(20_000, 5), 20_000
    got = one(combine, rows, density=0.6, epsilon=0.3).double()
    for x, q, column in zip((5.0, -1, 3, 2, -4), (0.9, 0.3, 0.6, 0.45, 0.75), got.T, strict=True):
        assert abs((column != 0).double().mean().item() - q) < 4 * math.sqrt(q * (1 - q) / count)
        assert abs(column.mean().item() - x) < 4 * abs(x) * math.sqrt((1 - q) / q / count)


@pytest.mark.parametrize("compat", ["paper", "mergekit"])
@pytest.mark.parametrize("shape", [(4000, 1), (4000, 1, 1), (1, 4000, 1)])
def test_rows_of_one_entry_are_kept_with_the_density(combine, compat, shape):
    """Which stop mergekit; of (1, 4000, 1) mergekit ranks the second axis."""
    rescale = "l1" if compat == "mergekit" else "inverse_keep"
    got = one(combine, torch.ones(shape), density=0.3, epsilon=0.2, compat=compat, rescale=rescale)
    assert (got != 0).double().mean().item() == pytest.approx(0.3, abs=0.03)
    first = (got.flatten()[:2000] != 0).double().mean().item()
    assert first == pytest.approx(0.2 if shape[0] == 1 and compat == "mergekit" else 0.3, abs=0.04)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_entry_is_kept_or_not(combine, shape):
    kept = [one(combine, torch.full(shape, 2.0), density=0.5, epsilon=0.1, seed=s).item() for s in range(40)]
    assert set(kept) == {0.0, 4.0}


@pytest.mark.parametrize("rescale", ["inverse_keep", "l1", "none"])
def test_keeping_all_is_task_arithmetic_and_keeping_none_is_the_base(combine, same_bits, rescale):
    base = torch.tensor([-0.0, 0.0, 1.0, -2.0])
    experts = {"a": {"w": torch.tensor([1.0, -0.3, 1.1, -2.0])}, "b": {"w": torch.tensor([0.5, 0.7, 0.9, -2.2])}}
    for density, want in [(1.0, combine("task_arithmetic", {"w": base}, experts)["w"]), (0.0, base)]:
        got = combine("della_linear", {"w": base}, experts, density=density, rescale=rescale)["w"]
        assert same_bits(got, want)
    mixed = combine("della_linear", {"w": base}, experts, density={"a": 1.0, "b": 0.0}, rescale=rescale)["w"]
    assert same_bits(mixed, combine("task_arithmetic", {"w": base}, {"a": experts["a"]})["w"])


def test_a_row_does_not_look_at_others_nor_at_other_experts(combine, same_bits):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(3, 50, generator=rng)
    other = torch.cat([x[:1], 9 * torch.randn(2, 50, generator=rng)])
    whole = one(combine, x, density=0.5, epsilon=0.3)
    assert same_bits(one(combine, other, density=0.5, epsilon=0.3)[0], whole[0])
    two = combine(
        "della_linear",
        {"w": torch.zeros(3, 50)},
        {"a": {"w": x}, "b": {"w": torch.zeros(3, 50)}},
        density=0.5,
        epsilon=0.3,
        scale=1.0,
    )
    assert same_bits(two["w"], whole)
    assert not torch.equal(one(combine, x, density=0.5, epsilon=0.3, seed=1), whole)


def test_blocks_of_rows_are_the_tensor(same_bits):
    rng = torch.Generator().manual_seed(2)
    method, names = make_method("della_linear", ("a", "b"), {"density": 0.5, "epsilon": 0.3}), ("a", "b")
    x, base = torch.randn(2, 12, 7, generator=rng), torch.randn(12, 7, generator=rng)
    place = Place("w", (12, 7), 0, names)
    assert method.grain_of(place) == "rows" and method.grain_of(Place("v", (5,))) == "matrix"
    whole = method.apply(Tile(x, base, place), Known())
    parts = [
        method.apply(Tile(x[:, a:b], base[a:b], place._replace(offset=7 * a)), Known())
        for a, b in ((0, 5), (5, 6), (6, 12))
    ]
    assert same_bits(torch.cat(parts), whole)


def test_the_l1_norm_of_each_tensor_and_expert_is_restored(combine):
    rng = torch.Generator().manual_seed(3)
    x = {n: torch.randn(30, 40, generator=rng) for n in "pq"}
    chosen = {"density": 0.4, "epsilon": 0.3, "rescale": "l1", "compat": "mergekit", "scale": 1.0}
    got = combine("della_linear", {n: torch.zeros(30, 40) for n in x}, {"a": x}, **chosen)
    for n in x:
        assert got[n].double().abs().sum().item() == pytest.approx(x[n].double().abs().sum().item(), rel=1e-6)


def test_mergekit_ranks_three_axes_along_the_second(combine):
    x = torch.arange(1.0, 4.0).reshape(1, 3, 1).expand(3000, 3, 2)
    chosen = {"density": 0.5, "epsilon": 0.4, "rescale": "none"}
    shares = (one(combine, x, compat="mergekit", **chosen) != 0).double().mean((0, 2))
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.9], atol=0.03)
    shares = (one(combine, x, **chosen) != 0).double().mean((0, 1))  # the last axis is all equal
    np.testing.assert_allclose(shares, [0.1, 0.9], atol=0.03)


@pytest.mark.parametrize(
    "compat, density, epsilon",
    [
        ("mergekit", 0.85, 0.15),
        ("mergekit", 0.15, 0.15),
        ("paper", 0.9, 0.11),
        ("paper", 0.1, 0.1),
        ("paper", 0.5, 0.7),
    ],
)
def test_a_window_that_leaves_the_chances_is_refused(compat, density, epsilon):
    given = {"b.density": density, "epsilon": epsilon, "density": 0.5, "compat": compat, "rescale": "l1"}
    with pytest.raises(
        TwinmergeError, match=f"keep chances of '{'a' if epsilon > 0.5 else 'b'}' go from .* Take an eps"
    ):
        make_method("della_linear", ("a", "b"), given)


def test_half_a_width_is_not_negative():
    for given in ({"epsilon": -0.1}, {"b.epsilon": -0.1}):
        with pytest.raises(TwinmergeError, match="epsilon is half the width of a window, 0 or more"):
            make_method("della_linear", ("a", "b"), given)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_window_is_asked_of_what_is_kept_whole_or_not_at_all(density):
    given = {"density": density, "epsilon": 0.15, "compat": "mergekit", "rescale": "l1"}
    make_method("della_linear", ("a", "b"), given)


def test_a_highest_chance_of_one_is_allowed_but_in_mergekit():
    make_method("della_linear", ("a",), {"density": 0.9, "epsilon": 0.1})


def test_mergekit_divides_by_no_chance():
    with pytest.raises(TwinmergeError, match="Add rescale=l1 or rescale=none"):
        make_method("della_linear", ("a",), {"compat": "mergekit"})
