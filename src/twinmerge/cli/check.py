"""`twinmerge check`: what a merge would do and take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.checked import print_checked
from twinmerge.cli.command import command
from twinmerge.cli.common import Base, Device, Experts, Heads, Json, Parameters, Threads, device_of
from twinmerge.cli.merge import (
    AllowPickle,
    ByNames,
    Depth,
    Dtype,
    MethodName,
    Out,
    Output,
    RandomSeed,
    RecipeFile,
    SideFiles,
    StatisticsFiles,
    Stochastic,
    Template,
    TokenizerSource,
    Weights,
    recipe_of,
    shard_bytes,
)
from twinmerge.maths.threads import use_threads

AS_MERGE = "As of `twinmerge merge`, whose line may be checked as it is; nothing is written."


@command("check")
def check(
    recipe: RecipeFile = None,
    out: Out = None,
    output: Output = None,
    method: MethodName = None,
    base: Base = None,
    expert: Experts = None,
    weight: Weights = None,
    parameter: Parameters = None,
    statistics: StatisticsFiles = None,
    head: Heads = None,
    dtype: Dtype = None,
    stochastic: Stochastic = None,
    lines: Depth = None,
    tokenizer: TokenizerSource = None,
    chat_template: Template = None,
    side_files_from: SideFiles = None,
    random_seed: RandomSeed = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Write down what would be done, for `twinmerge merge --plan`."),
    ] = None,
    by_names: ByNames = False,
    allow_pickle: AllowPickle = False,
    intermediate_dir: Annotated[Path | None, typer.Option("--intermediate-dir", help=AS_MERGE)] = None,
    shard_size: Annotated[str | None, typer.Option("--shard-size", metavar="BYTES", help=AS_MERGE)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="The output may be one that twinmerge wrote.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="As always here.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What a merge would do and take: names, shapes, ties, dtypes, disk, memory and time; no model is written.

    twinmerge check RECIPE.yaml OUT

    twinmerge check RECIPE.yaml --plan plan.json
    """
    from twinmerge.engine.merge_parts import merge_of

    use_threads(threads)
    described, target = recipe_of(
        *(recipe, out, output, method, base, expert, weight, parameter, statistics, head, dtype, stochastic, lines),
        beside=(tokenizer, chat_template, side_files_from),
        random_seed=random_seed,
        by_names=by_names,
        allow_pickle=allow_pickle,
    )
    shard_bytes(shard_size)
    merged = merge_of(described, device=device_of(device))
    if plan is not None:
        merged.write_plan(plan)
    print_checked(merged, target, json, "Nothing is written" if plan is None else f"The plan is in {plan}", overwrite)
