"""How recipes of mergekit, and other names in our own, say a method: data that stands beside the method it is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Number:
    """A parameter that is a number. field: its name here; default: mergekit's, None where it must be given; least,
    most: what lesser and greater numbers count as, None where they are what they are; usual: where it mostly lies,
    though mergekit takes others as they are.

    Example:
        >>> Number("density", 1.0, least=0.0, most=1.0).counted(1.5)
        1.0
    """

    field: str
    default: float | None = None
    least: float | None = None
    most: float | None = None
    usual: tuple[float, float] | None = None

    def counted(self, value: float) -> float:
        """What a number counts as."""
        low = value if self.least is None else max(value, self.least)
        return low if self.most is None else min(low, self.most)

    def told(self, value: float) -> str:
        """What is to be said of a number, if anything."""
        if (counts := self.counted(value)) != value:
            return f"{value:g} counts as {counts:g}, as by mergekit"
        if self.usual is not None and not self.usual[0] <= value <= self.usual[1]:
            return f"{value:g} is not between {self.usual[0]:g} and {self.usual[1]:g}: it goes on past the models"
        return ""


@dataclass(frozen=True)
class Switch:
    """A parameter that is true or false. field: its name here, None where false changes nothing; on, off: its values
    here; default: mergekit's; refused: what is said where it is true and no method here does that."""

    field: str | None
    on: Any = True
    off: Any = False
    default: bool = False
    refused: str = ""

    def of(self, on: bool) -> Any:
        """The value here."""
        return self.on if on else self.off


@dataclass(frozen=True)
class Dialect:
    """How mergekit says a method.

    own: parameters that each model may have, by mergekit's names; shared: those that all models share; fixed:
    parameters here that the method of mergekit has always so; idle: parameters that it has and that change nothing;
    refuse: number of models, and whether there is a base_model -> why mergekit takes no such recipe, or None.

    Example:
        >>> Dialect(own={"weight": Number("weights")}, shared={"lambda": Number("scale", 1.0)}).shared["lambda"].field
        'scale'
    """

    own: Mapping[str, Number] = field(default_factory=dict)
    shared: Mapping[str, Number | Switch] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset({"int8_mask"})
    refuse: Callable[[int, bool], str | None] = lambda count, based: None


def theirs(dialects: Mapping[str, Dialect], method: str, key: str) -> tuple[str, str]:
    """What mergekit calls a method and one of its parameters, for messages; ours where it has no name for it.

    Example:
        >>> theirs({"linear": Dialect(own={"weight": Number("weights")})}, "average", "weights")
        ('linear', 'weight')
        >>> theirs({}, "average", "weights")
        ('average', 'weights')
    """
    for name, dialect in dialects.items():
        for written, said in [*dialect.own.items(), *dialect.shared.items()]:
            if said.field == key:
                return name, written
    return method, key


def base_and_one(method: str) -> Callable[[int, bool], str | None]:
    """`Dialect.refuse` of a method of mergekit that goes from its base_model to one other model.

    Example:
        >>> base_and_one("slerp")(2, True) is None
        True
        >>> base_and_one("slerp")(2, False)
        'slerp goes from base_model to one other model, got 2 models and no base_model. Name one of two as base_model.'
    """

    def refuse(count: int, based: bool) -> str | None:
        if count == 2 and based:
            return None
        return (
            f"{method} goes from base_model to one other model, got {count} models and {'a' if based else 'no'} "
            "base_model. Name one of two as base_model."
        )

    return refuse


SHARE = Number("density", 1.0, least=0.0, most=1.0)
"""A density: from 1 on nothing is left out, up to 0 everything."""

COIN = Number("density", 1.0, most=1.0)
"""A density that a coin keeps by: a negative one has no meaning."""

SPELLINGS: Mapping[str, Number | Switch] = {"weight": Number("weights"), "lambda": Number("scale")}
"""Other names that recipes of ours may have for parameters of any method."""
