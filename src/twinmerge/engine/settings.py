"""What is told of experts beside their weights: another tokenizer, template, special tokens, settings of generation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twinmerge.engine.models import Models
from twinmerge.engine.plan import BASE
from twinmerge.engine.sides import GENERATION, MODEL, json_in, settings_folder, sides_folder, template_in
from twinmerge.engine.tokens.ids import ONE
from twinmerge.engine.tokens.read import SPECIAL, config_of
from twinmerge.models.configs import said
from twinmerge.models.opened import OpenedModel
from twinmerge.models.tokens import Tokens
from twinmerge.models.vocabulary import other_tokens, tokens_in, warn_of_tokens
from twinmerge.recipes.chat_template import KEY as TEMPLATE
from twinmerge.recipes.recipe import Recipe

Settings = dict[str, tuple[Any, Any]]
"""Key -> what an expert says, and what the model says whose settings the output has."""

IDLE = ("transformers_version", "_from_model_config", "_name_or_path", "_commit_hash")
USUAL = {"use_cache": True}
"""What is said where nothing is; else None and False are."""
MARKS = re.compile(r"<\|\w+\|>|\[\|\w+\|\]")
"""What templates of chats write around a message, and tokenizers that know them have a token for."""


@dataclass(frozen=True)
class Told:
    """What is told of experts.

    Attributes:
        recipe: of the merge.
        tokens: expert -> what its tokenizer means otherwise than the base's, where rows go together by their number.
        settings: expert -> what it says otherwise beside its weights.
        torn: where the output's tokenizer and its config say otherwise: key -> (the one, the other).
        lacking: what the template of chats that was asked for writes, and the output's tokenizer has no token for.
    """

    recipe: Recipe
    tokens: Mapping[str, str]
    settings: Mapping[str, Settings]
    torn: Settings
    lacking: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe, models: Models) -> Told:
        """Look at the small files of all models."""
        tokens = {}
        if models.unified is None:
            found = {name: other_tokens(models.base.folder, model.folder) for name, model in models.experts.items()}
            tokens = {name: each for name, each in found.items() if each}
        settings = other_settings(recipe, models)
        return cls(recipe, tokens, settings, _torn(recipe, models), _lacking(recipe, models.base))

    def warn(self, stacklevel: int) -> None:
        """Warn of every expert that something is told of."""
        warn_of_tokens(self.tokens, stacklevel + 1)
        warn_of_settings(self.settings, self.recipe, stacklevel + 1)
        if self.torn:
            told = "; ".join(f"{key} is {one!r} and {other!r}" for key, (one, other) in self.torn.items())
            warnings.warn(
                f"The output's tokenizer and its config are of different models, and disagree: {told}. Texts may end "
                "where they should not. Take both from one model, by tokenizer and side_files_from.",
                stacklevel=stacklevel,
            )
        if self.lacking:
            warnings.warn(
                f"The template of chats writes {', '.join(self.lacking)}, for which the output's tokenizer has no "
                "token: models read it in pieces. Take a tokenizer that has it (--tokenizer), or another template.",
                stacklevel=stacklevel,
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"other_tokens": dict(self.tokens), "other_settings": dict(self.settings)}


def other_settings(recipe: Recipe, models: Models) -> dict[str, Settings]:
    """Expert -> its settings that differ from those that the output has.

    Args:
        recipe: that may say whose the output has.
        models: its opened models.
    """
    reference = models.base if recipe.side_files_from is None else models.experts[recipe.side_files_from]
    tokens: Mapping[str, Tokens] = {} if models.unified is None else models.unified.tokens
    folder, tokenizer = sides_folder(reference), settings_folder(models.base)
    own = _settings(folder, tokens.get(recipe.side_files_from or BASE), tokenizer)
    found: dict[str, Settings] = {}
    for name, expert in models.experts.items():
        if (theirs_in := sides_folder(expert)) is None or theirs_in == folder == tokenizer:
            continue
        theirs = _settings(theirs_in, tokens.get(name), theirs_in)
        differ = {key: (value, own.get(key)) for key, value in theirs.items() if value != own.get(key)}
        if TEMPLATE in differ:
            one, other = differ.pop(TEMPLATE)
            differ |= {} if recipe.chat_template is not None else {TEMPLATE: (_short(one), _short(other))}
        if differ:
            found[name] = differ
    return found


def warn_of_settings(found: Mapping[str, Settings], recipe: Recipe, stacklevel: int) -> None:
    """Warn of the experts that have other settings than the output; those that differ alike in one sentence.

    Args:
        found: as `other_settings` gives it.
        recipe: of the merge.
        stacklevel: of the warnings.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, differ in found.items():
        shown = [TEMPLATE] if TEMPLATE in differ else []
        shown += [said({key: pair}, "the output") for key, pair in differ.items() if key != TEMPLATE]
        alike.setdefault(tuple(shown), []).append(name)
    for differing, names in alike.items():
        one, *more = names
        who = f"The experts {', '.join(map(repr, names))} have" if more else f"The expert {one!r} has"
        warnings.warn(
            f"{who} other settings than the output: {'; '.join(differing[:5])}"
            f"{f' and {len(differing) - 5} more' if len(differing) > 5 else ''}. Take "
            f"{'those of one' if more else 'its own'} with {_remedy(recipe, one)}.",
            stacklevel=stacklevel,
        )


