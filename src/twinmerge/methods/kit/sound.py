"""What a class of a method must have: what is missing, or unknown, is named when the method is first used; what goes
wrong in one that is not ours is one sentence."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from twinmerge.errors import TwinmergeError, UsageError, in_one_line, nearest
from twinmerge.methods.kit.base import (
    NO_BASE,
    Grain,
    Group,
    Known,
    Law,
    Method,
    Need,
    Outputs,
    Pass,
    Place,
    Scope,
    Space,
    Tile,
)
from twinmerge.methods.kit.given import merged_tile
from twinmerge.origin import given_by, is_ours, misspelt

if TYPE_CHECKING:
    from torch import Tensor

ONE_OF = {"space": get_args(Space), "grain": get_args(Grain), "outputs": get_args(Outputs), "group": get_args(Group)}
TOLD = {"group": 40, "cost": 15, "strong": 32}
"""What `twinmerge methods` prints of a class of ours -> letters that there is room for."""
SOME_OF = {"laws": get_args(Law), "needs": get_args(Need)}
ABLE = {"linear": "coefficients", "core_space": "merge_factors"}
"""What a class says it can -> the function that does it."""


def check_class(cls: type[Method], name: str) -> None:
    """Refuse a class that lacks what a method needs.

    Raises:
        TwinmergeError: it does; the message says what to change.

    Example:
        >>> class Odd(Method):
        ...     space = "delta"
        ...     def apply(self, tile, known):
        ...         return tile.x[0]
        >>> check_class(Odd, "Odd")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: Odd: space is 'delta'. Did you mean 'deltas'? Choose from deltas, parameters, either.
    """
    for attribute, known in ONE_OF.items():
        _known(getattr(cls, attribute), attribute, known, name)
    for attribute, known in SOME_OF.items():
        values = getattr(cls, attribute)
        if isinstance(values, str) or not isinstance(values, (frozenset, set, tuple, list)):
            raise UsageError(
                f"{name}: {attribute} is {values!r:.80}, which is no list of names. Write {attribute} = "
                f"({known[0]!r},)."
            )
        for value in values:
            _known(value, attribute, known, name)
    if len(cls.needs) > 1:
        raise UsageError(f"{name}: needs is {cls.needs!r}. A method reads one kind of statistics; name one.")
    _check_counts(cls, name)
    if is_ours(cls):
        _check_told(cls, name)
    for attribute, function in ABLE.items():
        if getattr(cls, attribute) and getattr(cls, function) is getattr(Method, function):
            raise UsageError(
                f"{name} says that it is {attribute}, and has no {function}. Define it, or leave {attribute} out."
            )
    if cls.scales_last and "scale" not in cls.model_fields:
        raise UsageError(f"{name} says that it scales last, and has no field scale. Add one, or leave scales_last out.")
    if cls.mergekit and "compat" not in cls.model_fields:
        raise UsageError(f"{name} says how mergekit has it, and has no field compat. Add one that allows 'mergekit'.")
    if cls.outputs == "masks" and not hasattr(cls, "vector_and_masks"):
        raise UsageError(f"{name} makes masks. Derive it from MaskMethod, which is in twinmerge.methods.kit.masks.")
    try:
        inspect.signature(cls.apply).bind(None, None, None)
    except TypeError as error:
        raise UsageError(f"{name}: apply takes other arguments. Write def apply(self, tile, known).") from error
    _check_names(cls, name)
    _check_defaults(cls, name)


def check_object(method: Method, name: str) -> None:
    """The same of what a method is with its parameters: its grain, its passes, and values that a recipe can hold.

    Raises:
        TwinmergeError: passes that are none or have one name, or a parameter that is no plain value.
    """
    for shape in ((3, 4), (4,)):
        _known(method.grain_of(Place("layer.weight", shape)), "what grain_of gives", ONE_OF["grain"], name)
    for field, value in method.model_dump().items():
        if not _is_plain(value):
            raise UsageError(
                f"{name}: {field} is {value!r:.80}, which a recipe cannot hold. Let it be a number, a text, or a list "
                "of them."
            )
    passes = method.passes()
    if isinstance(passes, Pass) or not isinstance(passes, Sequence):
        raise UsageError(
            f"{name}: passes gives {passes!r:.80}, which is no list of them. Return a list, empty for none."
        )
    seen: set[str] = set()
    for step in passes:
        kind = type(step).__name__
        if not isinstance(step, Pass):
            raise UsageError(f"{name}: {step!r:.80} among its passes is none. Derive it from twinmerge.methods.Pass.")
        own = getattr(step, "name", None)
        if not isinstance(own, str) or not own:
            raise UsageError(f'{name}: its pass {kind} has no name. Write name = "…" in the class.')
        if own in seen:
            raise UsageError(f"{name}: two of its passes are named {own!r}. Give each a name of its own.")
        seen.add(own)
        _known(getattr(step, "scope", None), "scope", get_args(Scope), f"{name}: its pass {kind}")


def applied(method: Method, tile: Tile, known: Known) -> Tensor:
    """What a method makes of a tile.

    Raises:
        UsageError: a method that is not ours fails, or changes the tile that it was given.
    """
    try:
        merged = method.apply(tile, known)
    except TwinmergeError:
        raise
    except Exception as error:
        if is_ours(type(method)):
            raise
        raise failed(method, "apply", tile, error) from error
    if (what := tile.written_to) is not None:
        raise UsageError(
            f"{type(method).__name__}: apply changes tile.{what} in place (add_, mul_, [...] = and their like). Tiles "
            f"are only read: write into a new tensor, such as tile.{what}.clone()."
        )
    return merged_tile(merged, tile, method)


def failed(method: Method, function: str, tile: Tile, error: Exception) -> UsageError:
    """A method's own error as a sentence."""
    hint = f" {NO_BASE}" if tile.base is None and method.space == "parameters" else " Mend the method."
    what = f"{type(method).__name__}: {function} fails on {tile.at.name!r}"
    return UsageError(f"{what}: {in_one_line(error)}.{hint}")


