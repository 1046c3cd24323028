"""`twinmerge methods`: what there is, and what each method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args

import typer

from twinmerge.cli import complete
from twinmerge.cli.command import command
from twinmerge.cli.common import Json, print_json, print_table
from twinmerge.cli.lines import tell, tell_class
from twinmerge.cli.named import meant


@command("methods")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", autocompletion=complete.methods)] = None,
    json: Json = False,
) -> None:
    """List the static methods by group: cost, needs, where they are strong; or show one: formula, parameters."""
    from twinmerge.methods.kit.listing import list_methods
    from twinmerge.methods.kit.registry import method_class

    if name is not None:
        name = meant(name)
    found = list_methods(name)
    if json:
        print_json(found.to_dict())
        return
    if name is None:
        _list(found)
        return
    about = found[name]
    tell_class(name, method_class(name))
    tell(
        f"Needs: {', '.join(about['needs']) or 'the models alone'}. Gives: {_gives(about)}. Takes: {about['cost'] or '?'}. Paper: "
        f"{about['paper']}.\n"
    )
    lines = [(f, str(parameter["default"]), _meaning(parameter)) for f, parameter in about["parameters"].items()]
    print_table("Parameters", ["name", "default", "meaning"], lines)


def _list(found: Mapping[str, Mapping[str, Any]]) -> None:
    """All of them by what they have in common, within 80 columns."""
    from twinmerge.methods.kit.base import Group

    for group in get_args(Group):
        rows = {name: about for name, about in found.items() if about["group"] == group}
        if rows:
            typer.echo(f"{group}")
        for name, about in rows.items():
            needs = ", ".join(each.removesuffix(" statistics") for each in about["needs"]) or "–"
            room = min(18, 24 - len(needs))  # both together have 25 columns
            typer.echo(f"  {name:<19} {about['cost'] or '?':<{room}} {needs:<6} {about['strong']}".rstrip())
    tell(
        "\nAfter the name: what it takes (a read: all models once), what it needs beside the experts, and where it is "
        "strong, by its paper or its formula. Formula and parameters of one: twinmerge methods NAME"
    )


def _meaning(parameter: Mapping[str, Any]) -> str:
    """What a parameter is for, and the values that it may have where they are a closed list."""
    closed = f"({', '.join(parameter['choices'])})" if "choices" in parameter else ""
    return " ".join(filter(None, (parameter["about"], closed)))


def _gives(about: Mapping[str, Any]) -> str:
    return f"{about['outputs']}, also over time" if about["over_time"] else str(about["outputs"])
