"""`twinmerge evaluate`: score a model on a suite of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.common import Json, Threads, print_json, print_table
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads


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
    from twinmerge.store.foreign import read_bytes
    from twinmerge.store.locate import locate
    from twinmerge.store.output import OutputFile, replace_text
    from twinmerge.study.evaluate import evaluate as run
    from twinmerge.study.evaluate import open_runner
    from twinmerge.study.scores import EVALUATION, Evaluation
    from twinmerge.tasks.suite import open_suite

    use_threads(threads)
    advice = "Name a file that --out wrote."
    reference = Evaluation.from_json(read_bytes(experts, EVALUATION.bytes, advice)) if experts else None
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UsageError(f"{out} cannot be written. Name a file in a folder that is there.")
    if out is not None:
        OutputFile(out, replace=True).check()
    found_at = locate(model)
    if found_at.adapter is not None:
        raise UsageError(f"{model} is a base and an adapter. Merge it into one folder first, and evaluate that.")
    runner = open_runner(found_at.folder, oracle_biases)
    chosen = tasks.split(",") if tasks else (runner.heads or None)
    data = open_suite(suite, chosen)
    if reference is not None and set(reference.scores) != set(data):
        raise UsageError(
            f"{experts} is of the tasks {', '.join(reference.scores)}, this evaluation of {', '.join(data)}. "
            "Choose the same with --tasks."
        )
    found = run(runner, data, split, limit, seed, oracle_biases)
    report = {
        "model": model,
        "split": split,
        "oracle_biases": oracle_biases,
        "evaluations": [
            {
                "setting": e.setting,
                "reading": e.reading,
                "scores": e.scores,
                "mean": sum(e.scores.values()) / len(e.scores),
                "normalised": e.normalised(reference) if reference else None,
                "routed_right": e.routed_right,
                "seconds_per_1000": 1000 * e.seconds / e.rows,
            }
            for e in found
        ],
    }
    if out is not None:
        text = "[" + ",".join(e.to_json() for e in found) + "]" if len(found) > 1 else found[0].to_json()
        replace_text(out, text)
    if json:
        print_json(report)
        return
    columns = ["task", *[e.setting + (f", {e.reading}" if e.reading else "") for e in found]]
    rows = [[task, *[f"{100 * e.scores[task]:.1f}" for e in found]] for task in found[0].scores]
    rows.append(["mean", *[f"{100 * sum(e.scores.values()) / len(e.scores):.1f}" for e in found]])
    if reference is not None:
        rows.append(["normalised", *[f"{e.normalised(reference):.1f}" for e in found]])
    if any(e.routed_right is not None for e in found):
        rows.append(["routed right", *["" if e.routed_right is None else f"{100 * e.routed_right:.1f}" for e in found]])
    print_table(f"{model} on {split}, {found[0].rows} rows", columns, rows)
