"""`twinmerge check`: what a merge would do and take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.checked import print_checked
from twinmerge.cli.command import command
from twinmerge.cli.common import Base, Experts, Heads, Json, Parameters, Threads
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
)
from twinmerge.maths.threads import use_threads


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
    merged = merge_of(described)
    if plan is not None:
        merged.write_plan(plan)
    print_checked(merged, target, json, "Nothing is written" if plan is None else f"The plan is in {plan}")
