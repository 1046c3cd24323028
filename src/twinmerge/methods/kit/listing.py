"""What there is to merge by: every method with its paper, what it needs and gives, and its parameters."""

from __future__ import annotations

import inspect
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from twinmerge.arguments import strict
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.fold import Fold
from twinmerge.methods.kit.registry import METHODS, MethodLike, is_per_expert, method_class, method_name
from twinmerge.methods.kit.scores import SCORES
from twinmerge.results import Listing


class Methods(Listing):
    """Method -> group, cost, score, strong, paper, space, grain, laws, needs, outputs, over_time, parameters."""


@strict
def list_methods(method: MethodLike | None = None) -> Methods:
    """What there is, or one method alone: its formula is in the class's docstring, its parameters here.

    Args:
        method: a name, or a class or object of your own; all where None.

    Raises:
        TwinmergeError: an unknown method.

    Example:
        >>> list_methods("ties")["ties"]["parameters"]["density"]["default"]
        0.2
        >>> list_methods("ties")
        Methods(1: ties)
    """
    found = METHODS.all() if method is None else {method_name(method): method_class(method)}
    return Methods({name: _about(name, cls) for name, cls in found.items()})


def source_of(method: MethodLike) -> str | None:
    """Where a method comes from: what its class says at "Source:", else its paper.

    Raises:
        TwinmergeError: an unknown method.

    Example:
        >>> source_of("slerp")
        'Shoemake 1985, "Animating rotation with quaternion curves"; for weights as in the tools of the field.'
    """
    cls = method_class(method)
    found = re.search(r"^Source: (.+?)(?:\n\s*\n|\Z)", inspect.getdoc(cls) or "", re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else cls.paper or None


def needs(method: type[Method]) -> list[str]:
    """What a method reads besides the experts' weights."""
    return ["base"] * (method.space == "deltas") + [f"{need} statistics" for need in method.needs]


def choices(field: FieldInfo) -> list[str]:
    """The values that a parameter may have, where they are a closed list of words, by the alphabet: Python takes two
    lists of the same words for one.

    Example:
        >>> from twinmerge.methods.kit.registry import method_class
        >>> choices(method_class("ties").model_fields["scope"])
        ['model', 'tensor']
    """
    kind = field.annotation
    of = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return sorted(
        value for each in of if get_origin(each) is Literal for value in get_args(each) if isinstance(value, str)
    )


def values(cls: type[Method], parameter: str) -> str:
    """What values a parameter may have, in words.

    Example:
        >>> from twinmerge.methods.kit.registry import method_class
        >>> [values(method_class("ties"), name) for name in ("density", "merge", "scale")]
        ['0 to 1; also per expert', 'max, mean or sum', 'a number']
    """
    field = cls.model_fields[parameter]
    closed, kind = choices(field), field.annotation
    kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,))
    if closed:
        found = f"{', '.join(closed[:-1])} or {closed[-1]}" if len(closed) > 1 else closed[0]
    elif bool in kinds:
        found = "true or false"
    elif kinds & {int, float}:
        whole = "a whole number" if float not in kinds else "a number"
        found = _range(field, "0 to 1" if parameter.endswith("density") else whole)
    else:
        found = "a text"
    return f"{found}; also per expert" if is_per_expert(cls, parameter) else found


def _range(field: FieldInfo, without: str) -> str:
    """The limits of a number, or what is said where it has none."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = {name: getattr(each, name) for each in field.metadata for name in signs if hasattr(each, name)}
    limits = {name: value for name, value in limits.items() if value is not None}
    if {"ge", "le"} <= limits.keys():
        return f"{limits['ge']:g} to {limits['le']:g}"
    return ", ".join(f"{signs[name]} {value:g}" for name, value in limits.items()) or without


def over_time(method: type[Method]) -> str | None:
    """How a method takes experts one by one: "sum" in any order, "order", or not at all."""
    if not issubclass(method, Fold):
        return None
    return "sum" if method.keeps_sums else "order"


def _about(name: str, method: type[Method]) -> dict[str, Any]:
    fields = method.model_fields.items()
    return {
        "group": method.group,
        "cost": method.cost,
        "score": SCORES.get(name) if method.__module__ == f"twinmerge.methods.{name}" else None,
        "strong": method.strong,
        "paper": method.paper,
        "space": method.space,
        "grain": method.grain,
        "laws": sorted(method.laws),
        "needs": needs(method),
        "outputs": method.outputs,
        "over_time": over_time(method),
        "parameters": {
            name: {"default": field.default, "about": field.description, "values": values(method, name)}
            | ({"choices": closed} if (closed := choices(field)) else {})
            for name, field in fields
        },
    }
