"""`twinmerge checkpoints`: the checkpoints of one training run as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Threads, print_json, size
from twinmerge.cli.lines import said
from twinmerge.cli.merging import AllowPickle, Dtype
from twinmerge.maths.threads import use_threads


@command("checkpoints")
def checkpoints(
    folder: Annotated[Path, typer.Argument(help="The run: it has checkpoint-500, checkpoint-1000, … inside.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")],
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help="How checkpoints are weighted: linear (the mean), cosine, minus_sqrt or ema.",
        ),
    ] = "linear",
    last: Annotated[
        int | None, typer.Option("--last", min=1, help="How many of the last checkpoints to merge; all by default.")
    ] = None,
    decay: Annotated[float, typer.Option("--decay", help="Decay of ema, between 0 and 1.")] = 0.9,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output that is there, if twinmerge wrote it.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Merge the checkpoints of one training run, in the place of a decay of its learning rate.

    twinmerge checkpoints RUN --schedule minus_sqrt --last 10 -o OUT
    """
    from twinmerge.engine.checkpoints import merge_checkpoints

    use_threads(threads)
    how = {"allow_pickle": allow_pickle, "overwrite": overwrite}
    merge = merge_checkpoints(folder, output, schedule=schedule, last=last, decay=decay, dtype=dtype, **how)
    found = merge.check()
    steps = sorted((Path(str(model)).name for model in merge.recipe.experts.values()), key=lambda n: (len(n), n))
    listed = ", ".join(steps if len(steps) <= 12 else [*steps[:5], "…", *steps[-5:]])
    said(f"Merged {len(steps)} checkpoints ({listed}), {size(found['output_bytes'])} -> {output}")
    if json:
        print_json(merge.to_dict())
