"""A recipe with some of what it says said anew, as a command's options do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.dialect import SPELLINGS, Dialect, Number, Switch
from twinmerge.methods.kit.registry import is_per_expert, method_class, short_name
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.mergekit_parameters import WORDS, one_parameter
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.setting import Setting, is_setting
from twinmerge.recipes.slices import Slice
from twinmerge.recipes.spelling import IDLE, parameters_of
from twinmerge.recipes.tokenizer import TokenizerChoice


def overridden(recipe: Recipe, parameters: Mapping[str, Any], dtype: str | None = None) -> tuple[Recipe, list[str]]:
    """A recipe with other parameters, and what is said of each that it had otherwise.

    A parameter takes the place of what the recipe says of it anywhere: for single experts, by filters, in slices.
    `expert.name` takes that of one expert alone. Values are read as in the recipe's file: in one of mergekit's a list
    is a gradient, and a filter fits anywhere in a name.

    Args:
        recipe: as it was read.
        parameters: name or expert.name -> value; mergekit's names are taken too.
        dtype: of the output, None for the recipe's.

    Raises:
        RecipeError: a parameter or an expert that the method or the recipe does not have, a value of another kind.

    Example:
        >>> recipe = Recipe("ties", "b", {"x": "x", "y": "y"}, {"x.density": 0.2, "scale": 2.0})
        >>> changed, said = overridden(recipe, {"density": 0.5})
        >>> changed.parameters, said
        ({'scale': 2.0, 'density': 0.5}, ['density = 0.5 in the place of x.density = 0.2'])
    """
    said: list[str] = []
    own, slices = dict(recipe.parameters), list(recipe.slices)
    for key, value in parameters.items():
        expert, dot, field = key.rpartition(".")
        if expert and expert not in recipe.experts:
            raise RecipeError(
                f"{key} names no expert of the recipe.{nearest(expert, recipe.experts)} It has: "
                f"{', '.join(_by_likeness(expert, recipe.experts))}."
            )
        read = _read(recipe, key, field, value)
        if not read:
            said.append(f"{key} changes nothing here, and is ignored")
        for ours, new in read.items():
            if expert and not is_per_expert(method_class(recipe.method), ours):
                raise RecipeError(f"{field} is one value for all experts. Write {field}={value}.")
            name = f"{expert}{dot}{ours}"
            before = _values(name, [own, *(s.parameters for s in slices)])
            own = _put(own, name, new, _apart(recipe, ours, new, recipe.experts))
            slices = [_with(recipe, each, name, new) for each in slices]
            was = ", ".join(f"{k} = {', '.join(map(_shown, v))}" for k, v in before.items())
            said.append(f"{name} = {_shown(new)}" + (f" in the place of {was}" if was else ""))
    if dtype is not None and dtype != recipe.dtype:
        said.append(f"dtype = {dtype} in the place of {recipe.dtype or 'that of the models'}")
    changed = replace(recipe, parameters=own, slices=tuple(slices), dtype=dtype or recipe.dtype)
    return changed, said


def with_beside(
    recipe: Recipe,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    side_files_from: str | None = None,
    heads: tuple[str, ...] | None = None,
) -> tuple[Recipe, list[str]]:
    """A recipe with other files beside the weights and other heads, and what is said of each that it had otherwise.

    Args:
        recipe: as it was read, of which None leaves what it says.
        tokenizer, chat_template, side_files_from, heads: as in `Recipe`, the tokenizer by its source.

    Raises:
        RecipeError: as `Recipe`.

    Example:
        >>> recipe = Recipe("average", None, {"x": "x", "y": "y"}, chat_template="chatml")
        >>> with_beside(recipe, chat_template="llama3", heads=("lm_head",))[1]
        ['chat_template = llama3 in the place of chatml', 'heads = lm_head']
    """
    choice = None if tokenizer is None else TokenizerChoice.of(tokenizer, "--tokenizer")
    given = {"tokenizer": choice, "chat_template": chat_template, "side_files_from": side_files_from, "heads": heads}
    new: dict[str, Any] = {k: v for k, v in given.items() if v is not None and v != getattr(recipe, k)}
    said = []
    for key, value in new.items():
        was = getattr(recipe, key)
        said.append(f"{key} = {_plain(value)}" + (f" in the place of {_plain(was)}" if was else ""))
    return replace(recipe, **new), said


def seeded(recipe: Recipe, seed: int) -> tuple[Recipe, list[str]]:
    """A recipe with the seed that mergekit's option gives, and what is said of it: not every method draws.

    Args:
        recipe: as it was read.
        seed: of random masks.

    Example:
        >>> seeded(Recipe("average", None, {"x": "x", "y": "y"}), 3)[1]
        ['--random-seed changes nothing, since average draws nothing at random']
    """
    if "seed" not in method_class(recipe.method).model_fields:
        return recipe, [f"--random-seed changes nothing, since {short_name(recipe.method)} draws nothing at random"]
    return overridden(recipe, {"seed": seed})


def _read(recipe: Recipe, key: str, field: str, value: Any) -> dict[str, Any]:
    """Our field -> its value, out of what an option says; nothing where it changes nothing here."""
    cls = method_class(recipe.method)
    dialect = next((d for d in cls.mergekit.values() if field in {*d.own, *d.shared}), None) or Dialect()
    if recipe.translated and not _is_ours(dialect.shared.get(field), value):
        if field in {*dialect.own, *dialect.shared}:
            return one_parameter(field, value, dialect, f"-p {key}")
        if isinstance(value, (list, tuple, Mapping)):
            value = Setting.of(value, f"-p {key}", True).plain
    if field in {*dialect.idle, *IDLE}:
        return {}
    spelled = cls.spellings.get(field, SPELLINGS.get(field))
    ours = field if field in cls.model_fields or not isinstance(spelled, (Number, Switch)) else spelled.field
    if isinstance(value, (list, tuple)) and not is_setting(value) and ours in cls.model_fields:
        if not is_per_expert(cls, ours):
            raise RecipeError(
                f"-p {key} is a list, and {short_name(recipe.method)} has one value of it for all experts. Write "
                f"-p '{key}=[{{value: {list(value)}}}]' for a gradient over the layers."
            )
        if key != field:
            raise RecipeError(
                f"-p {key} is a list, and one expert has one value. Write -p '{key}=[{{value: {list(value)}}}]' for a "
                "gradient over the layers."
            )
    if ours not in cls.model_fields:
        theirs = [key for d in cls.mergekit.values() for key in (*d.own, *d.shared)] if recipe.translated else []
        known = list(dict.fromkeys([*theirs, *cls.model_fields]))
        raise RecipeError(
            f"{short_name(recipe.method)} has no parameter {field!r}.{nearest(field, known)} It has: {', '.join(known)}."
        )
    found = parameters_of({field: value}, recipe.method_name, f"-p {key}", True)
    return {k: Setting.of(v, f"-p {key}").plain if is_setting(v) else v for k, v in found.items()}


def _is_ours(said: Number | Switch | None, value: Any) -> bool:
    """Whether a text is our own name of what a switch of mergekit does, as rescale=l1."""
    return isinstance(said, Switch) and isinstance(value, str) and value.lower() not in WORDS


def _is(key: str, name: str) -> bool:
    """Whether a key says the parameter, for all experts or for the one that is named."""
    return key == name or ("." not in name and key.rpartition(".")[2] == name)


def _values(name: str, places: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Key -> all that is said of the parameter anywhere, each once."""
    found: dict[str, list[Any]] = {}
    for place in places:
        for key, value in place.items():
            if _is(key, name) and value not in found.setdefault(key, []):
                found[key].append(value)
    return found


