"""`twinmerge demo`: everything once, small enough to watch."""

from __future__ import annotations

from pathlib import Path

import typer

from twinmerge.cli.command import command


@command("demo")
def demo(
    out: Path = typer.Option(
        Path("demo"), "--out", metavar="FOLDER", help="Folder of the report; an earlier demo in it is replaced."
    ),
    seeds: int = typer.Option(3, "--seeds", min=1, help="How many times everything is trained and measured."),
    quick: bool = typer.Option(False, "--quick", help="Train for few steps, to see how it works and not how well."),
    json: bool = typer.Option(False, "--json", help="Print all numbers as JSON on stdout."),
) -> None:
    """Train five small experts on digits, merge them in every way, and write a report with pictures.

    twinmerge demo --quick --out report
    """
    from rich.console import Console

    from twinmerge.study.demo import demo as run
    from twinmerge.study.report import terminal

    results = run(out, seeds, quick, progress=not json, processes=True)
    if json:
        from json import dumps

        typer.echo(dumps(results, ensure_ascii=False))
        return
    Console(soft_wrap=False).print(terminal(results, out))
