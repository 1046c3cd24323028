"""Recipes as plain data, which is what files and outputs hold.

A file whose top level has `twinmerge: 1` is a recipe of ours, which is what `Recipe.describe` writes: the methods by our
names and with the papers' semantics. Every other file is in mergekit's schema and means what mergekit means
(`recipes/mergekit.py`). `compat: paper` or `compat: mergekit` at the top level decides otherwise. Both are strict: an
unknown key is an error with the nearest right one.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.registry import method_class
from twinmerge.recipes.chat_template import KEY as TEMPLATE
from twinmerge.recipes.chat_template import check_template
from twinmerge.recipes.lines import KEY, Lines
from twinmerge.recipes.mergekit import translated
from twinmerge.recipes.names import expert_names
from twinmerge.recipes.recipe import MARK, SIDE_FILES, VERSION, Recipe
from twinmerge.recipes.setting import read_settings
from twinmerge.recipes.slices import SLICE_KEYS, SOURCE_KEYS, Slice, check_slice, known_keys, span_of
from twinmerge.recipes.spelling import by_our_name, parameters_of
from twinmerge.recipes.tokenizer import KEY as TOKENIZER
from twinmerge.recipes.tokenizer import TokenizerChoice

RECIPE_KEYS = (
    *(
        "merge_method",
        "base_model",
        "models",
        "parameters",
        "dtype",
        "out_dtype",
        "heads",
        "stochastic",
        KEY,
        "slices",
        TOKENIZER,
        TEMPLATE,
        SIDE_FILES,
        "by_names",
        MARK,
        "compat",
    ),
)
MODEL_KEYS = ("model", "name", "parameters", "statistics")


def recipe_from(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe out of plain data (see the module's text).

    Raises:
        RecipeError: as `read_recipe`.

    Example:
        >>> recipe = recipe_from({"merge_method": "dare_ties", "base_model": "x/base", "models": [
        ...     {"model": "x/a", "parameters": {"weight": 0.3}}, {"model": "x/b", "parameters": {"weight": 0.7}}]})
        >>> recipe.semantics, recipe.make_method().merge
        ('mergekit', 'sum')
        >>> recipe_from(recipe.describe()) == recipe
        True
    """
    ours = _is_ours(raw, where)
    compat = raw.get("compat", "paper" if ours else "mergekit")
    if compat not in ("paper", "mergekit"):
        raise RecipeError(
            f"{where}: compat is {compat!r:.80}.{nearest(str(compat), ['paper', 'mergekit'])} Write compat: paper or "
            "compat: mergekit; a "
            "method's own compat goes under parameters."
        )
    if compat == "paper":
        return _own(raw, where, ours)
    unmarked = {key: value for key, value in raw.items() if key not in (MARK, "compat")}
    found = _own(translated(unmarked, where, own_keys=len(unmarked) < len(raw)), where, ours=True)
    return replace(found, translated=True)


def from_description(raw: Mapping[str, Any]) -> Recipe:
    """The recipe that `Recipe.describe` wrote down; what was written before it had a mark is read as ours too.

    Raises:
        TwinmergeError: it is damaged.
    """
    where = "The recipe of this folder"
    if MARK not in raw and isinstance(raw.get("parameters"), dict) and isinstance(raw.get("merge_method"), str):
        raw = {**raw, "parameters": _once_read(raw["merge_method"], raw["parameters"])}
    return _own({MARK: VERSION, **raw}, where, ours=True)


