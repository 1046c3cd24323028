"""`twinmerge verify`: is a merged folder what was written, and are its inputs what was read?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.common import Json, Threads, print_json, said
from twinmerge.errors import TwinmergeError
from twinmerge.maths.threads import use_threads


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that `twinmerge merge` wrote.")],
    inputs: Annotated[bool, typer.Option("--inputs/--no-inputs", help="Read the base and the experts as well.")] = True,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare every tensor with the checksum that the merge wrote down; exit code 2 where one differs.

    twinmerge verify merged/
    """
    from twinmerge.engine.verify import verify as run

    use_threads(threads)
    found = run(folder, inputs)
    if json:
        print_json({"ok": found.ok, **found._asdict()})
    elif found.ok:
        said(f"{found.tensors} tensors are what the merge read and wrote.")
    if not found.ok:
        raise TwinmergeError(_what_differs(folder, found.changed, found.missing, found.unreadable))


def _what_differs(
    folder: Path, changed: dict[str, list[str]], missing: dict[str, list[str]], unreadable: dict[str, str]
) -> str:
    parts = [
        f"{_first(names)} of {_whose(source, folder)} changed since the merge" for source, names in changed.items()
    ]
    parts += [f"{_first(names)} of {_whose(source, folder)} is missing or new" for source, names in missing.items()]
    parts += [f"the {what} cannot be opened ({why})" for what, why in unreadable.items()]
    return "; ".join(parts) + ". Merge again from sound inputs, or check with --no-inputs if they have moved."


def _whose(source: str, folder: Path) -> str:
    return f"the output {folder}" if source == "output" else f"the input {source!r}"


def _first(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"tensor {names[0]!r}{more}"
