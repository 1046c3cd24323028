"""`twinmerge merge`: one set of weights out of many."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from twinmerge.cli.checked import print_checked
from twinmerge.cli.command import command
from twinmerge.cli.common import device_of, print_json, print_table, size
from twinmerge.cli.lines import said
from twinmerge.cli.merging import Beside, Described, Out, Output, RecipeFile, Running, recipe_of
from twinmerge.cli.named import default_scale
from twinmerge.errors import DataError, UsageError
from twinmerge.maths.threads import use_threads
from twinmerge.results import some

if TYPE_CHECKING:
    from twinmerge.engine.merge import Merge
    from twinmerge.recipes.recipe import Recipe


@command("merge")
def merge(
    described: Described,
    beside: Beside,
    running: Running,
    recipe: RecipeFile = None,
    out: Out = None,
    output: Output = None,
    smoke: Annotated[
        Path | None,
        typer.Option(
            "--smoke", metavar="FILE", help="Texts (.jsonl or .txt): show their loss under base, experts and result."
        ),
    ] = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Run a plan that `twinmerge check --plan` wrote.")
    ] = None,
) -> None:
    """Merge experts into one model folder that stock transformers loads.

    A merge that was interrupted or killed goes on where it stopped when the same command is run again.

    twinmerge merge RECIPE.yaml OUT

    twinmerge merge --method ties --base B --expert a=A --expert b=B2 -p density=0.2 -o OUT
    """
    from twinmerge.engine.merge import Merge
    from twinmerge.engine.merge_parts import merge_of

    use_threads(running.threads)
    if smoke is not None and not smoke.is_file():
        raise DataError(f"{smoke} is no file. Give --smoke a file of texts (.jsonl or .txt).")
    how: dict[str, Any] = {
        "architecture": smoke is not None,
        "device": device_of(running.device),
        "processes": True,
    }
    if plan is not None:
        if described.named or beside.named or out is not None:
            raise UsageError("A plan says all of a merge. Name its file and the output alone: --plan FILE -o FOLDER.")
        if recipe is not None and output is not None:
            raise UsageError(f"Two outputs are named, {recipe} and {output}. Name one.")
        merged, target = Merge.from_plan(plan, **how), output or recipe
    else:
        written = None if running.dry_run else running.intermediate_dir
        found, target = recipe_of(recipe, out, output, described, beside, written)
        merged = merge_of(found, **how)
    if smoke is not None and merged.recipe.by_names:
        raise UsageError("--smoke runs models, and by names alone no class is known to run. Leave one of them out.")
    if target is None and not running.dry_run:
        raise UsageError("No output is named. Add -o FOLDER.")
    if running.dry_run:
        print_checked(merged, target, running.json, "Nothing is written (--dry-run)", running.overwrite)
        return
    assert target is not None
    merged.save(target, shard_bytes=running.shard_bytes, overwrite=running.overwrite)
    _tell(merged, target)
    losses = None
    if smoke is not None:
        from twinmerge.study.smoke import smoke_check

        losses = smoke_check(target, merged, smoke)
        if not running.json:
            print_table(
                "Mean loss on the given texts",
                ["model", "loss", "texts"],
                [(r.model, f"{r.loss:.4f}", str(r.texts)) for r in losses],
            )
    said(_semantics(merged))
    if running.json:
        print_json({**merged.to_dict(), "smoke": [r._asdict() for r in losses] if losses else None})


def _tell(merged: Merge, target: Path) -> None:
    """What became of it."""
    report, found = merged.report, merged.check()
    assert report is not None
    said(f"Merged {found['merged_tensors']} tensors, {size(found['output_bytes'])} -> {target}")
    if report.changed:
        share = 100 * report.erased / report.changed
        said(f"Rounding put {share:.2g} % of the {report.changed} changed entries back to the base's value.")
    if kept := {name: names for name, names in found["heads"].items() if names}:
        said(f"Heads kept per expert in {target}/heads: {', '.join(kept)}")
    for name, names in found["ignored"].items():
        said(f"Ignored of {name}, as loading it does: {some(names)}")


def _semantics(merged: Merge) -> str:
    from twinmerge.recipes.recipe import SEMANTICS

    found = merged.recipe
    sums = ", with sums in float32 or wider" if found.semantics == "mergekit" else ""  # its own: in the models' dtype
    return f"{found.method}, by {SEMANTICS[found.semantics]}{sums}{_of_itself(found)}."


def _of_itself(recipe: Recipe) -> str:
    """What is said of a `scale` that nobody gave and that is not 1: the weights alone do not tell how much is added."""
    places = recipe.parameters, *(each.parameters for each in recipe.slices)
    return "" if any("scale" in given for given in places) else default_scale(recipe.method)
