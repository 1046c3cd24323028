"""`twinmerge check`: what a merge would do and take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.checked import print_checked
from twinmerge.cli.command import command
from twinmerge.cli.common import device_of
from twinmerge.cli.merging import Beside, Described, Out, Output, RecipeFile, Running, recipe_of
from twinmerge.maths.threads import use_threads


@command("check")
def check(
    described: Described,
    beside: Beside,
    running: Running,
    recipe: RecipeFile = None,
    out: Out = None,
    output: Output = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Write down what would be done, for `twinmerge merge --plan`."),
    ] = None,
) -> None:
    """Show what a merge would do and take: tensors, dtypes, disk, memory and time. No model is written.

    It takes any line of `twinmerge merge` as it is.

    twinmerge check RECIPE.yaml OUT

    twinmerge check RECIPE.yaml --plan plan.json
    """
    from twinmerge.engine.merge_parts import merge_of

    use_threads(running.threads)
    found, target = recipe_of(recipe, out, output, described, beside)
    _ = running.shard_bytes  # refused here as it would be there
    merged = merge_of(found, device=device_of(running.device))
    if plan is not None:
        merged.write_plan(plan)
    title = "Nothing is written" if plan is None else f"The plan is in {plan}"
    print_checked(merged, target, running.json, title, running.overwrite)
