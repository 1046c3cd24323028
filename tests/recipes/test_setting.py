"""Parameters by filters and gradients, against the definition written out."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinmerge.errors import RecipeError, TwinmergeError
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.setting import Choice, Setting, is_setting


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(0, 1))
def test_a_gradient_is_linear_between_its_values(values: list[float], depth: float) -> None:
    last = len(values) - 1
    i = min(int(depth * last), last - 1)
    want = values[i] + (depth * last - i) * (values[i + 1] - values[i])
    assert Choice(tuple(values)).at(depth) == pytest.approx(want, abs=1e-12)
    assert Choice(tuple(values)).at(0.0) == values[0] and Choice(tuple(values)).at(1.0) == values[-1]


@pytest.mark.parametrize(("depth", "want"), [(0.0, True), (0.5, True), (0.99, True), (1.0, False)])
def test_of_what_is_no_number_the_value_before_holds(depth: float, want: bool) -> None:
    assert Choice((True, False)).at(depth) is want


NAMES = {
    "mlp": ["model.layers.1.mlp.up_proj.weight"],
    "layers.1": ["model.layers.1.mlp.up_proj.weight", "model.layers.12.mlp.up_proj.weight"],
    "*": ["model.norm.weight"],
    "self_attn": [],
}


@pytest.mark.parametrize("text", NAMES)
def test_mergekits_filters_are_texts_anywhere_in_a_name(text: str) -> None:
    setting = Setting.of([{"filter": text, "value": 1.0}, {"value": 2.0}], "here", mergekit=True)
    for name in NAMES[text]:
        assert setting.at(name, 0.0) == 1.0
    assert setting.at("lm_head.weight", 0.0) == (1.0 if text == "*" else 2.0)


def test_ours_are_components_or_globs_and_contains_is_mergekits() -> None:
    setting = Setting.of(
        [{"filter": "layers.1", "value": 1}, {"filter": "*.bias", "value": 2}, {"contains": "yers.3", "value": 3}],
        "here",
    )
    found = [setting.at(f"layers.{n}", 0.0) for n in ("1.weight", "12.weight", "12.bias", "33.weight")]
    assert found == [1, None, 2, 3]


def test_the_first_choice_that_fits_counts_and_the_next_scope_is_asked() -> None:
    inner = Setting.of([{"filter": "a", "value": 1}, {"filter": "ab", "value": 2}], "here", True)
    both = inner.then(Setting.of([0.0, 1.0], "there", True))
    assert (both.at("ab", 0.5), both.at("b", 0.5)) == (1, 0.5)
    assert Setting.of([], "here", True).then(Setting.of(3, "there")).plain == 3


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ([{"filter": "a"}], "is no choice"),
        ([{"filter": "a", "value": 1, "valu": 2}], "unknown key 'valu'"),
        ([{"filter": 3, "value": 1}], "is no text"),
        ([{"value": [1, [2]]}], "holds more than values"),
        ([1, {"value": 2}], "is no choice"),
        ([{"filter": "a", "contains": "b", "value": 1}], "has filter and contains"),
    ],
)
def test_what_is_no_setting_is_refused(raw: Any, says: str) -> None:
    assert is_setting(raw)
    with pytest.raises(RecipeError, match=says):
        Setting.of(raw, "here")


def test_a_recipe_with_choices_is_written_down_and_read_again() -> None:
    choices = [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]
    recipe = Recipe(
        "ties", "b", {"x": "x", "y": "y"}, {"density": choices, "x.weights": [{"contains": "q", "value": 2.0}]}
    )
    assert recipe.varies and recipe_from(recipe.describe()) == recipe
    assert recipe.describe()["parameters"]["density"] == choices
    with pytest.raises(RecipeError, match="density differs between tensors"):
        recipe.make_method()


def test_settings_out_of_range_are_refused_by_name() -> None:
    from twinmerge.recipes.rules import Rules

    recipe = Recipe("ties", "b", {"x": "x"}, {"density": [{"value": [0.5, 1.5]}]})
    rules = Rules(recipe)
    assert rules.of("w", ["x"], {"x": "w"}, 0.25).density == 0.75
    with pytest.raises(RecipeError, match="density=1.5 is out of range"):
        rules.of("w", ["x"], {"x": "w"}, 1.0)


def test_a_choice_without_values_is_refused():
    with pytest.raises(TwinmergeError, match="has an empty list of values"):
        Setting.of([{"filter": "mlp", "value": []}, {"value": 1}], "here", True)
