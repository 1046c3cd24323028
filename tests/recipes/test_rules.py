"""Which value a tensor has: worked out by hand. A filter that is for no tensor is told of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.rules import Rules
from twinmerge.recipes.schema import recipe_from

NAMES = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
SLICES = [
    {"sources": [{"model": "base", "layer_range": [i, i + 1]}, {"model": "a", "layer_range": [i, i + 1]}]}
    for i in (0, 1)
]


def ours(slices: Any = None, **parameters: Any) -> Recipe:
    raw = {"twinmerge": 1, "merge_method": "ties", "base_model": "x/base", "parameters": parameters}
    models = [{"name": name, "model": f"x/{name}"} for name in ("b", "a")]
    return recipe_from(raw | {"models": models} | ({} if slices is None else {"slices": slices}))


def told(recipe: Recipe) -> list[str]:
    """The warnings after all tensors were asked for, layer i of which is in slice i."""
    rules = Rules(recipe)
    for i, name in enumerate(NAMES):
        inner = recipe.slices[min(i, len(recipe.slices) - 1)].parameters if recipe.slices else None
        experts = recipe.merged_in(recipe.slices[0]) if recipe.slices else tuple(recipe.experts)
        rules.of(name, experts, dict.fromkeys(experts, name), 0.0, inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rules.warn_of_unfit(1)
    return [str(each.message) for each in caught]


def choices(*filters: str, key: str = "filter") -> list[dict[str, Any]]:
    return [*({key: text, "value": 0.5} for text in filters), {"value": 0.25}]


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"scale": choices("self_atn")}, "'self_atn' (of scale; did you mean 'self_attn'?)"),
        ({"scale": choices("_proj")}, "'_proj' (of scale; write contains: _proj for a part of a component)"),
        ({"scale": choices("q_prj", key="contains")}, "'q_prj' (of scale; did you mean 'q_proj'?)"),
        ({"a.density": choices("mlp", "xyz")}, "'xyz' (of density of a)"),
        ({"a.density": choices("xyz"), "b.density": choices("xyz")}, "'xyz' (of density)"),
        ({"scale": choices("xyz"), "density": choices("zyx")}, "'xyz' (of scale); 'zyx' (of density). Correct them"),
    ],
)
def test_filters_that_fit_no_tensor_are_told_of_in_one_warning(parameters: dict[str, Any], says: str) -> None:
    (warning,) = told(ours(**parameters))
    assert says in warning and "no merged tensor" in warning


@pytest.mark.parametrize(
    "recipe",
    [
        ours(scale=0.5),
        ours(scale=choices("mlp", "self_attn", "layers.1")),
        ours(scale=choices("up_pro", key="contains")),
        ours(scale=choices("model", "mlp")),  # the first takes all, and the second is still for something
        ours([each | {"parameters": {"scale": choices("self_attn")}} for each in SLICES]),  # fits in one of two
    ],
)
def test_filters_that_fit_are_not(recipe: Recipe) -> None:
    assert told(recipe) == []


def test_mergekits_names_are_those_of_its_files() -> None:
    models = [{"model": f"x/{n}", "parameters": {"weight": 1}} for n in "ab"]
    raw = {"merge_method": "ties", "base_model": "x", "models": models, "parameters": {"lambda": choices("mpl")}}
    (warning,) = told(recipe_from(raw))
    assert "'mpl' (of lambda" in warning


def test_a_slice_has_the_recipes_parameters_where_it_says_nothing() -> None:
    slices = [SLICES[0], SLICES[1] | {"parameters": {"density": 0.75}}]
    recipe = ours(slices, scale=0.125, **{"a.density": 0.5})
    found = [Rules(recipe).of(NAMES[i], ("a",), {"a": NAMES[i]}, 0.0, recipe.slices[i].parameters) for i in (0, 1)]
    assert [(m.scale, m.density) for m in found] == [(0.125, (0.5,)), (0.125, 0.75)]  # type: ignore[attr-defined]
    assert recipe.typical_method().scale == 0.125  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_list_is_in_the_order_of_the_recipe_beside_what_differs_between_tensors(order: tuple[str, ...]) -> None:
    recipe = ours(density=[0.25, 0.75], scale=choices("mlp"))  # of b and a
    method: Any = Rules(recipe).of(NAMES[0], order, dict.fromkeys(order, NAMES[0]), 0.0)
    assert method.density == tuple({"b": 0.25, "a": 0.75}[name] for name in order)
