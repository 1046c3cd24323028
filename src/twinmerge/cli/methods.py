"""`twinmerge methods`: what there is, and what each method is."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from twinmerge.cli.common import Json, print_json, print_table


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full.")] = None, json: Json = False
) -> None:
    """List the static methods with their papers, or show one: formula, parameters, defaults."""
    from twinmerge.methods.registry import method_class, method_names

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
                    "parameters": {
                        f: {"default": i.default, "about": i.description} for f, i in c.model_fields.items()
                    },
                }
                for n, c in classes.items()
            }
        )
        return
    if name is None:
        rows = [
            (n, (inspect.getdoc(c) or "").split("\n\n")[0].replace("\n", " "), ", ".join(c.model_fields), c.paper)
            for n, c in classes.items()
        ]
        print_table("Static methods", ["method", "rule", "parameters", "paper"], rows)
        return
    found = classes[name]
    typer.echo(f"{name}\n\n{(inspect.getdoc(found) or '').split('Example:')[0].strip()}\n")
    lines = [(f, str(i.default), i.description or "") for f, i in found.model_fields.items()]
    print_table("Parameters", ["name", "default", "meaning"], lines)
