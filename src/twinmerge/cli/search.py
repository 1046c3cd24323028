"""`twinmerge search`: the parameters of a merge, chosen on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    print_json,
    print_table,
    said,
    values,
)
from twinmerge.cli.merge import Depth, MethodName, StatisticsFiles, Weights, recipe_of
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads


@command("search")
def search(
    suite: Annotated[Path, typer.Option("--suite", help="A folder with tasks.json; its tasks are the experts.")],
    method: MethodName = None,
    base: Base = None,
    expert: Experts = None,
    weight: Weights = None,
    parameter: Parameters = None,
    statistics: StatisticsFiles = None,
    head: Heads = None,
    lines: Depth = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="NAME=A,B,C", help="Values of a parameter that are tried, all with all. Repeat."
        ),
    ] = None,
    weightings: Annotated[
        int | None,
        typer.Option(
            "--weightings", min=2, help="Try so many weightings of the experts (the paper of Fisher merging: 51)."
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Which rows decide; never those for testing.")] = "validation",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows per task.")] = None,
    experts: Annotated[
        Path | None,
        typer.Option("--experts", help="A JSON of the experts' evaluation on these rows: scores are shares of it."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of --limit and --weightings.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Write all trials to this JSON file.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Merge with the best parameters into this folder.")
    ] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Choose a method's parameters on validation rows: merge with each candidate in memory, and score it.

    twinmerge search --method task_arithmetic --base B --expert a=A --expert b=B2 --suite DIR --grid scale=0.1,0.2,0.3
    -o OUT
    """
    from twinmerge.engine.merge import Merge
    from twinmerge.store.output import OutputFolder
    from twinmerge.study.scores import check_file
    from twinmerge.study.search import check_split
    from twinmerge.study.search import search as run

    use_threads(threads)
    check_split(split)
    if method is None:
        raise UsageError("No method is named. Add --method, such as --method task_arithmetic.")
    recipe, _ = recipe_of(
        None, None, None, method, base, expert, weight, parameter, statistics, head, None, None, lines
    )
    if output is not None:
        OutputFolder(output).check()
    check_file(out)
    merge = Merge(recipe, architecture=True)
    found = run(
        merge,
        suite,
        grid=_grid(grid or []),
        weightings=weightings,
        split=split,
        limit=limit,
        seed=seed,
        experts=experts,
        out=out,
    )
    if output is not None:
        Merge(merge.varied(**found.best.parameters).recipe, processes=True).save(output)
        said(f"Merged with the best of {len(found.trials)} -> {output}")
    if json:
        print_json(found.to_dict())
        return
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.parameters))
    table = [
        [
            *[_shown(trial.parameters[name]) for name in names],
            f"{trial.score:.2f}" + (" *" if trial is found.best else ""),
        ]
        for trial in found.trials
    ]
    print_table(f"{method} on {split}, {found.rows} rows; * the best", [*names, "score"], table)


def _grid(items: list[str]) -> dict[str, list[object]]:
    found = {}
    for name, text in pairs(items, "--grid").items():
        found[name] = list(values([f"{name}=[{text}]"], "--grid")[name])
        if not found[name]:
            raise UsageError(f"--grid {name}={text} names no value. Write --grid {name}=0.1,0.2.")
    return found


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
