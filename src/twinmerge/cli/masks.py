"""`twinmerge masks`: many experts as one vector and a mask each, and one of them back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import (
    Base,
    Experts,
    Heads,
    Json,
    Parameters,
    Threads,
    pairs,
    parameters_for,
    print_json,
    print_table,
    said,
    size,
)
from twinmerge.cli.complete import of_masks
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads
from twinmerge.results import bytes_of

if TYPE_CHECKING:
    from twinmerge.twin.masks.results import BuiltMasks


@command("masks build")
def build(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How masks are made: tall_masks, or emr, which has no parameters.",
            autocompletion=of_masks,
        ),
    ] = "tall_masks",
    base: Base = None,
    expert: Experts = None,
    parameter: Parameters = None,
    head: Heads = None,
    suite: Annotated[
        Path | None,
        typer.Option(
            "--suite", metavar="FOLDER", help="A suite whose tasks are the experts: it chooses the threshold of each."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Rows of the suite that decide; a test split is refused.")
    ] = "validation",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use at most so many rows of each task, drawn at random.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for drawing the rows of --limit.")] = 0,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw how many tasks need each weight (.png, .svg or .pdf)."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Keep many experts in little more than two models: the base, one vector, and a bit for each weight and expert.

    twinmerge masks build --method tall_masks --base B --expert a=A --expert b=B2 -p threshold=0.4 -p b.threshold=0.5
    -o OUT

    twinmerge masks build --base B --expert a=A --expert b=B2 --suite DIR --split validation -o OUT
    """
    from twinmerge.store.output import OutputFolder
    from twinmerge.study.masks import build_masks

    use_threads(threads)
    OutputFolder(output).check()
    if base is None:
        raise UsageError("No base is named. Add --base MODEL, the model that the experts were tuned from.")
    if picture is not None:
        from twinmerge.study.heatmap import check_picture

        check_picture(picture)
    found = build_masks(
        method,
        base,
        pairs(expert, "--expert"),
        output,
        heads=tuple(head or ()),
        suite=suite,
        split=split,
        limit=limit,
        seed=seed,
        **parameters_for(build_masks, parameter),
    )
    if picture is not None:
        from twinmerge.study.mask_shares import draw_shares

        draw_shares(
            {f"{method} of {', '.join(found.experts)}": found.marks}, "Weights by how many tasks need them", picture
        )
    if json:
        print_json(found.to_dict())
    else:
        _tell(found)


@command("masks extract")
def extract(
    folder: Annotated[Path, typer.Argument(help="A folder that `twinmerge masks build` wrote.")],
    task: Annotated[str, typer.Argument(help="The expert that is wanted.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Write one expert out of masks as a plain model in its own class, with its head.

    twinmerge masks extract OUT a -o A2
    """
    from twinmerge.twin.masks.extract import extract_masked

    use_threads(threads)
    found = extract_masked(folder, task, output)
    if json:
        print_json(found.to_dict())
    else:
        said(f"Extracted {task}, {size(bytes_of(output))} -> {output}")


def _tell(found: BuiltMasks) -> None:
    if (chosen := found.chosen) is not None:
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
        f"{size(bytes_of(found.folder))} on the disk, heads and tokenizer included; by the formula "
        f"{size(found.formula('masks'))}, "
        f"against {size(found.formula('fine_tuned'))} of {len(found.experts)} models -> {found.folder}"
    )
