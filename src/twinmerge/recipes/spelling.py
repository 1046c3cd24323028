"""Other names that recipes of ours may have for methods and parameters, as the methods' classes say them."""

from __future__ import annotations

from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.dialect import SPELLINGS, Number, Switch
from twinmerge.methods.kit.registry import METHODS, is_own, is_per_expert, method_class, said_otherwise
from twinmerge.recipes.setting import is_setting

IDLE = ("int8_mask",)  # what saves memory in mergekit: our masks never stay there


def by_our_name(method: str) -> str:
    """The method that a name, or another name of it, stands for."""
    if method in METHODS.files() or is_own(method):
        return method
    return said_otherwise(method, lambda cls: method in cls.aliases) or method


def parameters_of(raw: Any, method: str, where: str, ours: bool) -> dict[str, Any]:
    """Parameters under our names; switches of mergekit that our methods spell otherwise are translated."""
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: parameters must be a mapping, got {raw!r:.80}.")
    cls = method_class(method)
    fields = cls.model_fields
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for key, value in raw.items():
        expert, dot, name = str(key).rpartition(".")
        spelling = cls.spellings.get(name, SPELLINGS.get(name))
        if name not in fields and isinstance(spelling, Number):
            name = spelling.field
        per_expert = ours and name in fields and is_per_expert(cls, name)
        if isinstance(value, (list, tuple)) and not per_expert and not is_setting(value):
            if not ours:
                raise RecipeError(
                    f"{where}: {key} is a list. Write {key}: [{{value: {list(value)}}}] for a gradient over the layers."
                )
            raise RecipeError(
                f"{where}: {key} is a list, and {method} has one value of it for all experts. Write {key}: [{{value: "
                f"{list(value)}}}] for a gradient over the layers."
            )
        if name in IDLE:
            continue
        if isinstance(value, bool) and isinstance(spelling, Switch) and spelling.field is not None:
            name, value = spelling.field, spelling.of(value)
        if name not in fields:
            raise RecipeError(
                f"{where}: {method} has no parameter {key!r:.80}.{nearest(str(key), fields)} It has: "
                f"{', '.join(fields) or 'none'}."
            )
        to = f"{expert}{dot}{name}"
        if to in found:
            raise RecipeError(f"{where}: {said[to]} and {key} are one parameter, {to}. Keep one of them.")
        found[to], said[to] = value, str(key)
    return found
