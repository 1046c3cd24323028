"""`twinmerge methods`: what there is, and what each method is."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.common import Json, print_json, print_table

if TYPE_CHECKING:
    from twinmerge.methods.kit.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None, json: Json = False
) -> None:
    """List the static methods with their papers, or show one: formula, parameters, defaults."""
    from twinmerge.methods.kit.registry import method_class, method_names

    names = [name] if name else method_names()
    classes = {n: method_class(n) for n in names}
    if json:
        print_json(
            {
                n: {
                    "paper": c.paper,
                    "space": c.space,
                    "grain": c.grain,
                    "laws": sorted(c.laws),
                    "needs": _needs(c),
                    "outputs": c.outputs,
                    "over_time": _over_time(c),
                    "parameters": {
                        f: {"default": i.default, "about": i.description} for f, i in c.model_fields.items()
                    },
                }
                for n, c in classes.items()
            }
        )
        return
    if name is None:
        rows = [(n, ", ".join(_needs(c)), _gives(c), c.paper) for n, c in classes.items()]
        print_table("Static methods", ["method", "needs", "gives", "paper"], rows)
        typer.echo("Formula and parameters of one: twinmerge methods NAME")
        return
    found = classes[name]
    typer.echo(f"{name}\n\n{(inspect.getdoc(found) or '').split('Example:')[0].strip()}\n")
    typer.echo(f"Needs: {', '.join(_needs(found))}. Gives: {_gives(found)}. Paper: {found.paper}.\n")
    lines = [(f, str(i.default), i.description or "") for f, i in found.model_fields.items()]
    print_table("Parameters", ["name", "default", "meaning"], lines)


def _needs(method: type[Method]) -> list[str]:
    """What it reads besides the experts' weights."""
    return ["base"] * (method.space == "deltas") + [f"{need} statistics" for need in method.needs]


def _gives(method: type[Method]) -> str:
    return f"{method.outputs}, also over time" if _over_time(method) else method.outputs


def _over_time(method: type[Method]) -> str | None:
    """How it takes experts one by one, for `twinmerge continual`: "sum" in any order, "order", or not at all."""
    from twinmerge.methods.kit.fold import Fold

    if not issubclass(method, Fold):
        return None
    return "sum" if method.keeps_sums else "order"
