"""What the output has beside its weights: whose tokenizer, template of chats and generation settings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from twinmerge.engine.plan import BASE
from twinmerge.engine.tokens.apply import Unified, renumbering, tokens_of
from twinmerge.engine.tokens.ids import ONE, renumbered
from twinmerge.engine.tokens.read import CONFIG as SETTINGS
from twinmerge.engine.tokens.read import config_of, named_in
from twinmerge.errors import ModelError
from twinmerge.models.by_token import resized
from twinmerge.models.opened import OpenedModel
from twinmerge.models.tokens import Sides, Tokens
from twinmerge.recipes.chat_template import AUTO, BUILT_IN
from twinmerge.recipes.recipe import Recipe
from twinmerge.store.foreign import CONFIG, VOCABULARY, find, read_json, read_text, reason

MODEL, TEMPLATE, GENERATION = "config.json", "chat_template.jinja", "generation_config.json"


def with_sides(
    recipe: Recipe, base: OpenedModel, experts: Mapping[str, OpenedModel], unified: Unified | None
) -> OpenedModel:
    """The model whose names, config and side files the output has, with what the recipe says of them.

    Args:
        recipe: with a tokenizer, a template or an expert whose side files are taken, or with none of them.
        base: that model.
        experts: the others.
        unified: how they came to be of one vocabulary.

    Raises:
        ModelError: no template where one is asked for; a special token that the output's tokenizer does not have.
    """
    if recipe.chat_template is None and recipe.side_files_from is None and unified is None:
        return base
    was = base.sides or Sides()
    donor = base if recipe.side_files_from is None else experts[recipe.side_files_from]
    tokens = was.tokens if unified is None else unified.order.tokens
    ids = {
        id(model): _ids(label, model, tokens, unified)
        for label, model in ((BASE, base), (recipe.side_files_from or BASE, donor))
    }
    config = config_said(base)
    changed = {} if unified is None else resized(config, unified.order.size)
    own, lost = renumbered({**config, **changed}, ids[id(base)])
    changed |= own
    if donor is not base:
        special = {key: value for key, value in config_said(donor).items() if key.endswith(ONE)}
        new, more = renumbered(special, ids[id(donor)])
        changed |= special | new
        lost += more
    generates = donor if generation_said(donor) else base
    generation = generation_said(generates)
    new, more = renumbered(generation, ids[id(generates)])
    _warn_of_lost(dict.fromkeys((*lost, *more)))
    same = generates is base and was.generation is None and not new
    template = template_of_recipe(recipe, base, experts)
    sides = Sides(
        tokens,
        was.settings if donor is base else sides_folder(donor),
        was.template if template is None else template,
        None if same else {**generation, **new},
    )
    _check_special(sides, base)
    return replace(base, sides=sides, config_changes={**base.config_changes, **changed})


def config_said(model: OpenedModel) -> dict[str, Any]:
    """What the config.json of a model says; nothing of one in memory, whose class says it."""
    return {} if model.folder is None else {**json_in(model.folder, MODEL), **model.config_changes}


def generation_said(model: OpenedModel) -> Mapping[str, Any]:
    """What a model's generation_config.json says; empty without one."""
    if model.sides is not None and model.sides.generation is not None:
        return model.sides.generation
    folders = dict.fromkeys(folder for folder in (sides_folder(model), model.folder) if folder is not None)
    return next((found for folder in folders if (found := json_in(folder, GENERATION))), {})


def template_of_recipe(recipe: Recipe, base: OpenedModel, experts: Mapping[str, OpenedModel]) -> str | None:
    """The template that a recipe names: of "auto" the one that most models have, the first of equally many; None where
    the tokenizer's own is to stay."""
    if recipe.chat_template is None or recipe.chat_template != AUTO:
        return BUILT_IN.get(recipe.chat_template or "", recipe.chat_template)
    listed = recipe.base is None or any(model == recipe.base for model in recipe.experts.values())
    models = [*([] if listed else [base]), *(experts[name] for name in recipe.experts)]
    found = [template for model in models if (template := template_of(model)) is not None]
    count = Counter(template.strip() for template in found)
    return max(found, key=lambda template: count[template.strip()], default=None)


def template_of(model: OpenedModel) -> str | None:
    """The template of chats that a model has; of several with names the default one."""
    if model.sides is not None and model.sides.template is not None:
        return model.sides.template
    folder = settings_folder(model)
    return None if folder is None else template_in(folder)


def template_in(folder: Path) -> str | None:
    """The template in a folder, as transformers finds it: in a file of its own, else in tokenizer_config.json."""
    if (file := find(folder, TEMPLATE)) is not None:
        return read_text(file, VOCABULARY.bytes, "Restore it.")
    found = config_of(folder).get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def settings_folder(model: OpenedModel) -> Path | None:
    """Where the tokenizer settings are that a model has."""
    sides = model.sides or Sides()
    return sides.settings or (sides_folder(model) if sides.tokens is None else sides.tokens.folder)


def sides_folder(model: OpenedModel) -> Path | None:
    """The folder of a model's small files: that of its adapter, where it brings settings of a tokenizer along."""
    own = model.adapter
    return own if own is not None and any(find(own, name) for name in (SETTINGS, TEMPLATE)) else model.folder


def check_sides(model: OpenedModel) -> None:
    """Load a tokenizer that was made before it is written, and see that every token has the row that is its own.

    Raises:
        ModelError: the tokenizers library does not read it, or numbers it otherwise.
    """
    tokens = None if model.sides is None else model.sides.tokens
    if tokens is None or not tokens.made:
        return
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(tokens.text.decode()).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library has no classes of errors of its own
        raise ModelError(
            f"The tokenizer that was made of the one in {tokens.folder} cannot be read ({reason(error)}). Take another "
            "source for the tokenizer."
        ) from error
    if odd := [token for token in {*found, *tokens.ids} if found.get(token) != tokens.ids.get(token)]:
        raise ModelError(
            f"In the tokenizer that was made of the one in {tokens.folder}, {min(odd)!r} gets another id than its "
            "row has. Take another source for the tokenizer."
        )


def _ids(
    label: str, model: OpenedModel, tokens: Tokens | None, unified: Unified | None
) -> Mapping[int, int | None] | None:
    """Id of a token in a model -> in the output, where they differ."""
    if tokens is None:
        return None
    own = tokens_of(model) if unified is None else unified.tokens[label]
    return None if own is None else renumbering(own, tokens)


def json_in(folder: Path, name: str) -> dict[str, Any]:
    """A config in a folder; empty where there is none."""
    file = find(folder, name)
    return {} if file is None else read_json(file, CONFIG, finite=False)


def _check_special(sides: Sides, base: OpenedModel) -> None:
    """Refuse settings that name a token which the tokenizer lacks: loading would add it, with an id that has no row.

    Raises:
        ModelError: they do.
    """
    if sides.tokens is None:
        return
    folder = sides.settings or sides.tokens.folder
    if lacking := [token for token in named_in(config_of(folder)) if token not in sides.tokens.ids]:
        raise ModelError(
            f"The tokenizer settings in {folder} name {lacking[0]!r}, which the output's tokenizer does not have. Take "
            "tokenizer: union, or the settings of another model."
        )


def _warn_of_lost(keys: Mapping[str, None]) -> None:
    if keys:
        warnings.warn(
            f"{', '.join(keys)} of the config names a token that the output's tokenizer does not have, and is left "
            "out. Say it in the output's config.json where a model needs it.",
            stacklevel=4,
        )
