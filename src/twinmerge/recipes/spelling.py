"""Other names that recipes of ours may have for methods and parameters, as the methods' classes say them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.dialect import SPELLINGS, Number, Switch
from twinmerge.methods.kit.registry import METHODS, MethodLike, is_own, is_per_expert, method_class, said_otherwise
from twinmerge.recipes.setting import VALUE, is_setting

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


def spelled(
    parameters: Mapping[str, Any], method: MethodLike, experts: Iterable[str], theirs: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Parameters as a command's options name them, one key for each expert, and what is said of that.

    `weight` is `weights`, where the method has that. A mapping by the experts' names is a value for each of them.

    Args:
        parameters: name or expert.name -> value.
        method: whose parameters they are.
        experts: their names.
        theirs: they stand beside a recipe of mergekit, whose names are kept.

    Raises:
        RecipeError: a mapping by other names; expert and name in the wrong order; one parameter twice.

    Example:
        >>> spelled({"weight": {"a": 0.5, "b": 0.3}}, "average", ["a", "b"])
        ({'a.weights': 0.5, 'b.weights': 0.3}, ['weight is read as a.weights = 0.5, b.weights = 0.3'])
    """
    cls, names = method_class(method), list(experts)
    found: dict[str, Any] = {}
    told = []
    for key, value in parameters.items():
        expert, dot, name = key.rpartition(".")
        field = _field(cls, name)
        name = name if theirs or field is None else field
        each = {f"{expert}{dot}{name}": value}
        if isinstance(value, Mapping) and VALUE not in value and field is not None and not expert:
            if not is_per_expert(cls, field):
                raise RecipeError(f"-p {key} is one value for all experts. Write a number, such as -p {name}=0.5.")
            if strange := [str(one) for one in value if one not in names]:
                raise RecipeError(
                    f"-p {key} has {strange[0]!r:.80}, which is no expert.{nearest(strange[0], names)} Write "
                    f"{names[0] if names else 'a'}.{name}=0.5 for an expert, {{filter: TEXT, value: NUMBER}} for tensors."
                )
            each = {f"{one}.{name}": own for one, own in value.items()}
            told.append(f"{key} is read as {', '.join(f'{one} = {own}' for one, own in each.items())}")
        elif field is None and name in names and (meant := _field(cls, expert)) is not None:
            raise RecipeError(
                f"-p {key}: there is no expert {expert!r:.80}. Write -p {name}.{expert if theirs else meant}={value}."
            )
        if twice := each.keys() & found.keys():
            raise RecipeError(f"-p gives {min(twice)} twice. Give it once.")
        found |= each
    return found, told


def _field(cls: type[Method], word: str) -> str | None:
    """The parameter that a word is a name of, as far as numbers have other names."""
    spelling = cls.spellings.get(word, SPELLINGS.get(word))
    named = spelling.field if word not in cls.model_fields and isinstance(spelling, Number) else word
    return named if named in cls.model_fields else None
