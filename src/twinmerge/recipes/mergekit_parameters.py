"""Parameters as mergekit's files say them: scopes, filters, gradients, switches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinmerge.errors import RecipeError, nearest
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.recipes.plain_data import same_number
from twinmerge.recipes.setting import Choice, Setting

SWITCHES = (
    *("normalize", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "normalize_weights"),
)
WORDS = {
    **dict.fromkeys(("1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys(("0", "off", "f", "false", "n", "no"), False),
}
"""Texts that mergekit takes for a switch."""
PARAMETERS = {
    *SWITCHES,
    *("weight", "density", "lambda", "t", "scale", "gamma", "epsilon", "select_topk", "max_iter", "tol", "eps"),
    *("r", "alpha"),
}  # of any method of mergekit


LIKE = 0.8
"""How near a key must be to a known one to be a slip of the pen, and not one of those that mergekit ignores: `densty`
is, `allow_negative_weights` beside `normalize_weights` is not."""


@dataclass(frozen=True)
class Scope:
    """Parameters that are written in one place.

    Attributes:
        settings: as they are written, all known to mergekit.
        where: for messages.
    """

    settings: Mapping[str, Any]
    where: str


def scope(raw: Any, dialect: Dialect, where: str, ignored: list[str]) -> Scope:
    """The parameters of one place, checked.

    Args:
        raw: a mapping, or None.
        dialect: of the method.
        where: for messages.
        ignored: is given what mergekit would ignore: parameters that it does not know at all.

    Raises:
        RecipeError: a parameter with nearly the name of a known one, a value of another kind.
    """
    if raw is None:
        return Scope({}, where)
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: parameters must be a mapping, got {raw!r:.80}.")
    known, found = {*PARAMETERS, *dialect.own, *dialect.shared}, {}
    for key, value in raw.items():
        if key not in known:
            if near := nearest(str(key), known, LIKE):
                raise RecipeError(
                    f"{where}: mergekit has no parameter {key!r:.80}.{near} It has: {', '.join(sorted(known))}."
                )
            ignored.append(f"{key!r}, which is no parameter of mergekit")
            continue
        said = dialect.own.get(key) or dialect.shared.get(key)
        for each in Setting.of(value, f"{where}, {key}", True).values():
            read = _read(key, dialect, f"{where}, {key}")(each)
            if isinstance(said, Number) and (told := said.told(read)):
                warnings.warn(f"{where}, {key}: {told}.", stacklevel=3)
        found[key] = value
    return Scope(found, where)


def setting(key: str, scopes: Sequence[Scope], dialect: Dialect, default: Any) -> Any:
    """The value of a parameter for all tensors, or a `Setting` of it; None where no scope says one.

    The first scope that yields a value for a tensor counts: a filter that does not fit leaves it to the next.

    Args:
        key: mergekit's name.
        scopes: from the innermost to the outermost.
        dialect: of the method.
        default: what it is where no scope says so, None for nothing.
    """
    found = Setting(())
    for each in scopes:
        if key in each.settings:
            at = f"{each.where}, {key}"
            found = found.then(Setting.of(each.settings[key], at, True).mapped(_read(key, dialect, at)))
    if default is not None:
        found = found.then(Setting((Choice((default,)),)))
    return found.plain if found.choices else None


def shared(scopes: Sequence[Scope], method: str, dialect: Dialect, where: str) -> dict[str, Any]:
    """The parameters that all models share, under our names.

    Raises:
        RecipeError: one is missing that has no default; one that no method here follows.
    """
    found = dict(dialect.fixed)
    for key, said in dialect.shared.items():
        value = setting(key, scopes, dialect, said.default)
        if value is None:
            raise RecipeError(
                f"{where}: {method} needs {key}, for all models together. Add parameters: {{{key}: 0.5}}."
            )
        if isinstance(said, Number):
            found[said.field] = value
            continue
        if said.field is not None or said.refused:
            found |= _switched(said, value, where)
    return found


def _switched(said: Switch, value: Any, where: str) -> dict[str, Any]:
    """What a switch of mergekit sets here."""
    values = list(value.values()) if isinstance(value, Setting) else [value]
    if any(values) and said.refused:
        raise RecipeError(f"{where}: {said.refused}")
    if said.field is None:
        return {}
    return {said.field: value.mapped(said.of) if isinstance(value, Setting) else said.of(value)}


def one_parameter(key: str, value: Any, dialect: Dialect, where: str) -> dict[str, Any]:
    """A parameter by itself, as a file has it, under our name; nothing where it changes nothing here.

    Args:
        key: mergekit's name, which the dialect has.
        value: as it is written.
        dialect: of the method.
        where: for messages.

    Raises:
        RecipeError: as `scope`; a switch that no method here follows.

    Example:
        >>> one_parameter("lambda", "5e-1", Dialect(shared={"lambda": Number("scale", 1.0)}), "here")
        {'scale': 0.5}
    """
    said = dialect.own.get(key) or dialect.shared.get(key)
    if said is None:
        return {}
    read = setting(key, [scope({key: value}, dialect, where, [])], dialect, said.default)
    return {said.field: read} if isinstance(said, Number) else _switched(said, read, where)


def of_model(
    name: str, model: str, scopes: Sequence[Scope], method: str, dialect: Dialect, where: str
) -> dict[str, Any]:
    """The parameters of one model, under our names.

    Raises:
        RecipeError: one is missing that has no default.
    """
    found = {}
    for key, number in dialect.own.items():
        value = setting(key, scopes, dialect, number.default)
        if value is None:
            raise RecipeError(
                f"{where}, model {model!r}: {method} needs a {key} for every model. Add parameters: {{{key}: 1.0}} to "
                "it, or to the whole recipe."
            )
        found[f"{name}.{number.field}"] = value
    return found


def idle(key: str, dialect: Dialect) -> bool:
    """Whether a parameter would be missed by whoever wrote it, since the method does not use it."""
    return key not in dialect.own and key not in dialect.shared and key not in dialect.idle


def _read(key: str, dialect: Dialect, where: str) -> Callable[[Any], Any]:
    """What makes a value of a written one."""
    if key in SWITCHES or isinstance(dialect.shared.get(key), Switch):
        return lambda value: _switch(key, value, where)
    return lambda value: _number(key, value, where)


def _number(key: str, value: Any, where: str) -> float:
    """A number, or the text of one."""
    number = same_number(value.strip()) if isinstance(value, str) else value
    if not isinstance(number, (int, float)):
        raise RecipeError(f"{where}: {key} is {value!r:.80}, which is no number. Write {key}: 0.5.")
    try:
        return float(number)
    except OverflowError as error:
        raise RecipeError(f"{where}: {key} is no number of a size that can be used. Write {key}: 0.5.") from error


def whole_numbers(raw: Any) -> Any:
    """A list whose texts and floats are whole numbers, as mergekit reads them; else what it is.

    Example:
        >>> whole_numbers(["0", 16.0]), whole_numbers(["0", "x"])
        ([0, 16], ['0', 'x'])
    """
    if not isinstance(raw, (list, tuple)):
        return raw
    read = [same_number(each.strip()) if isinstance(each, str) else each for each in raw]
    found = [int(n) for n in read if isinstance(n, (int, float)) and not isinstance(n, bool) and n % 1 == 0]
    return found if len(found) == len(raw) else raw


def _switch(key: str, value: Any, where: str) -> bool:
    """True or false, or a number or a word of it."""
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.lower() in WORDS:
        return WORDS[value.lower()]
    raise RecipeError(f"{where}: {key} is {value!r:.80}, which is neither true nor false. Write {key}: true.")
