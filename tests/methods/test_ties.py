"""TIES: checks 1 to 7 of the specification (static methods, 2.6), and the other implementations' values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.registry import make_method
from twinmerge.recipes.recipe import Recipe

SLOW_OTHERS = [{"compat": "mergekit", "rescale": "l1"}]

R1 = [0.9, -0.1, 0.5, 0, -0.7, 0.2, 0.05, -0.3, 0.6, -0.02]
R2 = [0.8, 0.3, -0.6, 0.1, 0.7, -0.2, 0.04, -0.4, -0.1, 0.01]
R3 = [-0.2, 0.25, 0.55, -0.9, 0.1, 0.3, -0.06, -0.5, 0, 0.03]
ROWS = [R1, R2, R3]
ONE_TO_TEN = [1.0, -2, 3, -4, 5, -6, 7, -8, 9, -10]
ALL_EQUAL = [1.0, -1, 1, 1, -1]


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------- check 1: trim


@pytest.mark.parametrize("compat, kept", [("paper", {9, -10}), ("mergekit", {9, -10}), ("official", {-8, 9, -10})])
def test_trim_keeps_k_and_the_official_code_one_more(merge_rows, compat, kept):
    assert set(merge_rows("ties", [ONE_TO_TEN], compat=compat).tolist()) - {0} == kept


@pytest.mark.parametrize("size, density, official", [(100, 0.29, 29), (50, 0.58, 29), (10, 0.2, 3), (10, 1.0, 10)])
def test_the_official_count_is_that_of_floating_point(merge_rows, size, density, official):
    """int(100 · 0.29) is 28, and one more is kept."""
    rows = [np.arange(1.0, size + 1)]
    assert np.count_nonzero(merge_rows("ties", rows, density=density, compat="official")) == official
    assert np.count_nonzero(merge_rows("ties", rows, density=density)) == round(density * size)


def test_where_no_sign_has_a_majority_the_official_maximum_is_zero(merge_rows):
    """Its mean takes the negative entries of cancelled votes then; its maximum is multiplied with the sign, which is
    0."""
    rows = [[2.0], [-2.0]]
    assert merge_rows("ties", rows, density=1.0, compat="official").item() == -2.0
    assert merge_rows("ties", rows, density=1.0, compat="official", merge="max").item() == 0.0


@pytest.mark.parametrize(
    "compat, want", [("paper", [1.0, 0, 0, 0, 0]), ("mergekit", [1.0, 0, 0, 0, 0]), ("official", ALL_EQUAL)]
)
def test_among_equals_the_first_and_in_the_official_code_all(merge_rows, compat, want):
    assert merge_rows("ties", [ALL_EQUAL], compat=compat).tolist() == want


def test_equals_in_two_tensors_are_kept_in_name_order(combine):
    experts = {"x": {"b": torch.ones(3), "a": -torch.ones(3)}}
    base = {n: torch.zeros(3) for n in ("b", "a")}
    got = combine("ties", base, experts, density=0.7)  # floor(4.2) of 6
    assert got["a"].tolist() == [-1, -1, -1] and got["b"].tolist() == [1, 0, 0]


def test_density_is_the_decimal_that_was_written(merge_rows):
    assert int((merge_rows("ties", [torch.arange(1.0, 101)], density=0.29) != 0).sum()) == 29  # int(100 * .29) is 28


# ------------------------------------------------------------------------- checks 2 and 3: election


@pytest.mark.parametrize("merge, want", [("mean", 0.45), ("sum", 0.9), ("max", 0.5)])
def test_disjoint_merges_of_a_contested_entry(merge_rows, merge, want):
    close(merge_rows("ties", [[0.5], [0.4], [-0.6]], density=1.0, merge=merge), [want])


@pytest.mark.parametrize(
    "other, chosen, want",
    [
        ((0.0, 0.0), {"tie": "zero"}, 0),
        ((0.0, 0.0), {"tie": "majority"}, 0),
        ((0.0, 0.0), {"tie": "positive"}, 1),
        ((0.0, 0.0), {"compat": "mergekit"}, 1),
        ((0.0, 0.0), {"compat": "official"}, -1),
        ((2.0, 3.0), {"tie": "zero"}, 0),
        ((2.0, 3.0), {"tie": "majority"}, 1),
        ((2.0, 3.0), {"compat": "official"}, 1),
        ((-2.0, -3.0), {"tie": "majority"}, -1),
        ((-2.0, -3.0), {"tie": "positive"}, 1),
        ((-2.0, -3.0), {"compat": "official"}, -1),
        ((-2.0, -3.0), {"compat": "mergekit"}, 1),
    ],
)
def test_cancelled_votes(merge_rows, other, chosen, want):
    rows = [[1.0, other[0]], [-1.0, other[1]]]
    assert merge_rows("ties", rows, density=1.0, **chosen)[0].item() == want


def test_the_majority_is_of_the_whole_model(combine):
    zero = {"a": torch.zeros(1), "z": torch.zeros(2)}
    experts = {
        "p": {"a": torch.tensor([1.0]), "z": torch.tensor([-2.0, -3.0])},
        "q": {"a": torch.tensor([-1.0]), "z": torch.tensor([-1.0, -1.0])},
    }
    chosen = {"density": 1.0, "scope": "tensor", "tie": "majority"}
    assert combine("ties", zero, experts, **chosen)["a"].item() == -1


def test_votes_that_cancel_only_after_rounding_do_not_cancel(merge_rows):
    rows = [[1e8], [1.0], [-1e8]]
    assert merge_rows("ties", rows, density=1.0).item() == pytest.approx((1e8 + 1) / 2)


def test_weights_act_after_the_election_and_in_mergekit_before(merge_rows):
    rows, weights = [[1.0], [-0.5]], {"a": 0.2, "b": 0.8}
    assert merge_rows("ties", rows, density=1.0, weights=weights).item() == 1.0
    assert merge_rows("ties", rows, density=1.0, weights=weights, compat="mergekit").item() == -0.5


STEPS = [(17, -20), (9, -5), (-7, 3), (3, -5), (1, -2)]  # that cancel, or nearly so, with the weights below


@pytest.mark.parametrize("weights", [(1.0, 0.85), (0.5, 0.9), (0.3, 0.7), (0.5, 0.3), (0.2, 0.1), (0.6, 0.4)])
def test_votes_of_mergekit_are_those_of_plain_float32(merge_rows, weights):
    """1 · 17 and 0.85 · 20 are equal as float32, and no sum in more digits says so; a tie goes to +1."""
    rows = 2.0**-13 * np.array([[*steps, *np.negative(steps)] for steps in zip(*STEPS, strict=True)], np.float32)
    a, b = (np.float32(w) * row for w, row in zip(weights, rows, strict=True))  # each product rounded
    sign = np.where(a + b >= 0, 1, -1)
    want = sum(np.where(np.sign(row) == sign, row, np.float32(0)) for row in (a, b))
    chosen = {"density": 1.0, "merge": "sum", "compat": "mergekit", "weights": dict(zip("ab", weights, strict=True))}
    close(merge_rows("ties", rows, **chosen), want.tolist())
    close(merge_rows("dare_ties", rows, rescale="none", **chosen), want.tolist())


def test_votes_of_mergekit_are_added_in_the_order_of_its_models(merge_rows):
    """2²⁴ + 1 − 2²⁴ is 0 in float32, and 2²⁴ − 2²⁴ + 1 is 1."""
    far = float(1 << 24)
    chosen = {"density": 1.0, "merge": "sum", "compat": "mergekit"}
    assert merge_rows("ties", [[-far], [-1.0], [far]], **chosen).item() == far  # a tie goes to +1
    assert merge_rows("ties", [[-far], [far], [-1.0]], **chosen).item() == -far
    recipe = Recipe("ties", "base", {"z": "m", "a": "n"}, {"compat": "mergekit"})
    assert recipe.order == ("z", "a") and Recipe("ties", "base", {"z": "m", "a": "n"}).order == ("a", "z")


# -------------------------------------------------------------------------------- check 4: the rows


@pytest.mark.parametrize(
    "chosen, want",
    [
        ({}, [0.85, 0, 0.55, -0.9, 0, 0, 0, 0, 0, 0]),
        ({"scope": "tensor"}, [0.85, 0, 0.55, -0.9, 0, 0, 0, 0, 0, 0]),
        ({"tie": "majority"}, [0.85, 0, 0.55, -0.9, 0.7, 0, 0, 0, 0, 0]),
        ({"compat": "mergekit"}, [0.85, 0, 0.55, -0.9, 0.7, 0, 0, 0, 0, 0]),
        ({"compat": "official"}, [0.85, 0, -0.6, -0.9, -0.7, 0, 0, -0.5, 0.6, 0]),
        ({"density": 1.0}, [0.85, 0.275, 0.525, -0.9, 0.4, 0.25, 0.045, -0.4, 0.6, 0.02]),
    ],
    ids=str,
)
def test_rows_of_the_specification(merge_rows, chosen, want):
    close(merge_rows("ties", ROWS, **chosen), want)


# -------------------------------------------------------------------------------- check 5: identities


@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("experts", [1, 3, 7])
def test_identical_experts_give_base_plus_their_scaled_trim(combine, same_bits, experts, scale):
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(500, generator=rng)
    expert = base + 0.1 * torch.randn(500, generator=rng)
    delta = expert - base
    mask = torch.zeros(500, dtype=torch.bool)
    mask[delta.abs().argsort(descending=True)[:100]] = True
    want = torch.where(mask, (base + scale * delta.double()).float(), base)
    assert same_bits(
        combine("ties", {"w": base}, {f"e{i}": {"w": expert} for i in range(experts)}, scale=scale)["w"], want
    )


def test_permuted_experts_give_the_same_bits(combine, same_bits):
    rows = {e: {"w": torch.tensor(row)} for e, row in zip("abc", ROWS, strict=True)}
    base = {"w": torch.full((10,), 0.1)}
    weights = {"a": 0.2, "b": 1.3, "c": 0.7}
    turned = {e: rows[e] for e in "cab"}
    one, other = (combine("ties", base, x, weights=weights)["w"] for x in (rows, turned))
    assert same_bits(one, other)


@pytest.mark.parametrize("nothing", [{"scale": 0.0}, {"density": 0.0}, {"density": 0.0, "scope": "tensor"}], ids=str)
@pytest.mark.parametrize("merge", ["mean", "sum", "max"])
def test_scale_or_density_zero_is_the_base_to_the_bit(combine, same_bits, nothing, merge):
    base = torch.tensor([-0.0, 0.0, 1e-45, -3.5, 65504.0])
    experts = {"a": {"w": base + 1}, "b": {"w": base - 3}}
    assert same_bits(combine("ties", {"w": base}, experts, merge=merge, **nothing)["w"], base)


# -------------------------------------------------------------------------------- checks 6 and 7


def big_and_small():
    """Two tensors and one expert whose largest changes all lie in the first."""
    names = {"A": [10.0, 9, 8, 7, 6], "B": [1.0, 1.1, 1.2, 1.3, 1.4]}
    return {n: torch.zeros(5) for n in names}, {"x": {n: torch.tensor(row) for n, row in names.items()}}


def test_global_and_per_tensor_trims_differ(combine):
    base, experts = big_and_small()
    whole = combine("ties", base, experts)
    assert whole["A"].tolist() == [10, 9, 0, 0, 0] and not whole["B"].any()
    parts = combine("ties", base, experts, scope="tensor")
    assert parts["A"].tolist() == [10, 0, 0, 0, 0]
    close(parts["B"], [0, 0, 0, 0, 1.4])
    mergekit = combine("ties", base, experts, compat="mergekit")
    assert all(torch.equal(mergekit[n], parts[n]) for n in parts)


def test_the_order_of_the_tensors_changes_nothing(combine):
    base, experts = big_and_small()
    one = combine("ties", base, experts, density=0.7)
    other = combine("ties", dict(reversed(base.items())), experts, density=0.7)
    assert all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_a_density_is_a_count_for_bfloat16_too(combine, density):
    rng = torch.Generator().manual_seed(2)
    size = 20_000
    base = (0.02 * torch.randn(size, generator=rng)).bfloat16()
    expert = (base.float() + 3e-4 * torch.randn(size, generator=rng)).bfloat16()
    changed = int((expert != base).sum())
    assert changed < 0.9 * size  # rounding leaves more than a tenth as it was

    def kept(**chosen):
        got = combine("ties", {"w": base}, {"a": {"w": expert}}, density=density, **chosen)["w"]
        return int((got != base.float()).sum())

    k = round(density * size)
    assert kept() == min(k, changed)
    assert kept(compat="official") > k or k > changed


def test_each_expert_has_its_own_density(merge_rows):
    rows = [ONE_TO_TEN, [0.0] * 9 + [1.0]]
    got = merge_rows("ties", rows, density={"a": 0.1, "b": 0.0})
    assert got.tolist() == [0.0] * 9 + [-10]
    got = merge_rows("ties", rows, density={"a": 0.0, "b": 0.1})
    assert got.tolist() == [0.0] * 9 + [1]


# ------------------------------------------------------------------------------------- mergekit's trim


@pytest.mark.parametrize(
    "size, density, kept", [(100, 0.29, 28), (10, 0.05, 1), (1, 0.5, 1), (10, 0.0, 0), (10, 1.0, 10), (7, 0.999, 6)]
)
def test_mergekit_keeps_one_at_least_and_counts_in_floating_point(merge_rows, size, density, kept):
    rows = [torch.arange(1.0, size + 1)]
    assert int((merge_rows("ties", rows, density=density, compat="mergekit") != 0).sum()) == kept


@pytest.mark.parametrize(
    "weights, want",
    [
        ({"a": 1.0, "b": -1.0}, 3.0),  # w τ = 1, 2: both agree, their weights cancel, the sum stays undivided
        ({"a": 1.0, "b": -0.5}, 4.0),  # 1 + 1 over 0.5
        ({"a": -1.0, "b": -1.0}, -2.0),  # w τ = −1, 2: + wins, and b alone agrees: 2 over −1
    ],
)
def test_weights_of_both_signs_in_mergekit(merge_rows, weights, want):
    """τ = 1 and −2."""
    got = merge_rows("ties", [[1.0], [-2.0]], density=1.0, weights=weights, compat="mergekit").item()
    assert got == pytest.approx(want)


@pytest.mark.parametrize("compat, row, want", [("mergekit", -1.0, 0.6), ("paper", 2.0, 0.0)])
def test_weights_that_cancel_but_for_rounding_divide_nothing(merge_rows, compat, row, want):
    """0.1 + 0.2 − 0.3 is 5.6e-17 in float64. All three agree: their sum stays undivided, or is 0."""
    weights = {"a": 0.1, "b": 0.2, "c": -0.3}
    got = merge_rows("ties", [[1.0], [1.0], [row]], density=1.0, weights=weights, compat=compat).item()
    assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
@pytest.mark.parametrize(
    ("compat", "field", "decided", "other"),
    [
        ("mergekit", "scope", "tensor", "model"),
        ("mergekit", "tie", "positive", "zero"),
        ("official", "tie", "majority", "zero"),
    ],
)
def test_what_the_semantics_decide_is_said_and_nothing_else_is_taken(name, compat, field, decided, other):
    chosen = {"compat": compat, "rescale": "none"} if name == "dare_ties" else {"compat": compat}
    assert getattr(make_method(name, ("a",), chosen), field) == decided
    assert make_method(name, ("a",), {**chosen, field: decided}) == make_method(name, ("a",), chosen)
    with pytest.raises(TwinmergeError, match=f"compat={compat} goes with {field}={decided}, got {field}='{other}'"):
        make_method(name, ("a",), {**chosen, field: other})


# ------------------------------------------------------------------------------------------- rescale


def test_the_l1_norm_of_each_tensor_and_expert_is_restored_before_the_election(merge_rows):
    """(0, 0, -4, 5) of norm 12 becomes (0, 0, -16/3, 20/3), against (0, 5, 5, 0) of norm 10."""
    rows = [[1.0, 2, -4, 5], [0.0, 5, 5, 0]]
    for compat in ("paper", "mergekit"):
        chosen = {"density": 0.5, "scope": "tensor", "merge": "sum", "compat": compat}
        close(merge_rows("ties", rows, **chosen), [0, 5, 5, 5])
        close(merge_rows("ties", rows, rescale="l1", **chosen), [0, 5, -16 / 3, 20 / 3])
