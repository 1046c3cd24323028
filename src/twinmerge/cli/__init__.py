"""The command `twinmerge`: one file per command, no maths, no tensors; heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from twinmerge.cli.demo import demo
from twinmerge.cli.diff import diff
from twinmerge.cli.evaluate import evaluate
from twinmerge.cli.merge import merge
from twinmerge.cli.methods import methods
from twinmerge.cli.twin import twin_app
from twinmerge.errors import TwinmergeError

app = typer.Typer(
    name="twinmerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn many fine-tuned models of one base into one: merged once, or mixed anew for every input.",
)
app.command()(merge)
app.add_typer(twin_app, name="twin")
app.command()(evaluate)
app.command()(diff)
app.command()(methods)
app.command()(demo)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("twinmerge"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    try:
        app()
    except TwinmergeError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
