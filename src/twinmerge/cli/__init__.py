"""The command `twinmerge`: a file per command or group of them, found by being here; no maths, no tensors; heavy
imports happen inside the commands."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer

from twinmerge.cli.command import COMMANDS, GROUPS, in_order, on_the_line
from twinmerge.cli.failure import INTERRUPTED, all_streams, check_words, flushed, message_and_code
from twinmerge.cli.help import PANEL, Command, Group, Root
from twinmerge.cli.lines import say
from twinmerge.moved import new_command
from twinmerge.plugins import files_of
from twinmerge.recipes.mergekit_options import translated_options

EPILOG = """Examples:

twinmerge merge --method ties --base BASE --expert a=A --expert b=B -o OUT

twinmerge twin build --base BASE --expert a=A --expert b=B --data a=a.jsonl --data b=b.jsonl -o TWIN

Help on one command: twinmerge merge --help. Which method: twinmerge methods. Documentation: the folder docs of the \
source.

Exit codes: 0 done; 1 verify or diff found a difference; 2 wrong call; 3 wrong input; 4 the machine (disk, memory, \
network) or an internal error; 130 interrupted."""

for _file in files_of(__name__):
    import_module(f"{__name__}.{_file}")
app = typer.Typer(
    name="twinmerge",
    cls=Root,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn many fine-tuned models of one base into one: merged once, or mixed anew for every input.",
    epilog=EPILOG,
)
_groups = {name: typer.Typer(cls=Group, no_args_is_help=True, help=text) for name, text in GROUPS.items()}
for _words in in_order():
    *_of, _name = _words.split()
    _function, _of_which = on_the_line(COMMANDS[_words]), _groups[_of[0]] if _of else app
    _of_which.command(_name, cls=Command, rich_help_panel=PANEL.get(_words))(_function)
for _group, _typer in _groups.items():
    app.add_typer(_typer, name=_group, rich_help_panel=PANEL[_group])


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("twinmerge"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Print the version.")
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
            if words[:1] in (["merge"], ["check"]):
                own, notes = translated_options(words[1:])
                words = [*words[:1], *own]
                for note in notes:
                    say(f"Note: {note}")
            code = app(args=words, prog_name="twinmerge", standalone_mode=False)
        except SystemExit as left:
            code = left.code
        except BaseException as error:
            failed = error
        failed = flushed() or failed
        if failed is None and code == INTERRUPTED:
            failed = KeyboardInterrupt()  # before any command had begun
        if failed is not None:
            said, code = message_and_code(failed)
            if said:
                say(said)
        sys.exit(code)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"Warning: {message}")