def _once_read(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an output from before recipes had a mark, when "1e-3" and true were numbers too."""
    cls, found = method_class(method), dict(parameters)
    for key, value in parameters.items():
        name = key.rpartition(".")[2]
        if isinstance(value, (str, bool)) and name in cls.model_fields:
            with suppress(ValueError):  # pydantic's are among them; `make_method` says what is wrong
                found[key] = getattr(cls(**{name: value}), name)
    return found


def _is_ours(raw: Mapping[str, Any], where: str) -> bool:
    if MARK not in raw:
        return False
    version = raw[MARK]
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RecipeError(
            f"{where}: {MARK} is {version!r:.80}, which is no version of recipes. Write {MARK}: {VERSION}."
        )
    if version > VERSION:
        raise RecipeError(
            f"{where} is a recipe of version {version}, and this twinmerge reads {VERSION}. Update twinmerge."
        )
    return True


def _own(raw: Mapping[str, Any], where: str, ours: bool) -> Recipe:
    """A recipe in our schema, or (not `ours`) in mergekit's with the papers' semantics, where the base may be
    listed."""
    for key in raw:
        if key not in RECIPE_KEYS:
            raise RecipeError(
                f"{where}: unknown key {key!r:.80}.{nearest(key, RECIPE_KEYS)} Known: {', '.join(RECIPE_KEYS)}."
            )
    if not isinstance(raw.get("merge_method"), str):
        raise RecipeError(f"{where} has no merge_method. Add one, such as merge_method: ties.")
    method = by_our_name(raw["merge_method"])
    deltas = method_class(method).space != "parameters"
    base, models = _model(raw.get("base_model"), f"{where}, base_model"), raw.get("models")
    if not isinstance(models, list):
        raise RecipeError(f"{where} has no list of models. Add models: with one '- model: path' per expert.")
    entries = []
    for entry in models:
        if not isinstance(entry, dict) or entry.get("model") is None:
            raise RecipeError(f"{where}: every entry of models needs a 'model: path', got {entry!r:.80}.")
        at = f"{where}, model {entry['model']!r:.80}"
        for key in entry:
            if key not in MODEL_KEYS:
                raise RecipeError(
                    f"{at}: unknown key {key!r:.80}.{nearest(key, MODEL_KEYS)} Known: {', '.join(MODEL_KEYS)}."
                )
        entry = {**entry, "model": _model(entry["model"], at)}
        if ours or not deltas or entry["model"] != base:
            entries.append((entry, at))
        elif own := parameters_of(entry.get("parameters"), method, at, ours):
            warnings.warn(f"{where}: ignored, as by mergekit: {', '.join(own)} of the base.", stacklevel=2)
    names = expert_names([str(e["model"]) for e, _ in entries], [e.get("name") for e, _ in entries], where)
    parameters = parameters_of(raw.get("parameters"), method, where, ours)
    statistics: dict[str, str] = {}
    for name, (entry, at) in zip(names, entries, strict=True):
        own = {
            f"{name}.{key}": value for key, value in parameters_of(entry.get("parameters"), method, at, ours).items()
        }
        if twice := own.keys() & parameters.keys():
            raise RecipeError(f"{at}: {min(twice)!r} is set for the whole recipe too. Keep one of them.")
        parameters |= own
        if "statistics" in entry:
            if not isinstance(entry["statistics"], str):
                raise RecipeError(f"{at}: statistics is {entry['statistics']!r:.80}, which is no path of a file.")
            statistics[name] = entry["statistics"]
    heads = () if raw.get("heads") is None else raw["heads"]
    if not isinstance(heads, (list, tuple)) or not all(isinstance(pattern, str) for pattern in heads):
        raise RecipeError(f"{where}: heads must be a list of patterns, got {heads!r:.80}. Write heads: [classifier].")
    return Recipe(
        method,
        base,
        {name: entry["model"] for name, (entry, _) in zip(names, entries, strict=True)},
        parameters,
        raw.get("dtype") if raw.get("out_dtype") is None else raw["out_dtype"],
        tuple(heads),
        raw.get("stochastic"),
        statistics,
        None if raw.get(KEY) is None else Lines.of(raw[KEY]),
        tuple(_slice(each, method, f"{where}, slice {i}") for i, each in enumerate(_list(raw, "slices", where), 1)),
        None if raw.get(TOKENIZER) is None else TokenizerChoice.of(raw[TOKENIZER], f"{where}, {TOKENIZER}"),
        check_template(raw.get(TEMPLATE), where),
        raw.get(SIDE_FILES),
        raw.get("by_names", False),
    )


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if raw.get(key) is None:
        return []
    if not isinstance(raw[key], list):
        raise RecipeError(f"{where}: {key} must be a list, got {raw[key]!r:.80}.")
    if not raw[key]:
        raise RecipeError(f"{where}: {key} is an empty list. Leave it out, or fill it.")
    return list(raw[key])


def _slice(raw: Any, method: str, where: str) -> Slice:
    """A slice whose sources name experts, or "base"."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{where} is {raw!r:.80}. Give it sources: a list of models with their layers.")
    known_keys(raw, SLICE_KEYS, where)
    parameters, spans = dict(parameters_of(raw.get("parameters"), method, where, True)), []
    for each in _list(raw, "sources", where):
        if not isinstance(each, dict) or not isinstance(each.get("model"), str):
            raise RecipeError(f"{where}: every source needs the name of a model, got {each!r:.80}.")
        known_keys(each, SOURCE_KEYS, where)
        spans.append(span_of(each["model"], each.get("layer_range"), where))
        own = parameters_of(each.get("parameters"), method, where, True)
        parameters |= {f"{each['model']}.{key}": value for key, value in own.items()}
    if not spans:
        raise RecipeError(f"{where} has no sources. Name a model and its layers.")
    check_slice(spans, where)
    base = raw.get("base_model")
    if base is not None and (not isinstance(base, str) or base not in [span.model for span in spans]):
        raise RecipeError(f"{where}: base_model is {base!r:.80}, which is none of its sources.")
    return Slice(tuple(spans), base, read_settings(parameters))


def _model(raw: Any, where: str) -> Any:
    if raw is None or isinstance(raw, os.PathLike) or (isinstance(raw, str) and raw):
        return raw
    if isinstance(raw, dict) and raw.keys() == {"recipe"} and isinstance(raw["recipe"], dict):
        return _own(raw["recipe"], f"{where}, recipe", ours=_is_ours(raw["recipe"], where))
    raise RecipeError(f"{where}: {raw!r:.80} is no model. Write a path or hub id, in quotes if it looks like a number.")
