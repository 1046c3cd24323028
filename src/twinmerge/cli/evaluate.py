"""`twinmerge evaluate`: score a model on a suite of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Device, Json, Threads, device_of, print_json, print_table
from twinmerge.maths.threads import use_threads


@command("evaluate")
def evaluate(
    model: Annotated[str, typer.Argument(help="A twin, a merged folder with heads, or one classifier.")],
    suite: Annotated[
        Path, typer.Option("--suite", metavar="FOLDER", help="A suite: tasks.json and a folder per task.")
    ],
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B", help="Tasks of the suite, with commas between; those of the model by default."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Rows to score: test, validation or train.")
    ] = "test",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use at most so many rows of each task, drawn at random.")
    ] = None,
    experts: Annotated[
        list[Path] | None,
        typer.Option(
            "--experts",
            metavar="FILE",
            help="JSON of the experts' own evaluation (by --out): adds scores in per cent of theirs. Repeat, for "
            "one file for each expert.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write all answers and scores to this JSON file.")
    ] = None,
    into_card: Annotated[
        bool, typer.Option("--into-card", help="Write the scores into README.md of the model's folder too.")
    ] = False,
    oracle_biases: Annotated[
        bool, typer.Option("--oracle-biases", help="Use the biases of the true task, as the code of the paper does.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for drawing the rows of --limit and their order.")
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Score a model; a twin in its settings: task given, head given, nothing given (strict and lenient).

    twinmerge evaluate TWIN --suite DIR --tasks sst2,trec --into-card
    """
    from twinmerge.study.evaluate import evaluate as run

    use_threads(threads)
    chosen = tasks.split(",") if tasks else None
    found = run(
        model,
        suite,
        split,
        limit,
        seed,
        oracle_biases,
        tasks=chosen,
        device=device_of(device),
        experts=experts,
        out=out,
        into_card=into_card,
    )
    if json:
        print_json(found.to_dict())
        return
    columns, values = found._table()
    rows = [[row[0], *("" if value is None else f"{100 * value:.1f}" for value in row[1:])] for row in values]
    print_table(f"{model} on {split}, {found[0].rows} rows", columns, rows)
