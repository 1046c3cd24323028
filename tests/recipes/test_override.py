"""What options say beside a recipe is read as in its file. The oracle is the file with the option's words in it."""

from __future__ import annotations

from typing import Any

import pytest

from twinmerge.errors import RecipeError
from twinmerge.recipes.override import overridden, seeded, with_beside
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.setting import Setting

MODELS = {
    "slerp": [{"model": "x/base"}, {"model": "x/x_m"}],
    "dare_ties": [{"model": f"x/{n}_m", "parameters": {"weight": 0.5}} for n in "xy"],
}


def in_file(method: str, slices: bool = False, **shared: Any) -> Recipe:
    raw: dict[str, Any] = {"merge_method": method, "base_model": "x/base", "parameters": shared}
    models = MODELS[method]
    if not slices:
        return recipe_from(raw | {"models": models})
    parts = [[{"model": "x/base"}, *[m for m in models if m["model"] != "x/base"]]] * 2
    ranges = ([0, 4], [4, 8])
    return recipe_from(
        raw | {"slices": [{"sources": [m | {"layer_range": r} for m in p]} for p, r in zip(parts, ranges, strict=True)]}
    )


def said_in(recipe: Recipe, field: str) -> list[dict[str, Any]]:
    """All that is said of a parameter, in each place."""
    places = [s.parameters for s in recipe.slices] or [recipe.parameters]
    return [
        {
            e: next((p[k] for k in (f"{e}.{field}", field) if k in p), None)
            for e in recipe.experts
            if not recipe.slices or e in recipe.merged_in(recipe.slices[0])
        }
        for p in places
    ]


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize(
    ("method", "key", "value", "field"),
    [
        ("slerp", "t", [0, 1], "t"),
        ("slerp", "t", [{"value": [0, 1]}], "t"),
        ("slerp", "t", [{"filter": "tn.q", "value": [0, "1"]}, {"filter": "*", "value": 0.5}], "t"),
        ("slerp", "t", "3e-1", "t"),
        ("dare_ties", "density", [0.2, 0.8], "density"),
        ("dare_ties", "density", {"filter": "mlp", "value": 0.5}, "density"),
        ("dare_ties", "normalize", True, "merge"),
        ("dare_ties", "rescale", False, "rescale"),
        ("dare_ties", "rescale", [{"filter": "mlp", "value": "off"}, {"value": 1}], "rescale"),
        ("dare_ties", "lambda", [{"filter": "ml", "value": 2}], "scale"),
    ],
)
def test_an_option_means_what_it_means_in_a_file_of_mergekit(
    method: str, key: str, value: Any, field: str, slices: bool
) -> None:
    plain = {"t": 0.25} if method == "slerp" else {"density": 0.9}
    changed, said = overridden(in_file(method, slices, **plain), {key: value})
    assert said_in(changed, field) == said_in(in_file(method, slices, **plain | {key: value}), field)
    assert all(isinstance(v, (Setting, float, str)) for place in said_in(changed, field) for v in place.values())
    assert len(said) == 1 and said[0].startswith(f"{field} = ")


def test_an_option_beside_a_recipe_of_ours_is_read_as_ours() -> None:
    raw = {"twinmerge": 1, "merge_method": "ties", "base_model": "b", "models": [{"model": "x"}, {"model": "y"}]}
    ours = recipe_from(raw)
    assert overridden(ours, {"density": [0.2, 0.8]})[0].parameters["density"] == [0.2, 0.8]  # one for each expert
    changed, _ = overridden(ours, {"scale": [{"filter": "mlp", "value": [0, 1]}], "normalize": True})
    assert not changed.parameters["scale"].choices[0].substring and changed.parameters["merge"] == "mean"
    for key in ("scale", "x.density"):
        with pytest.raises(RecipeError, match=rf"-p {key} is a list.*Write -p '{key}=\[\{{value: \[0, 1\]\}}\]'"):
            overridden(ours, {key: [0, 1]})


def test_what_was_said_otherwise_is_told_in_full() -> None:
    recipe = in_file("slerp", True, t=0.25)
    first, second = recipe.slices
    second = type(second)(second.sources, second.base, {**second.parameters, "t": 0.1})
    recipe = Recipe("slerp", recipe.base, recipe.experts, recipe.parameters, slices=(first, second))
    assert overridden(recipe, {"t": 0.5})[1] == ["t = 0.5 in the place of t = 0.25, 0.1"]
    recipe = recipe_from(
        {
            "merge_method": "linear",
            "models": [{"model": n, "parameters": {"weight": 1}} for n in "xy"],
            "tokenizer": {"source": "y", "pad_to_multiple_of": 8},
            "chat_template": "chatml",
            "compat": "mergekit",
            "side_files_from": "x",
            "heads": ["lm_head"],
        }
    )
    changed, said = with_beside(recipe, "union", "llama3", "y", ("score", "cls"))
    assert (changed.chat_template, changed.side_files_from, changed.heads) == ("llama3", "y", ("score", "cls"))
    assert said == [
        "tokenizer = union in the place of {'source': 'y', 'pad_to_multiple_of': 8}",
        "chat_template = llama3 in the place of chatml",
        "side_files_from = y in the place of x",
        "heads = score, cls in the place of lm_head",
    ]
    assert with_beside(changed, "union", "llama3") == (changed, [])


def test_what_changes_nothing_is_told() -> None:
    recipe = in_file("dare_ties")
    assert overridden(recipe, {"int8_mask": True}) == (recipe, ["int8_mask changes nothing here, and is ignored"])
    assert seeded(recipe, 3)[0].parameters["seed"] == 3
    assert seeded(in_file("slerp", t=1), 3)[1] == ["--random-seed changes nothing, since slerp draws nothing at random"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("m.weight", 0.3, "m.weight names no expert of the recipe. It has: x_m, y_m."),
        ("y.weight", 0.3, "It has: y_m, x_m."),
        ("densty", 0.3, "no parameter 'densty'. Did you mean 'density'?"),
        ("normalise", True, "no parameter 'normalise'. Did you mean 'normalize'? It has: weight, density, normalize,"),
        ("x_m.normalize", True, "normalize is one value for all experts. Write normalize=True."),
        ("density", "x", "-p density, density: density is 'x', which is no number"),
        ("density", [{"fliter": "mlp", "value": 1}], "unknown key 'fliter' of a choice. Did you mean 'filter'?"),
        ("normalize", 3, "normalize is 3, which is neither true nor false"),
    ],
)
def test_what_cannot_be_read_is_refused(key: str, value: Any, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(in_file("dare_ties"), {key: value})
    assert says in str(caught.value)


def test_filters_of_an_option_look_at_each_models_own_names() -> None:
    choice = [{"filter": "layers.3.", "value": 0.5}, {"value": 1}]
    changed, _ = overridden(in_file("dare_ties"), {"weight": choice})
    assert {"x_m.weights", "y_m.weights"} <= changed.parameters.keys() and "weights" not in changed.parameters
