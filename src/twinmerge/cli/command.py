"""Which function is which command: said where the function is written. Every file of this folder is looked through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cache, wraps
from typing import Any, TypeVar, get_type_hints

from twinmerge.cli.messages import Messages, messages


class Interrupted(BaseException):
    """Somebody stopped the command; its arguments say what is left on the disk."""


C = TypeVar("C", bound=Callable[..., Any])
T = TypeVar("T")

GROUPS = {
    "recipe": "Recipes: write a template, check one, see what each tensor gets.",
    "twin": "Twins: one shared model, a small part per expert, mixed for every input.",
    "masks": "Many experts as one vector and a mask each, and one of them back.",
    "measure": "Take the statistics that Fisher and RegMean merging need, from data.",
    "lora": "LoRA adapters: merge many into one, or take one out of a tuned model.",
    "continual": "Add and remove experts one by one, in a state of constant size.",
}
"""First word of two -> what its commands have in common."""
PANELS = {
    "Merge": ("merge", "check", "recipe", "search", "lora", "checkpoints", "transplant", "continual"),
    "Mix for every input": ("twin", "masks"),
    "Data and statistics": ("measure", "evaluate"),
    "Look and check": ("methods", "diff", "verify", "demo"),
    "Share": ("push",),
}
"""Panel of the help -> the commands and groups in it, in order."""
FIRST = ("twin build", "twin predict")
"""What the help of a group lists first; the others follow as their files are found."""
COMMANDS: dict[str, Callable[..., Any]] = {}
"""Words of a command -> its function."""
OPTIONS: set[type[Any]] = {Messages}
"""Classes whose fields are options."""


def command(words: str) -> Callable[[C], C]:
    """The function below is the command of these words.

    Args:
        words: such as "merge", or "masks build" of a group.

    Example:
        >>> COMMANDS["masks build"].__module__
        'twinmerge.cli.masks'
    """

    def register(function: C) -> C:
        assert " " not in words or words.partition(" ")[0] in GROUPS, f"{words} is of no group"
        assert COMMANDS.setdefault(words, function) is function, f"{words} is two commands"
        return function

    return register


def in_order() -> list[str]:
    """The words of all commands, as the help lists them."""
    top = [words for panel in PANELS.values() for words in panel if words in COMMANDS]
    first = [words for words in FIRST if words in COMMANDS]
    return [*top, *first, *(words for words in COMMANDS if words not in (*top, *first))]


def options(cls: type[T]) -> type[T]:
    """The dataclass below is options that several commands have: a command takes one object of it, and the command
    line each of its fields."""
    OPTIONS.add(cls)
    return cls


def on_the_line(function: Callable[..., Any]) -> Callable[..., None]:
    """The function as a command line calls it: the fields of its `options` as arguments of their own, and what says
    how much is told, which all commands have."""
    signature = inspect.signature(function, eval_str=True)
    groups = {name: p.annotation for name, p in signature.parameters.items() if p.annotation in OPTIONS}
    taken: dict[str, tuple[str, ...]] = {}
    found: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name in groups:
            own = _parameters(groups[name])
            taken[name] = tuple(each.name for each in own)
            found += own
        else:
            found.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
    said = _parameters(Messages)

    @wraps(function)
    def run(**given: Any) -> None:
        told: AbstractContextManager[None] = messages(Messages(**{each.name: given.pop(each.name) for each in said}))
        made = {name: groups[name](**{each: given.pop(each) for each in taken[name]}) for name in groups}
        try:
            with told:
                function(**given, **made)
        except KeyboardInterrupt as error:  # of which typer would make a number
            raise Interrupted(*getattr(error, "__notes__", ())) from error

    setattr(run, "__signature__", inspect.Signature([*found, *said]))  # noqa: B010  typer asks for it
    run.__annotations__ = {each.name: each.annotation for each in [*found, *said]}
    return run


@cache
def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    kinds = get_type_hints(cls, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
        )
        for field in fields(cls)
    ]