def _lacking(recipe: Recipe, base: OpenedModel) -> tuple[str, ...]:
    """Marks of the template that a recipe asks for which are no tokens of the output's tokenizer."""
    sides = base.sides
    if recipe.chat_template is None or sides is None or sides.template is None:
        return ()
    folder = settings_folder(base)
    known = sides.tokens.ids if sides.tokens is not None else None if folder is None else tokens_in(folder)
    marks = dict.fromkeys(MARKS.findall(sides.template))
    return () if known is None else tuple(mark for mark in marks if mark not in known)


def _remedy(recipe: Recipe, expert: str) -> str:
    """What takes an expert's settings: a file in mergekit's schema has no such key."""
    option = f"--side-files-from {expert}"
    return option if recipe.translated else f"side_files_from: {expert} ({option})"


def _torn(recipe: Recipe, models: Models) -> Settings:
    """Tokens that texts begin and end with by the output's tokenizer, and by its config, where those are of two
    models."""
    side = BASE if recipe.side_files_from is None else recipe.side_files_from
    folder, tokenizer = sides_folder(models.labelled(side)), settings_folder(models.base)
    if models.unified is None or tokenizer in (None, folder):
        return {}
    own = _settings(folder, models.unified.tokens.get(side), tokenizer)
    found: Settings = {}
    for key in ("bos_token", "eos_token"):
        one, other = own.get(key), own.get(f"{key}_id")
        if one is not None and other is not None and one not in (other if isinstance(other, list) else [other]):
            found[key] = one, other
    return found


def _settings(folder: Path | None, tokens: Tokens | None, tokenizer: Path | None) -> dict[str, Any]:
    """What a folder says of them, and that of a tokenizer, as far as they say more than nothing."""
    if folder is None:
        return {}
    named = {} if tokenizer is None else config_of(tokenizer)
    template = None if tokenizer is None else template_in(tokenizer)
    found: dict[str, Any] = {TEMPLATE: (template or "").strip() or None}
    found |= {key: _content(named.get(key)) for key in SPECIAL}
    ids = {key: value for key, value in json_in(folder, MODEL).items() if key.endswith(ONE)}
    ids |= {key: value for key, value in json_in(folder, GENERATION).items() if key not in IDLE}
    found |= {key: _meant(value, tokens) if key.endswith(ONE) else value for key, value in ids.items()}
    return {key: value for key, value in found.items() if value not in (None, False, [], USUAL.get(key))}


def _short(template: str | None) -> str | None:
    return template if template is None or len(template) <= 60 else f"{template[:57]}..."


def _content(value: Any) -> Any:
    if isinstance(value, list):
        return [_content(each) for each in value]
    return value.get("content", value) if isinstance(value, dict) else value


def _meant(value: Any, tokens: Tokens | None) -> Any:
    """The tokens of ids, where the models' ids are not the same."""
    if tokens is None or isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [_meant(each, tokens) for each in value]
    return tokens.by_id.get(value, value) if isinstance(value, int) else value
