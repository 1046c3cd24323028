"""The recipe of an output, beside its weights: as it was typed, and as it was resolved, which merges again to the same
bytes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twinmerge.engine.beside import RESOLVED, TYPED, TYPED_JSON
from twinmerge.engine.models import Models
from twinmerge.engine.nested import Computed
from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import method_class
from twinmerge.models.opened import OpenedModel
from twinmerge.recipes.documents import typed_recipe
from twinmerge.recipes.lines import Lines
from twinmerge.recipes.plain_data import to_yaml
from twinmerge.recipes.recipe import Recipe, is_reference, reference


def recipe_files(
    recipe: Recipe, models: Models | None = None, lines: Lines | None = None, edited: bool = False
) -> dict[str, bytes]:
    """The files that say what was merged.

    Args:
        recipe: of the merge.
        models: its opened models, whose hub commits are named.
        lines: of LiNeS as they were found.
        edited: the rules of an edited plan took the place of the recipe's.

    Returns:
        Name -> content. What a file said is there byte for byte; what a command or a call said is there as a recipe.
    """
    typed = recipe.typed
    name = TYPED_JSON if typed is not None and typed.json else TYPED
    own = typed.content if typed is not None else to_yaml(_brief(recipe.describe())).encode()
    described = resolved(recipe, models, lines).describe()
    notes = _notes(recipe, name, edited)
    return {name: own, RESOLVED: ("".join(f"# {note}\n" for note in notes) + to_yaml(_brief(described))).encode()}


def resolved(
    recipe: Recipe,
    models: Models | None = None,
    lines: Lines | None = None,
    known: dict[int, Recipe] | None = None,
) -> Recipe:
    """The recipe with every default written out, and hub ids with the commits that were read.

    Args:
        recipe: of the merge.
        models: its opened models.
        lines: of LiNeS as they were found.
        known: recipes inside that are resolved already, by their ids; each is once.

    Example:
        >>> resolved(Recipe("task_arithmetic", "base", {"x": "model"}, {"scale": 0.5})).parameters
        {'scale': 0.5, 'weights': 1.0, 'normalize': False, 'compat': 'paper'}
    """
    known = {} if known is None else known
    opened = {} if models is None else models.experts
    base = models.base if models is not None and models.has_base else None
    slices = tuple(
        replace(
            each, parameters=_filled(replace(recipe, slices=(each,)), each.parameters, [s.model for s in each.sources])
        )
        if recipe.merged_in(each)  # else its layers are the base's
        else each
        for each in recipe.slices
    )
    parameters = recipe.parameters if slices else _filled(recipe, recipe.parameters, list(recipe.experts))
    return replace(
        recipe,
        base=None if recipe.base is None else _pinned(recipe.base, base, known),
        experts={name: _pinned(model, opened.get(name), known) for name, model in recipe.experts.items()},
        parameters=parameters,
        slices=slices,
        lines=lines or recipe.lines,
    )


def _filled(recipe: Recipe, given: Mapping[str, Any], experts: list[str]) -> dict[str, Any]:
    """Parameters with those that were left to their defaults."""
    method: Method = recipe.typical_method()
    fields, values, found = method_class(recipe.method).model_fields, method.model_dump(), dict(given)
    for name, field in fields.items():
        of = {key.rpartition(".")[0] for key in given if key.rpartition(".")[2] == name}
        value = values[name] if not of else field.default
        if "" in of or set(experts) <= of or field.is_required() or value is None:
            continue
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def _pinned(model: Any, opened: OpenedModel | None, known: dict[int, Recipe] | None = None) -> Any:
    """A hub id with its commit, a recipe resolved as well, anything else as it is."""
    inner = getattr(model, "recipe", model)
    if isinstance(inner, Recipe):
        known = {} if known is None else known
        if id(inner) not in known:
            source = opened.source if opened is not None else None
            models = source.models if isinstance(source, Computed) else None
            known[id(inner)] = resolved(inner, models, known=known)
        return known[id(inner)]
    if opened is None or opened.commit is None or not isinstance(model, (str, os.PathLike)):
        return model
    parts, commits = os.fspath(model).rsplit("+", 1), opened.commit.split("+")
    ids = [part for part in parts if not os.path.isdir(os.path.expanduser(part))]
    if len(ids) != len(commits):
        return model
    pins = dict(zip(ids, commits, strict=True))
    return "+".join(f"{part.partition('@')[0]}@{pins[part]}" if part in pins else part for part in parts)


def _brief(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description without what it leaves open."""
    return {key: value for key, value in described.items() if value not in (None, [], {})}


def _notes(recipe: Recipe, typed: str, edited: bool) -> list[str]:
    """What is said above the resolved recipe."""
    lost = _not_here(recipe)
    if edited:
        first = "The recipe whose plan was edited. The plan's rules were merged in its place: twinmerge.json has them."
    elif lost:
        first = f"What was merged. It cannot be merged from this file, since {lost}."
    else:
        more = " --allow-pickle" if recipe.allow_pickle else ""
        first = f"What was merged, with every default: `twinmerge merge {RESOLVED} OUT{more}` gives the same weights."
    notes = [first, "Paths are those that were typed, as seen from where the merge was run."]
    if recipe.typed is not None and not edited and not _says(recipe):
        notes.append(f"{typed} is what was typed; options, or the call, changed it before it was merged.")
    return notes


def _not_here(recipe: Recipe) -> str | None:
    """Why a recipe alone is not enough to merge again."""
    if recipe.method_name.startswith("<"):
        return f"the method {recipe.method_name} is a class without a name"
    models = {"base": recipe.base, **recipe.experts}
    for label, model in models.items():
        inner = getattr(model, "recipe", model)
        if isinstance(inner, Recipe):
            if (lost := _not_here(inner)) is not None:
                return lost
        elif model is not None and not is_reference(reference(model)):
            return f"{label} was in memory"
    return None


def _says(recipe: Recipe) -> bool:
    """Whether what was typed is what is merged."""
    assert recipe.typed is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were told of when it was read
        try:
            return typed_recipe(recipe.typed).describe() == recipe.describe()
        except TwinmergeError:  # the recipes of a file that has no last one
            return False
