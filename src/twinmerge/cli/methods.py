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
    name: Annotated[
        str | None, typer.Argument(help="One method: its formula and parameters.", autocompletion=complete.methods)
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="Show sources and laws of all methods as well.")] = False,
    json: Json = False,
) -> None:
    """List the methods by group: cost, data needed, share kept, where each is strong; or show one in full.

    twinmerge methods

    twinmerge methods ties
    """
    from twinmerge.methods.kit.listing import list_methods
    from twinmerge.methods.kit.registry import method_class

    if name is not None:
        name = meant(name)
    found = list_methods(name)
    if json:
        print_json(found.to_dict())
        return
    if name is None:
        _list(found, long)
        return
    about = found[name]
    tell_class(name, method_class(name))
    kept = "" if about["score"] is None else f" Kept: {about['score']} % of eight text experts (docs/quality.md)."
    takes = f" Takes: {about['cost']}." if about["cost"] else ""
    tell(
        f"Needs: {', '.join(about['needs']) or 'the models alone'}. Gives: {_gives(about)}."
        f"{takes}{kept} Paper: {about['paper']}.\n"
    )
    lines = [
        (f, str(parameter["default"]), parameter["values"], str(parameter["about"] or ""))
        for f, parameter in about["parameters"].items()
    ]
    print_table("Parameters (-p NAME=VALUE)", ["name", "default", "values", "meaning"], lines)


COLUMNS = (19, 15, 4, 4)  # name, cost, needs, kept; where it is strong has the other 33 of 80


def _list(found: Mapping[str, Mapping[str, Any]], long: bool) -> None:
    """All of them by what they have in common, a line each, within 80 columns."""
    from twinmerge.methods.kit.base import Group
    from twinmerge.methods.kit.listing import source_of

    typer.echo(_line("method", "cost", "needs", "kept", "strong for").replace("needs  kept", "needs kept"))
    for group in get_args(Group):
        rows = {name: about for name, about in found.items() if about["group"] == group}
        if rows:
            typer.echo(f"{group[0].upper()}{group[1:]}")
        for name, about in rows.items():
            needs = " ".join(each.removesuffix(" statistics") for each in about["needs"]) or "–"
            kept = "" if about["score"] is None else f"{about['score']:.1f}"
            typer.echo(_line(name, about["cost"] or "?", needs, kept, about["strong"]))
            if long:
                laws = f" Laws: {', '.join(about['laws'])}." if about["laws"] else ""
                tell(f"    {str(source_of(name) or '').rstrip('.')}.{laws}")
    tell(
        "\ncost: how often all models are read, or what is decomposed. needs: beside the experts, the base, or "
        "statistics by `twinmerge measure`. kept: per cent of eight text experts' scores (docs/quality.md; of masks, with the task given). "
        "One method: twinmerge methods NAME. Sources and laws: --long."
    )


def _line(name: str, cost: str, needs: str, kept: str, strong: str) -> str:
    """One line of the list; a long need takes room from a short cost.

    Example:
        >>> print(_line("fisher_deltas", "one read", "base fisher", "", "different tasks"))
         fisher_deltas       one read base fisher      different tasks
    """
    first, second, third, fourth = COLUMNS
    room = second + 1 + third
    both = f"{cost:<{min(second, room - len(needs) - 1)}} {needs}"
    return f" {name:<{first}} {both:<{room}} {kept:>{fourth}} {strong}".rstrip()


def _gives(about: Mapping[str, Any]) -> str:
    return f"{about['outputs']}, also over time" if about["over_time"] else str(about["outputs"])