def _apart(recipe: Recipe, field: str, value: Any, experts: Iterable[str]) -> list[str]:
    """The experts for each of which a value is said by itself: mergekit's filters look at each model's own names."""
    filters = isinstance(value, Setting) and any(choice.filter is not None for choice in value.choices)
    return [*experts] if recipe.translated and filters and is_per_expert(method_class(recipe.method), field) else []


def _put(parameters: Mapping[str, Any], name: str, value: Any, apart: list[str]) -> dict[str, Any]:
    """The parameters with another value of one."""
    names = [f"{expert}.{name}" for expert in apart] if "." not in name and apart else [name]
    return {k: v for k, v in parameters.items() if not _is(k, name)} | dict.fromkeys(names, value)


def _with(recipe: Recipe, slice_: Slice, name: str, value: Any) -> Slice:
    """A slice with another value of a parameter, where the expert that it names is a source."""
    expert, _, field = name.rpartition(".")
    if expert and expert not in [span.model for span in slice_.sources]:
        return slice_
    apart = _apart(recipe, field, value, recipe.merged_in(slice_))
    return replace(slice_, parameters=_put(slice_.parameters, name, value, apart))


def _by_likeness(word: str, known: Iterable[str]) -> list[str]:
    """Names, the nearest to a word first."""
    return sorted(known, key=lambda name: -difflib.SequenceMatcher(None, word, name).ratio())


def _plain(value: Any) -> str:
    if isinstance(value, TokenizerChoice) and value == TokenizerChoice(value.source):
        return value.source
    return ", ".join(map(_shown, value)) if isinstance(value, tuple) else _shown(value)


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

    known: dict[int, Recipe] = {}  # a recipe that is a model of several stays one

    def of(model: ModelLike | None) -> ModelLike | None:
        if not isinstance(model, Recipe):
            return model
        if id(model) not in known:
            experts = {name: of(expert) for name, expert in model.experts.items()}
            names = by_names or model.by_names
            known[id(model)] = replace(
                model, base=of(model.base), experts=experts, by_names=names, allow_pickle=allow_pickle
            )
        return known[id(model)]

    return of(recipe)  # type: ignore[return-value]
