"""`twinmerge compress` and `twinmerge extract`: many experts as one vector and a mask each, and one of them back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    folder_bytes,
    pairs,
    print_json,
    print_table,
    said,
    size,
    values,
)
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.recipes.recipe import Recipe
    from twinmerge.study.thresholds import Chosen
    from twinmerge.twin.masks.build import Compressed


def compress(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    method: Annotated[
        str, typer.Option("--method", help="tall_masks, or emr, which has nothing to choose.")
    ] = "tall_masks",
    base: Base = None,
    expert: Experts = None,
    parameter: Parameters = None,
    head: Heads = None,
    suite: Annotated[
        Path | None,
        typer.Option("--suite", help="A suite whose tasks are the experts: it chooses each task's threshold."),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Which rows of the suite; never those for testing.")
    ] = "validation",
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most so many rows per task.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --rows.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw how many tasks need a weight (.png, .svg, .pdf)."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Keep many experts in little more than two models: the base, one vector, and a bit for each weight and expert.

    twinmerge compress --method tall_masks --base B --expert a=A --expert b=B2 -p threshold=0.4 -p b.threshold=0.5 -o OUT

    twinmerge compress --base B --expert a=A --expert b=B2 --suite DIR --split validation -o OUT
    """
    from twinmerge.recipes.recipe import Recipe
    from twinmerge.store.output import OutputFolder
    from twinmerge.twin.masks.build import compress as run

    use_threads(threads)
    OutputFolder(output).check()
    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that the experts were tuned from.")
    if picture is not None:
        from twinmerge.study.heatmap import check_picture

        check_picture(picture)
    recipe = Recipe(method, base, pairs(expert, "--expert"), values(parameter, "-p"), heads=tuple(head or ()))
    about: dict[str, dict[str, str]] = {}
    chosen: Chosen | None = None
    if suite is not None:
        recipe, chosen, about = _chosen(recipe, suite, split, rows, seed)
    found = run(recipe, output, about)
    if picture is not None:
        from twinmerge.study.mask_shares import draw_shares

        draw_shares(
            {f"{method} of {', '.join(found.experts)}": found.marks}, "Weights by how many tasks need them", picture
        )
    if json:
        scores = (
            None if chosen is None else {t: {f"{c:g}": s for c, s in by.items()} for t, by in chosen.scores.items()}
        )
        print_json({"output": str(output), "bytes": folder_bytes(output), **found.told(), "scores": scores})
        return
    _tell(found, chosen)


def extract(
    folder: Annotated[Path, typer.Argument(help="A folder that `twinmerge compress` wrote.")],
    task: Annotated[str, typer.Argument(help="The expert that is wanted.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write one expert out of masks as a plain model in its own class, with its head.

    twinmerge extract OUT a -o A2
    """
    from twinmerge.twin.masks.extract import extract as run

    use_threads(threads)
    run(folder, task, output)
    if json:
        print_json({"output": str(output), "bytes": folder_bytes(output)})
    else:
        said(f"Extracted {task}, {size(folder_bytes(output))} -> {output}")


def _chosen(
    recipe: Recipe, suite: Path, split: str, rows: int | None, seed: int
) -> tuple[Recipe, Chosen, dict[str, dict[str, str]]]:
    """The recipe with the best threshold for each task, how it was found, and what the heads' tasks are."""
    from dataclasses import replace

    from twinmerge.study.thresholds import choose_thresholds
    from twinmerge.tasks.suite import open_suite

    if any(name.rpartition(".")[2] == "threshold" for name in recipe.parameters):
        raise UsageError("Both --suite and -p threshold are given. Leave out one of them.")
    tasks = open_suite(suite, list(recipe.experts))
    chosen = choose_thresholds(recipe, tasks, split=split, limit=rows, seed=seed)
    own = {f"{task}.threshold": threshold for task, threshold in chosen.thresholds.items()}
    about = {name: {"task": name, "metric": task.metric} for name, task in tasks.items()}
    return replace(recipe, parameters={**recipe.parameters, **own}), chosen, about


def _tell(found: Compressed, chosen: Chosen | None) -> None:
    if chosen is not None:
        grid = list(next(iter(chosen.scores.values())))
        best = chosen.thresholds
        lines = [
            [task, *[f"{100 * by[c]:.1f}" + (" *" if c == best[task] else "") for c in grid]]
            for task, by in chosen.scores.items()
        ]
        print_table(f"Scores on {chosen.split}, {chosen.rows} rows; * chosen", ["task", *map(str, grid)], lines)
    densities, marks = found.marks.densities(), found.marks
    columns = ["task", *(["threshold"] if found.thresholds else ["scale"]), "weights in its mask"]
    numbers = found.thresholds or found.scales
    lines = [
        [task, f"{number:.3g}", f"{100 * share:.1f} %"]
        for task, number, share in zip(found.experts, numbers, densities, strict=True)
    ]
    print_table("", columns, lines)
    share = {name: 100 * value for name, value in marks.shares().items()}
    said(
        f"Of the {marks.moved} weights that the vector moves, {share['catastrophic']:.1f} % are needed by no task, "
        f"{share['selfish']:.1f} % by one, {share['all']:.1f} % by all {len(found.experts)}."
    )
    said(
        f"{size(folder_bytes(found.folder))} on the disk, heads and tokenizer included; by the formula {size(found.formula('masks'))}, "
        f"against {size(found.formula('fine_tuned'))} of {len(found.experts)} models -> {found.folder}"
    )
