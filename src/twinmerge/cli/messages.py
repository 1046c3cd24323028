"""How much a command tells: notes and progress, nothing but results, or what the library logs as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer

from twinmerge.cli import lines
from twinmerge.errors import UsageError
from twinmerge.progress import hidden


@dataclass(frozen=True)
class Messages:
    """What every command takes."""

    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Show results, warnings and errors alone: no notes, no progress.")
    ] = False
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Show what the library logs as well: each step and its time.")
    ] = False


@contextmanager
def messages(told: Messages) -> Iterator[None]:
    """Inside, as much is told as was asked for.

    Raises:
        UsageError: both more and less.
    """
    if told.quiet and told.verbose:
        raise UsageError("--quiet and --verbose ask for less and for more. Give one of them.")
    with ExitStack() as undone:
        undone.enter_context(hidden(told.quiet))
        undone.enter_context(lines.notes(not told.quiet))
        if told.verbose:
            undone.enter_context(_logged())
        yield


@contextmanager
def where_stopped(left: Callable[[], str]) -> Iterator[None]:
    """Who interrupts what is inside is told what is left on the disk, and how to go on.

    Args:
        left: says it, and is asked then.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(left())
        raise


@contextmanager
def _logged() -> Iterator[None]:
    """What the library logs, on stderr."""
    import logging

    class Lines(logging.Handler):
        """A line on stderr, above a bar that is shown."""

        def emit(self, record: logging.LogRecord) -> None:
            from tqdm import tqdm

            with tqdm.external_write_mode():
                lines.said(self.format(record))

    log, handler = logging.getLogger("twinmerge"), Lines()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)
