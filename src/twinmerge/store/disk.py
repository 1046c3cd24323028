"""Every call that changes what is on the disk, in one place.

`call` is the seam: a test puts in its place one that lets the process die, or the disk be full, before any of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ParamSpec, TypeVar

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

P = ParamSpec("P")
Answer = TypeVar("Answer")
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
PIECE = 1 << 22


def call(function: Callable[P, Answer], *args: P.args, **more: P.kwargs) -> Answer:
    """The system's call."""
    return function(*args, **more)


def open_new(path: Path) -> int:
    """A descriptor of a file that is made now, to write and read; what has the name is removed, never followed.

    Example:
        >>> import tempfile
        >>> fd = open_new(Path(tempfile.mkdtemp()) / "a")
        >>> write_at(fd, b"abc", 2)
        >>> os.pread(fd, 9, 0)
        b'\\x00\\x00abc'
        >>> os.close(fd)
    """
    remove(path)
    return call(os.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def write_at(fd: int, buffer: ReadableBuffer, offset: int) -> None:
    """Write all of `buffer` at `offset`."""
    view = memoryview(buffer)
    rest = view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast
    while len(rest):
        if not (put := call(os.pwritev, fd, [rest], offset)):
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # no progress and no reason: trying on would never end
        rest, offset = rest[put:], offset + put


def append(fd: int, text: bytes) -> None:
    """One write to a file that was opened for appending: whole lines of many threads stay whole."""
    if call(os.write, fd, text) < len(text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_file(path: Path, content: bytes) -> None:
    """A new file with this content, in the place of what has the name."""
    fd = open_new(path)
    try:
        write_at(fd, content, 0)
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    write_file(path, text.encode())


def write_json(path: Path, value: object, indent: int = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False))


def copy_file(content: BinaryIO, target: Path) -> None:
    """A new file with the content of an opened one."""
    fd = open_new(target)
    try:
        offset = 0
        while piece := content.read(PIECE):
            write_at(fd, piece, offset)
            offset += len(piece)
    finally:
        os.close(fd)


def truncate(fd: int, size: int) -> None:
    call(os.ftruncate, fd, size)


def make_folder(path: Path) -> None:
    """The folder and those above it; no error where it is there."""
    if not path.parent.exists():
        make_folder(path.parent)
    try:
        call(os.mkdir, path)
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):  # gone since
            if not stat.S_ISDIR(os.stat(path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None


def remove(path: Path) -> None:
    """A file or a link; no error where it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        call(os.unlink, path)


def remove_folder(path: Path) -> None:
    """One that is empty."""
    call(os.rmdir, path)


def remove_tree(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; links are removed, never followed."""
    if path.is_dir() and not path.is_symlink():
        for each in path.iterdir():
            remove_tree(each)
        remove_folder(path)
    else:
        remove(path)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder a name, in the place of a file, or of an empty folder, that has it."""
    call(os.replace, source, target)


def sync(fd: int) -> None:
    call(os.fsync, fd)


def sync_path(path: Path) -> None:
    """Return when a file, or the names in a folder, are on the disk, where the system can say so of a folder."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        sync(fd)
    except OSError as error:
        if not (stat.S_ISDIR(os.fstat(fd).st_mode) and error.errno in (errno.EINVAL, errno.EACCES, errno.EBADF)):
            raise
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """All files below a folder, then the folders."""
    for each in sorted(folder.iterdir()):
        if each.is_symlink():
            continue
        if each.is_dir():
            sync_tree(each)
        else:
            sync_path(each)
    sync_path(folder)
