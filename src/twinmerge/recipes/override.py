"""A recipe with some of its parameters said anew, as a command's options do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.dialect import SPELLINGS, Number
from twinmerge.methods.kit.registry import is_per_expert, method_class, short_name
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.recipe import Recipe


def overridden(recipe: Recipe, parameters: Mapping[str, Any], dtype: str | None = None) -> tuple[Recipe, list[str]]:
    """A recipe with other parameters, and what is said of each that it had otherwise.

    A parameter takes the place of what the recipe says of it anywhere: for single experts, by filters, in slices.
    `expert.name` takes that of one expert alone.

    Args:
        recipe: as it was read.
        parameters: name or expert.name -> value; mergekit's names are taken too.
        dtype: of the output, None for the recipe's.

    Raises:
        RecipeError: a parameter or an expert that the method or the recipe does not have.

    Example:
        >>> recipe = Recipe("ties", "b", {"x": "x", "y": "y"}, {"x.density": 0.2, "scale": 2.0})
        >>> changed, said = overridden(recipe, {"density": 0.5})
        >>> changed.parameters, said
        ({'scale': 2.0, 'density': 0.5}, ['density = 0.5 in the place of x.density = 0.2'])
    """
    cls = method_class(recipe.method)
    said: list[str] = []
    own, slices = dict(recipe.parameters), list(recipe.slices)
    for key, value in parameters.items():
        expert, dot, field = key.rpartition(".")
        spelled = cls.spellings.get(field, SPELLINGS.get(field))
        if field not in cls.model_fields and isinstance(spelled, Number):
            field = spelled.field
        if field not in cls.model_fields:
            known = list(cls.model_fields)
            raise RecipeError(
                f"{short_name(recipe.method)} has no parameter {field!r}.{nearest(field, known)} It has: "
                f"{', '.join(known)}."
            )
        if expert and expert not in recipe.experts:
            raise RecipeError(f"{key} names no expert of the recipe.{nearest(expert, recipe.experts)}")
        if expert and not is_per_expert(cls, field):
            raise RecipeError(f"{field} is one value for all experts. Write {field}={value}.")
        name = f"{expert}{dot}{field}"
        before: dict[str, Any] = {}
        for of in (own, *(dict(s.parameters) for s in slices)):
            before |= {k: v for k, v in of.items() if _is(k, name)}
        own = {k: v for k, v in own.items() if not _is(k, name)} | {name: value}
        slices = [
            replace(s, parameters={k: v for k, v in s.parameters.items() if not _is(k, name)} | _here(s, name, value))
            for s in slices
        ]
        was = ", ".join(f"{k} = {_shown(v)}" for k, v in before.items())
        said.append(f"{name} = {value}" + (f" in the place of {was}" if was else ""))
    if dtype is not None and dtype != recipe.dtype:
        said.append(f"dtype = {dtype} in the place of {recipe.dtype or 'that of the models'}")
    changed = replace(recipe, parameters=own, slices=tuple(slices), dtype=dtype or recipe.dtype)
    return changed, said


def _is(key: str, name: str) -> bool:
    """Whether a key says the parameter, for all experts or for the one that is named."""
    return key == name or ("." not in name and key.rpartition(".")[2] == name)


def _here(slice_: Any, name: str, value: Any) -> dict[str, Any]:
    """The parameter in a slice, where the expert that it names is a source."""
    expert = name.rpartition(".")[0]
    return {name: value} if not expert or expert in [span.model for span in slice_.sources] else {}


def _shown(value: Any) -> str:
    text = str(value.describe() if hasattr(value, "describe") else value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def throughout(recipe: Recipe, by_names: bool, allow_pickle: bool) -> Recipe:
    """A recipe, and the recipes that are its models, with how all models are opened.

    Args:
        recipe: as it was read.
        by_names: no class is asked, also where a recipe does not say so.
        allow_pickle: old checkpoints are read.

    Example:
        >>> inner = Recipe("average", None, {"x": "one", "y": "two"})
        >>> throughout(Recipe("average", None, {"a": inner}), True, False).experts["a"].by_names
        True
    """

    def of(model: ModelLike) -> ModelLike:
        return throughout(model, by_names, allow_pickle) if isinstance(model, Recipe) else model

    return replace(
        recipe,
        base=None if recipe.base is None else of(recipe.base),
        experts={name: of(model) for name, model in recipe.experts.items()},
        by_names=by_names or recipe.by_names,
        allow_pickle=allow_pickle,
    )
