"""How help looks: commands and options stand in panels by what they are about, required options first, and beside an
option its values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from twinmerge.cli.command import PANELS

OPTIONS = {
    "Inputs": (
        *("--base", "--expert", "--weight", "--statistics", "--head", "--by-names", "--allow-pickle"),
        *("--data", "--file", "--suite", "--tasks", "--split", "--rows", "--limit", "--max-tokens", "--experts"),
        *("--smoke", "--plan", "--last"),
    ),
    "Method": (
        *("--method", "--parameter", "--lines", "--schedule", "--decay", "--k", "--min-overlap", "--grid"),
        *("--weightings", "--shared", "--rank", "--max-rank", "--energy", "--bytes", "--codec", "--weigh", "--scale"),
        *("--compress-first", "--by-norm", "--exact", "--labels", "--samples", "--block", "--steps", "--rate"),
        *("--top", "--oracle-biases", "--inputs", "--seeds", "--quick"),
    ),
    "Router and mixture": (
        *("--router", "--router-option", "--refuse", "--null", "--single-pass", "--mixture", "--normalize", "--soft"),
        *("--max-new-tokens", "--chat"),
    ),
    "Output": (
        *(
            "--output",
            "--out",
            "--into-card",
            "--dtype",
            "--stochastic",
            "--tokenizer",
            "--chat-template",
            "--side-files-from",
        ),
        *("--pad-to-multiple-of", "--drop-heads", "--lora", "--server", "--twin", "--picture", "--shard-size"),
        *("--intermediate-dir", "--overwrite", "--dry-run", "--private", "--revision", "--message", "--json", "--long"),
    ),
    "Machine and messages": ("--device", "--threads", "--batch", "--random-seed", "--seed", "--quiet", "--verbose"),
}
"""Panel -> the options in it, in order."""
LAST = list(OPTIONS)[-1]
PLACE = {option: (i, j) for i, names in enumerate(OPTIONS.values()) for j, option in enumerate(names)}
TYPES: dict[Any, str] = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}
ORDER = [name for names in PANELS.values() for name in names]
PANEL = {name: panel for panel, names in PANELS.items() for name in names}


class Command(TyperCommand):
    """A command whose options stand in panels."""

    def __init__(
        self, name: str | None, *, params: list[Any] | None = None, help: str | None = None, **rest: Any
    ) -> None:
        paragraphs = (help or "").split("\n\n")
        filled = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        super().__init__(name, params=in_panels(params or []), help=filled, **rest)

    def get_help_option(self, ctx: Any) -> Any:
        found = super().get_help_option(ctx)
        if isinstance(found, TyperOption):
            found.rich_help_panel, found.metavar = LAST, ""
        return found


class Group(TyperGroup):
    """A group of commands, whose flags have no type."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)
        for option in (each for each in found if isinstance(each, TyperOption) and each.is_flag):
            option.metavar = ""
        return found


class Root(Group):
    """All commands, in the order of their panels."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def _no_type(ctx: Any) -> str:
    """Of an argument its name says enough."""
    return ""


def in_panels(params: Sequence[Any]) -> list[Any]:
    """Arguments as they are, then options by panel, required ones first."""
    arguments = [each for each in params if isinstance(each, TyperArgument)]
    for argument in arguments:
        setattr(argument, "display_type_rich", _no_type)  # noqa: B010  an argument has no other way
        argument.metavar = argument.metavar or f"{argument.name.upper()}{'...' * (argument.nargs != 1)}"
    found: list[tuple[int, bool, int, TyperOption]] = []
    for option in (each for each in params if isinstance(each, TyperOption)):
        panel, place = PLACE[max(option.opts, key=len)]
        option.rich_help_panel = list(OPTIONS)[panel]
        option.metavar = "" if option.is_flag else option.metavar or TYPES.get(option.type_descriptor.annotation)
        found.append((panel, not option.required, place, option))
    return [*arguments, *(option for *_, option in sorted(found, key=lambda each: each[:3]))]