def _check_names(cls: type[Method], name: str) -> None:
    """Refuse a parameter by the name of an attribute of `Method`, and a name that is nearly one: it would do nothing."""
    for given in given_by(cls, Method):
        if given in cls.model_fields and given in vars(Method):
            raise UsageError(
                f"{name}: {given} is annotated, and so a parameter. Write {given} = … without an annotation, or take "
                "another name for the parameter."
            )
    if (wrong := misspelt(cls, Method)) is not None:
        raise UsageError(f"{name}: {wrong[0]} is no attribute of a method. Did you mean {wrong[1]!r}?")


def _check_defaults(cls: type[Method], name: str) -> None:
    """Refuse a parameter whose default is outside its own bounds."""
    fields = {key: field for key, field in cls.model_fields.items() if not field.is_required()}
    defaults = {key: field.get_default(call_default_factory=True, validated_data={}) for key, field in fields.items()}
    try:
        cls.model_validate(defaults, strict=True)
    except ValidationError as error:
        wrong = [each for each in error.errors() if each["loc"] and each["loc"][0] in defaults]
        if wrong:
            field = wrong[0]["loc"][0]
            raise UsageError(
                f"{name}: the default of {field}, {defaults[str(field)]!r:.80}, is not allowed: {wrong[0]['msg']}. "
                "Give one that is."
            ) from error


def _known(value: object, attribute: str, known: Sequence[str], name: str) -> None:
    if value not in known:
        raise UsageError(
            f"{name}: {attribute} is {value!r:.80}.{nearest(str(value), known)} Choose from {', '.join(known)}."
        )


def _check_told(cls: type[Method], name: str) -> None:
    """Refuse a class of ours that does not say what the list of methods tells of each."""
    for attribute, most in TOLD.items():
        value = getattr(cls, attribute)
        if not value or value == Method.group or len(value) > most:
            raise UsageError(
                f"{name} has no {attribute} of up to {most} letters. Write {attribute} = … as the methods beside it do."
            )


def _check_counts(cls: type[Method], name: str) -> None:
    least, most = cls.experts_min, cls.experts_max
    if type(least) is not int or least < 1 or not (most is None or (type(most) is int and most >= least)):
        raise UsageError(
            f"{name}: it merges at least {least!r:.40} and at most {most!r:.40} experts. Give experts_min from 1 on, "
            "and experts_max from there on or None."
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bool, int, float))
