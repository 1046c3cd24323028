"""The parameters that a recipe's merge uses, with their defaults: by slice, by expert and by filter where they differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import is_per_expert, method_class
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.setting import VALUE, Setting, plain_value
from twinmerge.recipes.slices import within


def parameters_used(recipe: Recipe) -> dict[str, Any]:
    """What every parameter of the method is in this merge.

    One value that holds everywhere stands as it is, or as a tuple in the order in which the recipe names the experts.
    What differs between tensors is the list of its choices (filters and gradients), as recipes of ours have it. What
    experts have such lists of, and what the models of a slice have values of, is a mapping by their names; what
    differs between slices is one by "slice 1", "slice 2–4". Slices whose layers are the base's are left out.

    Args:
        recipe: that is merged.

    Raises:
        TwinmergeError: a value that the method does not take.

    Example:
        >>> found = parameters_used(Recipe("ties", "base", {"a": "x", "b": "y"}, {"a.density": {"value": [0.1, 0.2]}}))
        >>> found["density"], found["scale"]
        ({'a': [{'value': [0.1, 0.2]}], 'b': 0.2}, 1.0)
    """
    if not recipe.slices:
        return _used(recipe, recipe.by_expert(recipe.parameters), tuple(recipe.experts))
    each = {
        number: _used(
            replace(recipe, slices=(slice_,)), recipe.by_expert(within(slice_.parameters, recipe.parameters)), names
        )
        for number, slice_ in enumerate(recipe.slices, 1)
        if (names := recipe.merged_in(slice_))
    }
    fields = next(iter(each.values()), {})
    return {name: _by_slice({number: found[name] for number, found in each.items()}) for name in fields}


def _used(recipe: Recipe, given: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Of whole models, or of the one slice that the recipe has."""
    method, cls = recipe.typical_method(), method_class(recipe.method)
    seen = names if recipe.slices else recipe.order  # in which the method has its values
    found = method.model_dump()
    for name, value in found.items():
        # in mergekit's recipes every tensor must have a choice that fits
        default = None if recipe.semantics == "mergekit" else cls.model_fields[name].get_default()
        shared = given.get(name)
        own = {expert: given[f"{expert}.{name}"] for expert in names if f"{expert}.{name}" in given}
        if not any(isinstance(said, Setting) for said in (shared, *own.values())):
            if isinstance(value, tuple) and is_per_expert(cls, name):
                values = dict(zip(seen, value, strict=True))
                found[name] = values if recipe.slices else tuple(values[expert] for expert in names)
        elif not own:
            found[name] = _said(shared, default)
        else:
            general = cls.model_fields[name].get_default() if shared is None else shared
            found[name] = {expert: _of_expert(own.get(expert), general, default) for expert in names}
    return found


def _of_expert(own: Any, general: Any, default: Any) -> Any:
    """What one expert has: its own value, and that of all where it has none or none of its choices fits."""
    if own is None or not isinstance(own, Setting):
        return _said(general if own is None else own, default)
    if isinstance(general, Setting):
        return _said(own.then(general), default)
    return _said(own, None if default is None else general)


def _said(value: Any, default: Any) -> Any:
    """A value; choices with the default where none of them fits."""
    if not isinstance(value, Setting):
        return plain_value(value)
    found = value.describe()
    if default is not None and all(choice.filter is not None for choice in value.choices):
        found.append({VALUE: plain_value(default)})
    return found


def _by_slice(each: Mapping[int, Any]) -> Any:
    """One value where all slices have the same, else a mapping by their numbers."""
    runs: list[tuple[int, int, Any]] = []
    for number, value in each.items():
        if runs and runs[-1][2] == value and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number, value)
        else:
            runs.append((number, number, value))
    if all(value == runs[0][2] for _, _, value in runs):
        return runs[0][2]
    return {f"slice {first}{f'–{last}' if last > first else ''}": value for first, last, value in runs}


def of_rules(recipe: Recipe, rules: Iterable[Method]) -> dict[str, Any]:
    """The parameters of the rules of an edited plan: "by tensor" where they differ.

    Args:
        recipe: whose plan it is.
        rules: its methods, each once.

    Example:
        >>> recipe = Recipe("ties", "base", {"b": "x", "a": "y"})
        >>> rules = [recipe.varied({"scale": scale, "b.density": 0.9}).make_method() for scale in (1.0, 2.0)]
        >>> found = of_rules(recipe, rules)
        >>> found["scale"], found["density"]
        ('by tensor', (0.9, 0.2))
    """
    cls = method_class(recipe.method)
    first, *others = (rule.model_dump() for rule in rules)
    for name, value in first.items():
        if not all(other[name] == value for other in others):
            first[name] = "by tensor"
        elif isinstance(value, tuple) and is_per_expert(cls, name) and len(value) == len(recipe.experts):
            values = dict(zip(recipe.order, value, strict=True))
            first[name] = tuple(values[expert] for expert in recipe.experts)
    return first
