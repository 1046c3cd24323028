"""`twinmerge evaluate`: score a model on a suite of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Threads, print_json, print_table
from twinmerge.maths.threads import use_threads


@command("evaluate")
def evaluate(
    model: Annotated[str, typer.Argument(help="A twin, a merged folder with heads, or one classifier.")],
    suite: Annotated[Path, typer.Option("--suite", help="A folder with tasks.json and a folder per task.")],
    tasks: Annotated[str | None, typer.Option("--tasks", help="Comma-separated; the model's own by default.")] = None,
    split: Annotated[str, typer.Option("--split", help="Which rows.")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows per task.")] = None,
    experts: Annotated[
        Path | None,
        typer.Option("--experts", help="A JSON of the experts' evaluation (--out): adds normalised scores."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write all answers and scores to this JSON file.")] = None,
    oracle_biases: Annotated[
        bool, typer.Option("--oracle-biases", help="Hand the labelled task's biases in, as the paper's code does.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --limit and of the order of the rows.")] = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Score a model; a twin in its settings: task given, head given, nothing given (strict and lenient).

    twinmerge evaluate TWIN --suite DIR --tasks sst2,trec
    """
    from twinmerge.study.evaluate import evaluate as run

    use_threads(threads)
    chosen = tasks.split(",") if tasks else None
    found = run(model, suite, split, limit, seed, oracle_biases, tasks=chosen, experts=experts, out=out)
    if json:
        print_json(found.to_dict())
        return
    columns, values = found._table()
    rows = [[row[0], *(_shown(row[0], value) for value in row[1:])] for row in values]
    print_table(f"{model} on {split}, {found[0].rows} rows", columns, rows)


def _shown(row: str, value: float | None) -> str:
    """A share in per cent; the normalised score is in per cent already."""
    return "" if value is None else f"{value if row == 'normalised' else 100 * value:.1f}"
