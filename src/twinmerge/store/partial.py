"""What lies beside an output that is being made: a lock, a journal, and the mark that says it is ours."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twinmerge.errors import OutputError
from twinmerge.store import disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOURNAL, LOCK, CONTENT, REPLACED = "journal", "lock", "output", "replaced"
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
HELD: set[int] = set()  # descriptors of locks; a forked worker must not keep a lock that its parent lost by dying


def _let_go() -> None:
    while HELD:
        os.close(HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


MARK = b'{"twinmerge": 1, "key": '
"""How a journal begins: what lies beside it was made here and may be removed."""


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the context no other process changes the folder, if it asks too.

    Raises:
        TwinmergeError: one does; the disk is full or cannot be written.
    """
    try:
        fd = lock_file(folder / LOCK, folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                disk.remove(folder / LOCK)
            if fd is not None:
                HELD.discard(fd)
                os.close(fd)
    except OSError as error:
        advice = "Free some space" if error.errno in DISK_FULL else "Look at the disk"
        raise OutputError(f"{folder} could not be changed: {error}. {advice} and run again.") from error


def is_no_folder(path: Path) -> bool:
    """Whether something else is there; looked at once, since another process may remove it between two looks."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def is_ours(partial: Path) -> bool:
    """Whether a `.partial` is not there, is empty, or was made here, if only begun: by its lock and journal.

    A process that finishes meanwhile takes file after file away, so "no" is said of what two looks found alike.
    """
    before: set[str] | None = None
    while True:
        try:
            names = {path.name for path in partial.iterdir()}
            if _was_made_here(partial, names):
                return True
            if names == before:
                return False
            before = names
        except FileNotFoundError:  # gone since: all of it, or one file
            before = None
            if not os.path.lexists(partial):
                return True
        except NotADirectoryError:
            return True
        except OSError:
            return False


def _was_made_here(partial: Path, names: set[str]) -> bool:
    """Errors: FileNotFoundError where one of the names has gone."""
    sizes = {}
    for name in names & {LOCK, JOURNAL}:
        status = os.lstat(partial / name)
        if not stat.S_ISREG(status.st_mode):
            return False
        sizes[name] = status.st_size
    begin = b""
    if JOURNAL in names:
        with (partial / JOURNAL).open("rb") as content:
            begin = content.read(len(MARK))
    if names <= {LOCK, JOURNAL}:
        return MARK.startswith(begin) and not sizes.get(LOCK)
    return begin == MARK


def first_line(key: str | None) -> bytes:
    return MARK + json.dumps(key).encode() + b"}\n"


def read_journal(file: Path, key: str) -> list[dict[str, Any]] | None:
    """The lines after the first, or None where it is not the journal of `key`; a torn end is cut off."""
    if file.is_symlink() or not file.is_file():
        return None
    lines, whole = [], 0
    content = file.read_bytes()
    for text in content.split(b"\n")[:-1]:  # what follows the last newline was being written
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
        whole += len(text) + 1
    if not lines or lines[0] != json.loads(first_line(key)):
        return None
    if whole < len(content):
        disk.call(os.truncate, file, whole)
    return lines[1:]


def lock_file(file: Path, output: Path) -> int | None:
    """Make the lock's folder and take the lock.

    Returns:
        A descriptor that holds it, or None where the system knows no such locks and the file itself is the lock.

    Raises:
        OutputError: another process holds it.
    """
    busy = f"The output {output} is being written by another process. Wait for it, or name another folder"
    flags = os.O_RDWR | os.O_CREAT | disk.NO_LINK | (0 if fcntl else os.O_EXCL)
    while True:
        disk.make_folder(file.parent)
        try:
            fd = disk.call(os.open, file, flags, 0o666)
        except FileNotFoundError:  # another process renamed or removed the folder just now
            continue
        except FileExistsError:
            raise OutputError(f"{busy}; if there is none, remove {file}.") from None
        if not fcntl:
            os.close(fd)
            return None
        held = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(fd), os.stat(file))  # or it is a lock that was removed meanwhile
        except BlockingIOError:
            raise OutputError(f"{busy}.") from None
        except FileNotFoundError:  # the same, and no other was made
            pass
        finally:
            if not held:
                os.close(fd)
        if held:
            HELD.add(fd)
            return fd
