"""`twinmerge merge`: one set of weights out of many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    numbers,
    pairs,
    print_json,
    print_table,
    said,
    size,
    use_threads,
    values,
)
from twinmerge.errors import TwinmergeError


def merge(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe in YAML (mergekit's schema).")] = None,
    out: Annotated[Path | None, typer.Argument(help="The folder to write.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write.")] = None,
    method: Annotated[str | None, typer.Option("--method", help="See `twinmerge methods`.")] = None,
    base: Base = None,
    expert: Experts = None,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", metavar="NAME=NUMBER", help="An expert's weight.")
    ] = None,
    parameter: Parameters = None,
    head: Heads = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the output: float32, bfloat16, float16.")] = None,
    smoke: Annotated[
        Path | None,
        typer.Option("--smoke", help="Texts (.jsonl or .txt): print their loss under base, experts and result."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Merge experts into one model folder that stock transformers loads.

    twinmerge merge RECIPE.yaml OUT

    twinmerge merge --method ties --base B --expert a=A --expert b=B2 -p density=0.2 -o OUT
    """
    from twinmerge.engine.merge import Merge
    from twinmerge.engine.recipe import Recipe, read_recipe
    from twinmerge.store.output import OutputFolder

    use_threads(threads)
    if method is not None and recipe is not None and out is None:
        recipe, out = None, recipe  # `twinmerge merge --method … OUT`
    if out is not None and output is not None:
        raise TwinmergeError(f"Two outputs are named, {out} and {output}. Name one.")
    if smoke is not None and not smoke.is_file():
        raise TwinmergeError(f"{smoke} is no file. Give --smoke a file of texts (.jsonl or .txt).")
    target = output or out
    if method is not None:
        if recipe is not None:
            raise TwinmergeError(
                "A recipe file and --method are both given. Put everything into the recipe, or use options."
            )
        parameters = values(parameter, "-p")
        parameters |= {f"{name}.weights": number for name, number in numbers(weight, "--weight").items()}
        described = Recipe(method, base, pairs(expert, "--expert"), parameters, dtype, tuple(head or ()))
    elif recipe is not None:
        if expert or base or weight or parameter or head or dtype:
            raise TwinmergeError(
                "A recipe file and options are both given. Put everything into the recipe, or use --method."
            )
        described = read_recipe(recipe)
    else:
        raise TwinmergeError("Nothing to merge. Name a recipe file, or --method with --base and --expert.")
    if target is None and not dry_run:
        raise TwinmergeError("No output is named. Add -o FOLDER.")
    merged = Merge(described)
    check = merged.check()
    if dry_run:
        if target is not None:
            OutputFolder(target, check["output_bytes"]).check()
        if json:
            print_json(check)
        else:
            rows = [(key, _short(value)) for key, value in check.items()]
            print_table("Nothing is written (--dry-run)", ["what", "value"], rows)
        return
    assert target is not None
    merged.save(target)
    said(f"Merged {check['merged_tensors']} tensors, {size(check['output_bytes'])} -> {target}")
    if kept := {name: names for name, names in check["heads"].items() if names}:
        said(f"Heads kept per expert in {target}/heads: {', '.join(kept)}")
    losses = None
    if smoke is not None:
        from twinmerge.study.smoke import smoke_check

        losses = smoke_check(target, merged, smoke)
        if not json:
            print_table(
                "Mean loss on the given texts",
                ["model", "loss", "texts"],
                [(r.model, f"{r.loss:.4f}", str(r.texts)) for r in losses],
            )
    if json:
        print_json({**check, "output": str(target), "smoke": [r._asdict() for r in losses] if losses else None})


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {len(v) if isinstance(v, (list, dict)) else v}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return f"{len(value)}: {', '.join(map(str, value[:3]))}{' …' if len(value) > 3 else ''}" if value else "none"
    return str(value)
