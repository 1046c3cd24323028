"""Several recipes in one file, of which one names another where a model stands: the models on the way need no folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from twinmerge.arguments import strict
from twinmerge.errors import RecipeError
from twinmerge.models.opened import ModelLike
from twinmerge.recipes.names import EXPERT_NAME
from twinmerge.recipes.nesting import require_few
from twinmerge.recipes.plain_data import documents_in, read_text
from twinmerge.recipes.recipe import Recipe
from twinmerge.recipes.schema import recipe_from
from twinmerge.recipes.typed import Typed

NAME = "name"


@dataclass(frozen=True)
class Documents:
    """The recipes of a file.

    Attributes:
        named: name -> recipe, each after those that it names.
        last: the recipe without a name, None where all have one.
    """

    named: Mapping[str, Recipe]
    last: Recipe | None

    @cached_property
    def made(self) -> dict[str, Recipe]:
        """Name -> recipe, in which the others stand where it names them."""
        found: dict[str, ModelLike] = {}
        for name, recipe in self.named.items():
            found[name] = with_models(recipe, found)
        return found  # type: ignore[return-value]

    @property
    def unused(self) -> list[str]:
        """Names that neither the last recipe nor one that it needs has."""
        left = [] if self.last is None else [self.last]
        used: set[str] = set()
        while left:
            new = self.named.keys() & set(names_in(left.pop())) - used
            used |= new
            left += [self.named[name] for name in new]
        return [name for name in self.named if name not in used]

    @property
    def nested(self) -> Recipe:
        """The last recipe, in which the others stand where it names them; a warning names those that it does not.

        Raises:
            RecipeError: every document has a name, so that none is the last; as `require_few`.
        """
        if self.last is None:
            raise RecipeError(
                f"Every document has a name ({', '.join(self.named)}), so none is the model to write. Leave out the "
                "name of that one, or say where all go with --intermediate-dir."
            )
        if self.unused:
            warnings.warn(
                f"{', '.join(self.unused)}: no document that is merged takes {_one(self.unused)}, so "
                f"{_one(self.unused, 'it is', 'they are')} left out. Put the name where a model stands, or say where all "
                "go with --intermediate-dir DIR.",
                stacklevel=2,
            )
        whole = with_models(self.last, self.made)
        require_few(whole)
        return whole


def _one(names: Sequence[str], one: str = "it", several: str = "them") -> str:
    return several if names[1:] else one


@strict
def read_recipe(file: str | Path) -> Recipe:
    """Read a recipe in YAML or JSON; of a file of several, the one without a name, with the others inside it.

    Raises:
        TwinmergeError: no such file, no mapping, a key twice, unknown or unsupported keys, an expert named twice; of
            several documents as `documents_from` and `Documents.nested`.
    """
    return read_all(file).nested


@strict
def read_all(file: str | Path) -> Documents:
    """Read all recipes of a file, which may be one.

    Raises:
        TwinmergeError: as `read_recipe`.
    """
    file = Path(file)
    return _documents(Typed(read_text(file, "recipe"), file.suffix == ".json"), str(file))


def typed_recipe(typed: Typed) -> Recipe:
    """The recipe that a text says, as `read_recipe` of its file.

    Raises:
        TwinmergeError: as `read_recipe`.
    """
    return _documents(typed, "as it was typed").nested


def _documents(typed: Typed, where: str) -> Documents:
    raw = documents_in(typed.content, typed.json, f"The recipe {where}")
    if len(raw) > 1:
        found = documents_from(raw, where)
        named = {name: replace(recipe, typed=typed) for name, recipe in found.named.items()}
        return Documents(named, found.last and replace(found.last, typed=typed))
    if not raw or not isinstance(raw[0], dict):
        raise RecipeError(f"The recipe {where} is no mapping of keys to values. Start with merge_method: and models:.")
    return Documents({}, replace(recipe_from(raw[0], where), typed=typed))


def documents_from(raw: Sequence[Any], where: str) -> Documents:
    """Recipes out of plain data.

    Raises:
        RecipeError: two documents without a name or with one name, recipes that name each other in a circle.
    """
    named: dict[str, Recipe] = {}
    last: list[Recipe] = []
    for number, each in enumerate(raw, 1):
        at = f"{where}, document {number}"
        if not isinstance(each, dict):
            raise RecipeError(f"{at} is no mapping of keys to values. Start with merge_method: and models:.")
        name = each.get(NAME)
        recipe = recipe_from({key: value for key, value in each.items() if key != NAME}, at)
        if name is None:
            last.append(recipe)
            continue
        if not isinstance(name, str) or not EXPERT_NAME.fullmatch(name):
            raise RecipeError(f"{at}: the name {name!r:.80} is not usable. Use letters, digits, '_', '-' and '.'.")
        if name in named:
            raise RecipeError(f"{where} has two documents of the name {name!r}. Give one of them another.")
        named[name] = recipe
    if len(last) > 1:
        raise RecipeError(f"{where} has {len(last)} documents without a name. Give all but one a name.")
    return Documents(_in_order(named, where), last[0] if last else None)


def with_models(recipe: Recipe, made: Mapping[str, ModelLike]) -> Recipe:
    """The recipe with models in the place of names.

    Args:
        recipe: that may name some.
        made: name -> what stands for it.

    Raises:
        RecipeError: an adapter on such a name, or a tokenizer of its own, which want a folder.
    """

    def of(model: ModelLike | None) -> ModelLike | None:
        if isinstance(model, str):
            base, plus, adapter = model.partition("+")
            if plus and base in made:
                if not isinstance(made[base], str):
                    raise RecipeError(
                        f"{model!r} puts an adapter on a model that is merged on the way. Say where that one goes with "
                        "--intermediate-dir DIR."
                    )
                return f"{made[base]}+{adapter}"
            return made.get(model, model)
        return model

    choice = recipe.tokenizer
    if choice is not None and choice.source in made and choice.source not in recipe.experts:
        choice = replace(choice, source=_tokens_of(choice.source, made[choice.source]))
    experts = {name: of(model) for name, model in recipe.experts.items()}
    return replace(recipe, base=of(recipe.base), experts=experts, tokenizer=choice)


def _tokens_of(name: str, made: ModelLike) -> str:
    """Where the tokenizer of a merged model is: where its base's is, or its first model's, if it has no other."""
    while isinstance(made, Recipe) and made.tokenizer is None and made.chat_template is None:
        made = made.base if made.base is not None else next(iter(made.experts.values()))
    if isinstance(made, str) and "+" not in made:
        return made
    raise RecipeError(
        f"The tokenizer's source {name!r} is merged on the way, with a tokenizer that is in no folder yet. Say where it "
        "goes with --intermediate-dir DIR."
    )


def names_in(recipe: Recipe) -> list[str]:
    """What stands where models and the tokenizer's source stand, as far as it is text."""
    source = None if recipe.tokenizer is None else recipe.tokenizer.source
    named = (recipe.base, *recipe.experts.values(), source)
    return [model.partition("+")[0] for model in named if isinstance(model, str)]


def _in_order(named: Mapping[str, Recipe], where: str) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    while len(found) < len(named):
        ready = [
            name
            for name, recipe in named.items()
            if name not in found and not (set(names_in(recipe)) & named.keys()) - found.keys()
        ]
        if not ready:
            left = ", ".join(name for name in named if name not in found)
            raise RecipeError(f"{where}: {left} name each other in a circle. Take one of them out of it.")
        found |= {name: named[name] for name in ready}
    return found
