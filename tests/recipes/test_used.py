"""What is said of a merge's parameters is what every tensor is merged by."""

from __future__ import annotations

from dataclasses import replace

import pytest

from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.rules import Rules
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.setting import Setting
from twinmerge.recipes.used import of_rules, parameters_used

TOP = {"merge_method": "della_linear", "base_model": "x/base", "parameters": {"lambda": 1.0, "normalize": 1.0}}
T = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
SAID_T = [
    {"contains": "self_attn", "value": [0.0, 0.5, 1.0]},
    {"contains": "mlp", "value": [1.0, 0.0]},
    {"value": 0.5},
]


def _source(model, layers=None, **parameters):
    return {"model": model, **({"layer_range": layers} if layers else {}), "parameters": parameters}


def _weights(own):
    return {"density": 0.5, "epsilon": 0.4, "weight": own}


def test_gradients_of_experts_are_said_in_both_forms():
    weights = {"a": [0.9, 0.2, 0.8], "b": [0.1, 0.9, 0.3]}
    listed = [_source(f"x/{name}", None, **_weights(own)) for name, own in weights.items()]
    sliced = [{**each, "layer_range": [0, 8]} for each in listed]
    found = parameters_used(recipe_from({**TOP, "models": listed}))
    slices = [{"sources": [*sliced, _source("x/base", [0, 8])]}]
    in_slices = parameters_used(recipe_from({**TOP, "slices": slices}))
    said = {name: [{"value": own}] for name, own in weights.items()}
    assert found["weights"] == in_slices["weights"] == said
    assert found["density"] == (0.5, 0.5) and in_slices["density"] == {"a": 0.5, "b": 0.5}
    assert found["epsilon"] == (0.4, 0.4) and in_slices["epsilon"] == {"a": 0.4, "b": 0.4}
    same = [name for name in found if name not in ("density", "epsilon")]
    assert {name: found[name] for name in same} == {name: in_slices[name] for name in same}


def test_choices_are_said_in_both_forms():
    top = {"merge_method": "slerp", "base_model": "x/a", "parameters": {"t": T}}
    whole = recipe_from({**top, "models": [{"model": "x/a"}, {"model": "x/b"}]})
    sources = [{"model": f"x/{name}", "layer_range": [0, 8]} for name in "ab"]
    sliced = recipe_from({**top, "slices": [{"sources": sources}]})
    assert parameters_used(whole) == parameters_used(sliced) == {"t": SAID_T, "compat": "mergekit"}


def test_slices_are_told_apart():
    """As public recipes have it: other models, and other numbers of them, in every slice."""
    two = [_source("x/a", [0, 1], weight=1.0), _source("x/b", [0, 1], weight=0)]
    alone = [{"model": "x/a", "layer_range": [1, 3]}]
    raw = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "slices": [{"sources": each} for each in (two, alone, alone, [{"model": "x/c", "layer_range": [0, 2]}], two)],
    }
    said = parameters_used(recipe_from(raw))
    assert said["weights"] == {
        "slice 1": {"a": 1.0, "b": 0.0},
        "slice 2–3": {"a": 1.0},
        "slice 4": {"c": 1.0},
        "slice 5": {"a": 1.0, "b": 0.0},
    }
    assert said["normalize"] is True


@pytest.mark.parametrize("name", ["layers.3.mlp.weight", "layers.0.attn.weight", "norm.weight"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    "given",
    [
        {"density": [{"filter": "*mlp*", "value": [0.1, 0.9]}]},  # and the default elsewhere
        {"a.density": {"filter": "*mlp*", "value": 0.9}, "density": {"value": [0.3, 0.6]}},
        {"a.density": {"filter": "*mlp*", "value": 0.9}, "density": [0.7, 0.4]},
        {"a.density": {"filter": "*mlp*", "value": 0.9}, "b.density": 0.6},
        {"a.density": 0.9, "density": [{"filter": "*attn*", "value": 0.5}]},
        {"a.density": 0.9, "density": 0.3},
    ],
)
def test_what_is_said_is_what_rules_have(given, name, depth):
    recipe = Recipe("ties", "base", {"b": "x", "a": "y"}, given)
    method = Rules(recipe).of(name, recipe.order, {"a": name, "b": name}, depth)
    used = method.density if isinstance(method.density, tuple) else (method.density,) * 2
    said = parameters_used(recipe)["density"]
    if isinstance(said, tuple):
        said = dict(zip(recipe.experts, said, strict=True))
    each = said if isinstance(said, dict) else dict.fromkeys("ab", said)
    read = {e: Setting.of(v, "here").at(name, depth) if isinstance(v, list) else v for e, v in each.items()}
    assert read == dict(zip(recipe.order, used, strict=True))


def test_rules_of_an_edited_plan_hide_the_recipes_choices():
    recipe = Recipe("ties", "base", {"b": "x", "a": "y"}, {"density": {"value": [0.1, 0.9]}})
    rule = replace(recipe, parameters={"a.density": 0.3, "b.density": 0.6}).make_method()
    assert of_rules(recipe, [rule])["density"] == (0.6, 0.3)
