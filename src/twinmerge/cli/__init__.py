"""The command `twinmerge`: a file per command and three for those of `twin`, no maths, no tensors; heavy imports
happen inside the commands."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from twinmerge.cli.continual import add as add_arrived
from twinmerge.cli.continual import init, materialise, status
from twinmerge.cli.continual import remove as remove_arrived
from twinmerge.cli.continual import twin as twin_of_state
from twinmerge.cli.demo import demo
from twinmerge.cli.diff import diff
from twinmerge.cli.evaluate import evaluate
from twinmerge.cli.failure import INTERRUPTED, all_streams, check_words, flushed, message_and_code
from twinmerge.cli.lines import say
from twinmerge.cli.lora import extract as extract_lora
from twinmerge.cli.lora import merge as merge_lora
from twinmerge.cli.masks import build as build_masks
from twinmerge.cli.masks import extract as extract_masked
from twinmerge.cli.measure import activations, fisher, gram
from twinmerge.cli.measure import add as add_statistics
from twinmerge.cli.merge import check, merge
from twinmerge.cli.methods import methods
from twinmerge.cli.routers import routers
from twinmerge.cli.search import search
from twinmerge.cli.twin import build, explain, export, info, predict
from twinmerge.cli.twin_change import add, compress, rebuild, refine, remove
from twinmerge.cli.verify import verify
from twinmerge.moved import new_command

app = typer.Typer(
    name="twinmerge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn many fine-tuned models of one base into one: merged once, or mixed anew for every input.",
)
twin = typer.Typer(no_args_is_help=True, help="One shared model, a small part per expert, mixed for every input.")
for command in (build, predict, explain, info, compress, refine, add, remove, rebuild, export, routers):
    twin.command()(command)
measure = typer.Typer(
    no_args_is_help=True, help="What Fisher and RegMean merging must know of each expert, from its data."
)
measure.command()(fisher)
measure.command()(gram)
measure.command()(activations)
measure.command("add")(add_statistics)
masks = typer.Typer(no_args_is_help=True, help="Many experts as one vector and a mask each, and one of them back.")
masks.command("build")(build_masks)
masks.command("extract")(extract_masked)
continual = typer.Typer(
    no_args_is_help=True,
    help="Experts that come, and go, one by one: a state of constant size, and the merged model of now.",
)
continual.command()(init)
continual.command("add")(add_arrived)
continual.command("remove")(remove_arrived)
continual.command()(materialise)
continual.command()(status)
continual.command("twin")(twin_of_state)
lora = typer.Typer(no_args_is_help=True, help="LoRA adapters: many into one, or one out of a tuned model.")
lora.command("merge")(merge_lora)
lora.command("extract")(extract_lora)
app.command()(merge)
app.command()(check)
app.command()(search)
app.command()(verify)
app.add_typer(twin, name="twin")
app.add_typer(masks, name="masks")
app.add_typer(measure, name="measure")
app.add_typer(lora, name="lora")
app.add_typer(continual, name="continual")
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
    """Run the command. A warning is a paragraph on stderr; so is every error, with the exit code of its class."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code: int | str | None = 0
        failed: BaseException | None = None
        try:
            all_streams()
            check_words(sys.argv[1:])
            words, renamed = new_command(sys.argv[1:])
            if renamed is not None:
                say(f"Warning: {renamed}")
            app(args=words, prog_name="twinmerge")
        except SystemExit as left:
            code = left.code
            failed = KeyboardInterrupt() if code == INTERRUPTED else None  # typer has taken the interrupt for itself
        except BaseException as error:
            failed = error
        failed = flushed() or failed
        if failed is not None:
            said, code = message_and_code(failed)
            say(said)
        sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"Warning: {message}")
