"""`twinmerge methods`: what there is, and what each method is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from twinmerge.cli import complete
from twinmerge.cli.command import command
from twinmerge.cli.common import Json, print_json, print_table
from twinmerge.cli.lines import tell, tell_class


@command("methods")
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", autocompletion=complete.methods)] = None,
    json: Json = False,
) -> None:
    """List the static methods with their papers, or show one: formula, parameters, defaults."""
    from twinmerge.methods.kit.listing import list_methods
    from twinmerge.methods.kit.registry import method_class

    found = list_methods(name)
    if json:
        print_json(found.to_dict())
        return
    if name is None:
        rows = [(n, ", ".join(about["needs"]), _gives(about), about["paper"]) for n, about in found.items()]
        print_table("Static methods", ["method", "needs", "gives", "paper"], rows)
        tell("Formula and parameters of one: twinmerge methods NAME")
        return
    about = found[name]
    tell_class(name, method_class(name))
    tell(f"Needs: {', '.join(about['needs'])}. Gives: {_gives(about)}. Paper: {about['paper']}.\n")
    lines = [(f, str(parameter["default"]), parameter["about"] or "") for f, parameter in about["parameters"].items()]
    print_table("Parameters", ["name", "default", "meaning"], lines)


def _gives(about: Mapping[str, Any]) -> str:
    return f"{about['outputs']}, also over time" if about["over_time"] else str(about["outputs"])
