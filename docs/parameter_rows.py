"""What values a parameter of a method or an option of a router may have, as a table of a page says it.

Ranges are found by trying: a value is allowed where the class takes it, so the page cannot say otherwise.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Method
from twinmerge.methods.kit.registry import is_per_expert, make_method

LITTLE = 1e-9
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


class Parameter(NamedTuple):
    """A row of the table: name, kind, default, what is allowed, meaning."""

    name: str
    kind: str
    default: str
    allowed: str
    meaning: str


def of_method(name: str, cls: type[Method]) -> list[Parameter]:
    """The parameters of a method."""
    experts = names_of(cls)

    def strictly(field: str, value: Any) -> None:
        make_method(name, experts, {field: value}).check(experts)

    def loosely(field: str, value: Any) -> None:
        try:
            make_method(name, experts, {field: value})
        except TwinmergeError:  # it may be one expert's beside others, as a negative weight is
            if not is_per_expert(cls, field) or len(experts) < 2:
                raise
            more = dict.fromkeys(experts, 1 + 2 * abs(value)) | {experts[0]: value}
            make_method(name, experts, {f"{expert}.{field}": number for expert, number in more.items()})

    found = []
    for field, info in cls.model_fields.items():
        own = is_per_expert(cls, field)
        kind = "number, or one for each expert" if own else kind_of(info.annotation)
        tries = (loosely,) if own else (strictly, loosely)  # of one expert; together they may ask for more
        allowed = allowed_of(float if own else info.annotation, tries, field)
        found.append(Parameter(field, kind, default_of(info.default), allowed, info.description or ""))
    return found


def of_router(name: str, cls: Any) -> list[Parameter]:
    """The options of a router."""
    from twinmerge.twin.routers.kit.base import fields_of

    def tried(field: str, value: Any) -> None:
        cls(kind=name, **{field: value})

    return [
        Parameter(
            field,
            kind_of(info.annotation),
            default_of(info.default),
            allowed_of(info.annotation, (tried,), field),
            info.description or "",
        )
        for field, info in fields_of(cls).options.model_fields.items()
    ]


def names_of(cls: type[Method], usual: int = 2) -> tuple[str, ...]:
    """Names for as many experts as a method is shown with."""
    most = cls.experts_max or max(usual, cls.experts_min)
    return tuple("abcdefgh"[: max(cls.experts_min, min(usual, most))])


def parts_of(annotation: Any) -> list[Any]:
    """The types that a union is of."""
    if get_origin(annotation) is Annotated:
        return parts_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [part for each in get_args(annotation) for part in parts_of(each)]
    return [annotation]


def kind_of(annotation: Any) -> str:
    """The words for a type.

    Example:
        >>> kind_of(float | None)
        'number, or none'
    """
    said = []
    for part in parts_of(annotation):
        if part is type(None):
            said.append("none")
        elif get_origin(part) is Literal:
            said.append("a word")
        else:
            said.append(KINDS.get(part) or str(part))
    return ", or ".join(dict.fromkeys(said))


def default_of(value: Any) -> str:
    """A default as it is typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`" if str(value) else "empty"


def allowed_of(annotation: Any, tries: Iterable[Callable[[str, Any], None]], field: str) -> str:
    """The values that are allowed: words, or a range."""
    parts = parts_of(annotation)
    words = [f"`{value}`" for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if words:
        return ", ".join(words)
    if bool in parts:
        return "`true`, `false`"
    numbers = [part for part in parts if part in (int, float)]
    if not numbers:
        return "any"
    for tried in tries:
        if (found := range_of(lambda value, tried=tried: _taken(tried, field, value), numbers[-1])) is not None:
            return found
    raise SystemExit(f"{field}: no range is found by trying. Say in docs/parameter_rows.py where its edges are.")


def _taken(tried: Callable[[str, Any], None], field: str, value: Any) -> bool:
    try:
        tried(field, value)
    except (TwinmergeError, ValueError):
        return False
    return True


def range_of(taken: Callable[[Any], bool], kind: type) -> str | None:
    """The numbers that are taken, in words; None where the least is no usual number.

    Example:
        >>> range_of(lambda x: 0 < x <= 1, float), range_of(lambda x: x >= 1, int), range_of(lambda x: True, float)
        ('above 0, to 1', '1 or more', 'any number')
        >>> range_of(lambda x: 0 <= x < 0.5, float), range_of(lambda x: 0 <= x <= 0.3, float)
        ('from 0, below 0.5', '0 to 0.3, with the other defaults')
    """
    whole = kind is int
    low = _least(taken, whole)
    if low is None:
        return None
    if taken(kind(10**6)):
        if not low:
            return "any whole number" if whole else "any number"
        return low if low.startswith("above") else f"{low} or more"
    high = _most(taken, whole)
    if not low:
        return high
    if low.startswith("above"):
        return f"{low}, {high}"
    return f"{low} {high}" if high.startswith("to") else f"from {low}, {high}"


def _least(taken: Callable[[Any], bool], whole: bool) -> str | None:
    """The least number that is taken, "" where there is none, None where it is no usual one."""
    if taken(-1000 if whole else -1000.0):
        return ""
    if whole:
        return next((str(number) for number in range(11) if taken(number)), None)
    if taken(0.0):
        return None if taken(-LITTLE) else "0"
    return "above 0" if taken(LITTLE) else None


def _most(taken: Callable[[Any], bool], whole: bool) -> str:
    """The largest number that is taken."""
    if not whole:
        for edge in (1.0, 0.5):
            if taken(edge - LITTLE) and not taken(edge + LITTLE):
                return f"to {edge:g}" if taken(edge) else f"below {edge:g}"
    good, bad = 0.0, 1e6  # such as a window that must fit beside another parameter
    while bad - good > (1 if whole else 1e-7):
        middle = (good + bad) // 2 if whole else (good + bad) / 2
        good, bad = (middle, bad) if taken(int(middle) if whole else middle) else (good, middle)
    return f"to {good:.4g}, with the other defaults"
