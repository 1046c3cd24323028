"""Values of any shape are taken apart and put together again in their own classes."""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from twinmerge.models.nested import UnlikeError, leaves, mapped

Pair = namedtuple("Pair", "a b")


class Typed(NamedTuple):
    a: int
    b: int


class Subclass(dict[str, Any]):
    """With an attribute of its own."""

    note = ""


@dataclass(frozen=True, slots=True)
class Frozen:
    a: int
    b: int


@dataclass
class Made:
    a: int
    b: int = field(init=False)


def made() -> Made:
    found = Made(1)
    found.b = 2
    return found


def noted() -> Subclass:
    found = Subclass(a=1)
    found.note = "kept"
    return found


@pytest.mark.parametrize(
    "value",
    [
        3,
        (1, [2, (3,)]),
        [],
        Pair(1, 2),
        Typed(1, 2),
        torch.Size([1, 2]),
        {"a": {"b": 1}},
        OrderedDict(b=1, a=2),
        defaultdict(list, {"a": 1}),
        UserDict({"a": 1}),
        MappingProxyType({"a": 1}),
        noted(),
        Frozen(1, 2),
        made(),
        BaseModelOutput(last_hidden_state=4),
    ],
    ids=lambda value: type(value).__name__,
)
def test_classes_stay(value: Any) -> None:
    def more(path: str, found: Any) -> Any:
        return found[0] + found[1] if isinstance(found[0], int) else found[0]

    got = mapped([value, value], more)
    assert type(got) is type(value) and getattr(got, "note", "") == getattr(value, "note", "")
    assert [path for path, _ in leaves(got)] == [path for path, _ in leaves(value)]
    assert [v for _, v in leaves(got)] == [2 * v if isinstance(v, int) else v for _, v in leaves(value)]
    assert leaves(got) is not leaves(value)


@pytest.mark.parametrize(
    ("a", "b", "where"),
    [([1], (1,), ""), ({"x": [1]}, {"x": [1, 2]}, "['x']"), ({"x": 1}, {"y": 1}, ""), ([[1]], [1], "[0]")],
)
def test_values_of_other_structures_are_named(a: Any, b: Any, where: str) -> None:
    with pytest.raises(UnlikeError) as found:
        mapped([a, b], lambda path, each: each[0])
    assert str(found.value) == where
