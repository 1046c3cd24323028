"""What mergekit's files say of the tokenizer and the template of chats, as recipes of ours say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.recipes.chat_template import KEY as TEMPLATE
from twinmerge.recipes.chat_template import check_template
from twinmerge.recipes.mergekit_parameters import LIKE
from twinmerge.recipes.slices import BASE
from twinmerge.recipes.tokenizer import KEY, KEYS, read_choice

SOURCE = "tokenizer_source"


def beside(
    raw: Mapping[str, Any],
    found: Mapping[str, Any],
    where: str,
    ignored: list[str],
    reference: Callable[[Any, str], str],
) -> dict[str, Any]:
    """The tokenizer and the template of a file.

    Args:
        raw: the file's data.
        found: the models as they are translated, with their names.
        where: for messages.
        ignored: is given what mergekit would ignore.
        reference: gives a model as text, of what stands for one.

    Raises:
        RecipeError: both forms at once; a model that is not merged, in a rule; what is no tokenizer or no template.
    """
    choice: Any = raw.get(KEY)
    more: dict[str, Any] = {}
    if choice is not None and raw.get(SOURCE) is not None:
        raise RecipeError(f"{where} has {KEY} and {SOURCE}. Keep one of them.")
    if raw.get(SOURCE) is not None:
        choice = {"source": raw[SOURCE]}
    if choice is not None:
        at = f"{where}, {KEY}"
        if not isinstance(choice, Mapping):
            raise RecipeError(f"{at} is {choice!r:.80}. Write {KEY}: {{source: union}}, or {SOURCE}: union.")
        for key in choice:
            if key not in KEYS:
                if near := nearest(str(key), KEYS, LIKE):
                    raise RecipeError(f"{at}: unknown key {key!r:.80}.{near} Known: {', '.join(KEYS)}.")
                ignored.append(f"{key!r} of {KEY}")
        names: dict[str, str] = {each["model"]: each["name"] for each in found["models"]}
        if found["base_model"] is not None:
            names[found["base_model"]] = BASE

        def model(each: Any, inner: str) -> str:
            if (ref := reference(each, inner)) not in names:
                raise RecipeError(
                    f"{inner}: {ref!r} is none of the merged models.{nearest(ref, names)} Name one of them."
                )
            return names[ref]

        def source(each: Any, inner: str) -> str:
            ref = reference(each, inner)
            if ref not in names and ref in names.values():
                raise RecipeError(
                    f"{inner}: {ref!r} may be a folder or one of the models. Write ./{ref} for the folder."
                )
            return names.get(ref, ref)

        more[KEY] = read_choice({key: choice[key] for key in KEYS if key in choice}, at, source, model).describe()
    if (template := check_template(raw.get(TEMPLATE), where)) is not None:
        more[TEMPLATE] = template
    return more
