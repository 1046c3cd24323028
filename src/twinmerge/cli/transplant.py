"""`twinmerge transplant`: a model with the vocabulary of another tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Device, Json, Threads, device_of, print_json, size
from twinmerge.cli.lines import said
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads


@command("transplant")
def transplant(
    model: Annotated[str, typer.Argument(help="The model: a path or a hub id.")],
    tokenizer: Annotated[
        str, typer.Option("--tokenizer", metavar="DONOR", help="The model or folder whose tokenizer the model gets.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="The folder to write.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="NAME",
            help="How the rows of new tokens are made: omp, nearest, subtokens or copy.",
        ),
    ] = "omp",
    k: Annotated[
        int, typer.Option("--k", min=1, help="Most rows of the model that omp makes the row of a new token of.")
    ] = 64,
    min_overlap: Annotated[
        float,
        typer.Option(
            "--min-overlap", help="Smallest share of the tokens of the donor that the model must have: 0 to 1."
        ),
    ] = 0.5,
    pad_to_multiple_of: Annotated[
        int | None,
        typer.Option(
            "--pad-to-multiple-of", min=1, help="Add rows to the tables until their number is a multiple of this."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what both share, but write nothing.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Give a model the vocabulary of another tokenizer, without training.

    twinmerge transplant MODEL --tokenizer DONOR -o OUT

    twinmerge transplant MODEL --tokenizer DONOR --method subtokens --dry-run
    """
    if output is None and not dry_run:
        raise UsageError("No output is named. Add -o FOLDER, or --dry-run to look only.")
    from twinmerge.engine.transplant.transplant import transplant as call

    use_threads(threads)
    options: dict[str, Any] = {"method": method, "k": k, "min_overlap": min_overlap}
    options |= {"pad_to_multiple_of": pad_to_multiple_of, "device": device_of(device)}
    found = call(model, tokenizer, None if dry_run else output, **options)
    if json:
        print_json(found.to_dict())
        return
    held = f"; {size(found.memory)} of the donor's rows are held in memory" if found.memory else ""
    said(f"{found.shared} of {found.tokens} tokens are shared ({100 * found.overlap:.3g} %){held}.")
    for token, other in found.special.items():
        said(f"{token} has the row of {other}.")
    if found.folder is None:
        said("Nothing is written (--dry-run).")
        return
    for table, made in found.made.items():
        said(f"{table}: {', '.join(f'{count} rows by {how}' for how, count in made.items()) or 'no new rows'}.")
    said(f"{found.rows} rows, {size(found.to_dict()['bytes'])} -> {found.folder}")
