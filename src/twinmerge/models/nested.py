"""Arguments and answers of any shape: what lies in tuples, lists, mappings and dataclasses, place by place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any


class UnlikeError(Exception):
    """Values whose containers are of other classes, or hold other keys."""


def mapped(values: Sequence[Any], of: Callable[[str, Sequence[Any]], Any], path: str = "") -> Any:
    """One value of the structure that several share, by what `of` makes of each place in it.

    Args:
        values: at least one.
        of: is given the path of a place, and what each value has there.
        path: of the values themselves.

    Raises:
        UnlikeError: they do not share a structure; it says where.

    Example:
        >>> mapped([{"a": (1, 2)}, {"a": (3, 4)}], lambda path, found: f"{path}: {found}")
        {'a': ("['a'][0]: [1, 3]", "['a'][1]: [2, 4]")}
    """
    first = values[0]
    if (keys := _keys(first)) is None:
        return of(path, values)
    for other in values[1:]:
        theirs = _keys(other)
        if type(other) is not type(first) or theirs is None or set(theirs) != set(keys):
            raise UnlikeError(path)
    return _rebuilt(first, {key: mapped([_at(v, key) for v in values], of, f"{path}[{key!r}]") for key in keys})


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of each place.

    Example:
        >>> list(leaves([1, {"a": None}]))
        [('[0]', 1), ("[1]['a']", None)]
    """
    if (keys := _keys(value)) is None:
        yield path, value
    else:
        for key in keys:
            yield from leaves(_at(value, key), f"{path}[{key!r}]")


def _keys(value: Any) -> Collection[Any] | None:
    if isinstance(value, Mapping):
        return list(value)
    if isinstance(value, (tuple, list)):
        return range(len(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [field.name for field in fields(value)]
    return None


def _at(value: Any, key: Any) -> Any:
    return value[key] if isinstance(value, (Mapping, tuple, list)) else getattr(value, key)


def _rebuilt(first: Any, parts: dict[Any, Any]) -> Any:
    """A value of the class of the first, with these parts."""
    kind: Any = type(first)
    if isinstance(first, (tuple, list)):
        own = list(parts.values())
        return kind(*own) if hasattr(first, "_fields") else kind(own)
    if isinstance(first, Mapping) and not isinstance(first, MutableMapping):
        return kind(parts)
    made = copy.copy(first)
    for key, part in parts.items():
        if isinstance(made, MutableMapping):
            made[key] = part
        else:
            object.__setattr__(made, key, part)  # a dataclass may be frozen
    return made
