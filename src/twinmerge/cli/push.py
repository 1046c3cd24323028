"""`twinmerge push`: a folder that was written here, to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twinmerge.cli.command import command
from twinmerge.cli.common import Json, Threads, print_json, said, size
from twinmerge.maths.threads import use_threads


@command("push")
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that twinmerge wrote.")],
    repo: Annotated[str, typer.Argument(help="NAME or ORGANISATION/NAME on the hub; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="BRANCH", help="The branch to send to; the main one by default.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and show what would be sent, but send nothing.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Send a folder to the Hugging Face hub, after comparing each file with its checksum.

    twinmerge push OUT me/merged --private
    """
    from twinmerge.engine.push import sending

    use_threads(threads)
    found = sending(folder, repo, private, revision, message, overwrite, login=not dry_run)
    count, total = len(found.sizes), sum(found.sizes.values())
    to = f"{repo}{f' at {revision}' if revision else ''}{', private' if private else ''}"
    said(
        f"{'Would send' if dry_run else 'Sends'} {count} files, {size(total)} ({total} bytes), to {to}: {', '.join(found.sizes)}."
    )
    if found.changed:
        said(f"{found.changed[0]} was edited since it was written, and goes as it is.")
    if found.left_out:
        said(f"Not sent, since twinmerge did not write it: {', '.join(found.left_out)}.")
    pushed = found.record(None) if dry_run else found.send()
    if json:
        print_json(pushed.to_dict())
    elif not dry_run:
        said(f"Sent: {pushed['url']}")
