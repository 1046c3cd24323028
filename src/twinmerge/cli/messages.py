"""How much a command tells: notes and progress, nothing but results, or what the library logs as well."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Annotated

import typer

from twinmerge.cli import lines
from twinmerge.errors import UsageError
from twinmerge.progress import heard, hidden


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
        undone.enter_context(heard(lines.said))
        if not told.quiet:
            undone.enter_context(_stopping_told())
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
def _stopping_told() -> Iterator[None]:
    """An interrupt is answered by a word at once: what the workers have begun may take seconds."""
    import threading

    main = threading.current_thread() is threading.main_thread()  # which alone gets signals
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's, or ignored
        yield
        return
    own, first = os.getpid(), "\n" if sys.stderr.isatty() else ""  # a bar, or ^C, stands in the line

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.getpid() == own:  # no worker that was forked
            with suppress(OSError):  # not by print, which may be what was interrupted
                os.write(2, f"{first}Stopping …\n".encode(sys.stderr.encoding or "utf-8", "replace"))
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
