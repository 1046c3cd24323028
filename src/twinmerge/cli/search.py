"""`twinmerge search`: the parameters of a merge, chosen on validation rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Device, Json, Threads, device_of, pairs, print_json, print_table, said, values
from twinmerge.cli.merging import Described, recipe_of
from twinmerge.errors import UsageError
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.study.search import Search


@command("search")
def search(
    described: Described,
    suite: Annotated[
        Path, typer.Option("--suite", metavar="FOLDER", help="A suite: tasks.json and rows; its tasks are the experts.")
    ],
    grid: Annotated[
        list[str] | None,
        typer.Option(
            "--grid", metavar="NAME=A,B,C", help="Values to try: scale=0.1,0.2, or scale=0.1:1.0:10 for ten. Repeat."
        ),
    ] = None,
    weightings: Annotated[
        int | None,
        typer.Option(
            "--weightings", min=2, help="Try so many weightings of the experts (51 in the paper of Fisher merging)."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", metavar="NAME", help="Rows of the suite that decide; a test split is refused.")
    ] = "validation",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use at most so many rows of each task, drawn at random.")
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(
            "--experts",
            metavar="FILE",
            help="JSON of an evaluation of the experts on these rows: scores are in per cent of theirs.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for drawing the rows of --limit and the weightings.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write all trials to this JSON file.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FOLDER", help="Merge with the best parameters into this folder."),
    ] = None,
    device: Device = "cpu",
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
    if described.method is None:
        raise UsageError("No method is named. Add --method, such as --method task_arithmetic.")
    recipe, _ = recipe_of(None, None, None, described)
    if output is not None:
        OutputFolder(output).check()
    check_file(out)
    merge = Merge(recipe, architecture=True, device=device_of(device))
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
        best = merge.varied(**found.best.parameters).recipe
        Merge(best, processes=True, device=merge.device).save(output)
        said(f"Merged with the best of {len(found.trials)} -> {output}")
    if edge := _at_the_edge(found):
        said(edge)
    if json:
        print_json(found.to_dict())
        return
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.parameters))
    table = [
        [
            *[_shown(trial.parameters[name]) for name in names],
            f"{100 * trial.score:.2f}" + (" *" if trial is found.best else ""),
        ]
        for trial in found.trials
    ]
    print_table(f"{described.method} on {split}, {found.rows} rows; * the best", [*names, "score"], table)


def _grid(items: list[str]) -> dict[str, list[object]]:
    from twinmerge.recipes.plain_data import same_number

    found = {}
    for name, text in pairs(items, "--grid").items():
        if len(parts := text.split(":")) > 1 and "," not in text:
            found[name] = _range(name, text, [same_number(part) for part in parts])
            continue
        found[name] = list(values([f"{name}=[{text}]"], "--grid")[name])
        if not found[name]:
            raise UsageError(f"--grid {name}={text} names no value. Write --grid {name}=0.1,0.2.")
    return found


def _range(name: str, text: str, numbers: list[float | None]) -> list[object]:
    """START:STOP:COUNT, both ends among the values."""
    count = numbers[2] if len(numbers) == 3 else None
    if None in numbers or count is None or count != int(count) or count < 2:
        raise UsageError(
            f"--grid {name}={text} is no range. Write START:STOP:COUNT, such as {name}=0.1:1.0:10, or {name}=0.1,0.2."
        )
    start, stop = numbers[0] or 0.0, numbers[1] or 0.0
    return [round(start + (stop - start) * i / (count - 1), 12) for i in range(int(count))]


def _at_the_edge(found: Search) -> str:
    """What is said of a best value beyond which nothing was tried.

    Example:
        >>> from twinmerge.study.search import Search, Trial
        >>> _at_the_edge(Search("ties", "validation", 9, (Trial({"scale": 0.1}, 0.8, {}), Trial({"scale": 0.5}, 0.9, {}))))
        'The best scale, 0.5, is the largest that was tried: try larger ones too.'
    """
    for name, best in found.best.parameters.items():
        tried = [trial.parameters.get(name) for trial in found.trials]
        numbers = sorted({value for value in tried if isinstance(value, (int, float))})
        if len(numbers) > 1 and best in (numbers[0], numbers[-1]) and not name.endswith(".weights"):
            end = ("smallest", "smaller") if best == numbers[0] else ("largest", "larger")
            return f"The best {name}, {best:g}, is the {end[0]} that was tried: try {end[1]} ones too."
    return ""


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
