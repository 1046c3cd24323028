"""`twinmerge verify`: is a folder or file what was written, and are the inputs of a merge what was read?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Threads, print_json, said
from twinmerge.cli.failure import FOUND
from twinmerge.cli.lines import say
from twinmerge.errors import DamagedFile
from twinmerge.maths.threads import use_threads

if TYPE_CHECKING:
    from twinmerge.engine.verify import Verified


@command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder, a state or a file that twinmerge wrote.")],
    inputs: Annotated[
        bool, typer.Option("--inputs/--no-inputs", help="Compare the base and the experts of a merge as well.")
    ] = True,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare every file and tensor with the checksums of when it was written; exit code 1 where one differs.

    twinmerge verify merged/
    """
    from twinmerge.engine.verify import verify as run

    use_threads(threads)
    try:
        found = run(folder, inputs)
    except DamagedFile as error:  # of the checksums themselves
        say(f"Error: {error}")
        raise typer.Exit(FOUND) from error
    if json:
        print_json(found.to_dict())
    elif found.ok:
        said(f"{found.tensors} tensors, and all files beside them, are what was read and written.")
    if found.uncompared and not json:
        said("Not compared: " + "; ".join(f"{label}, {why}" for label, why in found.uncompared.items()) + ".")
    if not found.ok:
        say(f"Error: {_what_differs(folder, found)}")
        raise typer.Exit(FOUND)


def _what_differs(folder: Path, found: Verified) -> str:
    from twinmerge.store.manifest import OUTPUT

    parts = [
        f"{_first(names)} of {_whose(source, folder)} changed since the merge"
        for source, names in found.changed.items()
    ]
    parts += [
        f"{_first(names)} of {_whose(source, folder)} is missing or new" for source, names in found.missing.items()
    ]
    parts += [f"the file {name} of {folder} {said_of}" for name, said_of in found.files.items()]
    parts += [f"the {what} cannot be opened ({why})" for what, why in found.unreadable.items()]
    inputs = [s for s in (*found.changed, *found.missing) if s != OUTPUT and not s.endswith(".safetensors")]
    again = "Write it again from sound inputs, or check with --no-inputs if they have moved"
    return "; ".join(parts) + f". {again if inputs or found.unreadable else 'Copy or write it again'}."


def _whose(source: str, folder: Path) -> str:
    from twinmerge.store.manifest import OUTPUT

    if source == OUTPUT:
        return f"the output {folder}"
    return f"the file {source}" if source.endswith(".safetensors") else f"the input {source!r}"


def _first(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"
