"""`twinmerge twin routers`: what there is, and what each router is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, print_json, print_table
from twinmerge.cli.lines import tell, tell_class

if TYPE_CHECKING:
    from twinmerge.twin.routers.kit.base import Router


@command("twin routers")
def routers(
    name: Annotated[str | None, typer.Argument(help="One router: its formula and options.")] = None, json: Json = False
) -> None:
    """List the routers of a twin, or show one: formula, options, defaults.

    twinmerge twin routers knn
    """
    from twinmerge.twin.routers.kit.listing import list_routers
    from twinmerge.twin.routers.kit.registry import router_class

    listed = list_routers(name)
    if json:
        print_json(listed.to_dict())
        return
    classes = {n: router_class(n) for n in listed}
    if name is None:
        rows = [(n, _needs(c), ", ".join(listed[n]["options"]) or "–", _first_line(c)) for n, c in classes.items()]
        print_table("Routers", ["router", "needs", "options", "what it is"], rows)
        tell("Formula and options of one: twinmerge twin routers NAME")
        return
    found = classes[name]
    tell_class(name, found)
    tell(f"Needs: {_needs(found)}. Experts come and go without a new fit: {'yes' if _stays(found) else 'no'}.\n")
    lines = [(o, str(option["default"]), str(option["about"] or "")) for o, option in listed[name]["options"].items()]
    if lines:
        print_table("Options (--router-option NAME=VALUE)", ["name", "default", "meaning"], lines)
    else:
        tell("It has no options.")


def _needs(router: type[Router]) -> str:
    return "inputs" if router.needs_inputs else "nothing"


def _stays(router: type[Router]) -> bool:
    """A router of aggregates is made anew of them, one of the experts of those that are there."""
    return router.keeps_statistics or not router.needs_inputs


def _first_line(router: type[Router]) -> str:
    return (inspect.getdoc(router) or "").partition("\n")[0]
