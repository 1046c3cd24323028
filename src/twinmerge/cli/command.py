"""Which function is which command: said where the function is written. Every file of this folder is looked through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., Any])

GROUPS = {
    "recipe": "Recipes: a template, a check, what each tensor gets.",
    "twin": "One shared model, a small part per expert, mixed for every input.",
    "masks": "Many experts as one vector and a mask each, and one of them back.",
    "measure": "What Fisher and RegMean merging must know of each expert, from its data.",
    "lora": "LoRA adapters: many into one, or one out of a tuned model.",
    "continual": "Experts that come, and go, one by one: a state of constant size, and the merged model of now.",
}
"""First word of two -> what its commands have in common, in the order of the help."""
FIRST = (
    "merge",
    "check",
    "search",
    "verify",
    "push",
    "evaluate",
    "diff",
    "methods",
    "demo",
    "twin build",
    "twin predict",
)
"""What the help lists first; the others follow as their files are found."""
COMMANDS: dict[str, Callable[..., Any]] = {}
"""Words of a command -> its function."""


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
    return [*(words for words in FIRST if words in COMMANDS), *(words for words in COMMANDS if words not in FIRST)]
