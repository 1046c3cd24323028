"""Ranges of bytes in files, read and written at a position of their own, so that any number of threads may at once."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinmerge.store import disk
from twinmerge.store.foreign import open_regular

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer
    from torch import Tensor

    Flat = Tensor | NDArray[np.uint8]
    """Values side by side: a 1-D tensor of their dtype, or their bytes."""

MAX_OPEN = 128  # descriptors; a process may have 256 on macOS, and needs some for other things


def read_into(fd: int, buffer: WriteableBuffer, offset: int) -> None:
    """Fill `buffer` with the bytes from `offset` on.

    Args:
        fd: of a file; its own position is neither used nor moved.
        buffer: contiguous memory; of any format.
        offset: of the first byte.

    Raises:
        EOFError: the file ends before the buffer is full.

    Example:
        >>> import tempfile
        >>> two = bytearray(2)
        >>> with tempfile.TemporaryFile() as file:
        ...     write_from(file.fileno(), b"abcd", 3)
        ...     read_into(file.fileno(), two, 4)
        >>> two
        bytearray(b'bc')
    """
    rest = _flat(buffer)
    while len(rest):
        if not (got := os.preadv(fd, [rest], offset)):
            raise EOFError(f"it ends at byte {offset}, {len(rest)} bytes too early")
        rest, offset = rest[got:], offset + got


def write_from(fd: int, buffer: ReadableBuffer, offset: int) -> None:
    """Write all of `buffer` at `offset`; as `read_into`, the other way."""
    disk.write_at(fd, buffer, offset)


def begin_to_sync(fd: int, offset: int, size: int) -> None:
    """Ask the system to bring what was written there to the disk now, so that a sync at the end has little to wait for.

    Linux only; elsewhere, and where it fails, nothing is lost but time.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as file:
        ...     write_from(file.fileno(), b"abcd", 0)
        ...     begin_to_sync(file.fileno(), 0, 4)
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, size, 2)  # SYNC_FILE_RANGE_WRITE: begin, do not wait


def bytes_of(flat: Flat) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU, or of a 1-D array of bytes; not a copy.

    Raises:
        ValueError: another kind of tensor or array.

    Example:
        >>> import torch
        >>> bytes_of(torch.tensor([1, 258], dtype=torch.int16)).tobytes()
        b'\\x01\\x00\\x02\\x01'
    """
    if isinstance(flat, np.ndarray):
        if flat.dtype != np.uint8 or flat.ndim != 1 or not flat.flags.c_contiguous:
            raise ValueError(f"expected a contiguous 1-D array of bytes, not {flat.shape} of {flat.dtype}")
        return flat.data
    import torch

    if flat.dim() != 1 or not flat.is_contiguous() or flat.device.type != "cpu":
        raise ValueError(f"expected a contiguous 1-D tensor on the CPU, not {tuple(flat.shape)} on {flat.device}")
    return flat.detach().view(torch.uint8).numpy().data


def _found() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):  # a C library without it
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _found()


class Stamp(NamedTuple):
    """What tells whether a file changed: its length, the times of its content and of its entry (which no program
    sets), and what else moves the latter: links, rights and owner. No inode: some network file systems give a new one
    each time."""

    size: int
    content: int
    entry: int
    others: tuple[int, ...]

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        others = (status.st_nlink, status.st_mode, status.st_uid, status.st_gid)
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, others)

    def fits(self, now: Stamp) -> bool:
        """Whether the content is still the same; a file that got another name, or none, or other rights is."""
        return self[:2] == now[:2] and (self.entry == now.entry or self.others != now.others)


class OpenFile:
    """A file whose descriptor is opened when it is first needed and kept, for any number of threads.

    Over all objects, at most `MAX_OPEN` descriptors are open: the one that lay idle longest makes room for the next.
    A descriptor belongs to one object: a copy, in this process or pickled, opens the file by its path, and finds out
    whether it changed since; of a file that is written there is no copy.

    Args:
        path: of the file; it must be there by the time it is used.
        writable: a file that is only read must not change between two openings.

    Example:
        >>> import tempfile
        >>> file = OpenFile(Path(tempfile.mkdtemp()) / "bytes")
        >>> _ = file.path.write_bytes(b"abcd")
        >>> with file.use() as fd:
        ...     os.pread(fd, 2, 1)
        b'bc'
        >>> file.close()
    """

    _changed = threading.Condition()
    _opened: weakref.WeakSet[OpenFile] = weakref.WeakSet()
    _clock = itertools.count()

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.path = path
        self.writable = writable
        self._fd: int | None = None
        self._users: list[int] = []  # a thread's number for each use
        self._last_use = 0
        self._stamp: Stamp | None = None

    @contextmanager
    def use(self) -> Iterator[int]:
        """The descriptor, which stays open inside the `with`.

        Raises:
            OSError: it cannot be opened, or it changed since it was opened first.
        """
        with self._changed:
            while self._fd is None:
                if len(self._opened) < MAX_OPEN or self._close_idlest():
                    self._fd = self._open()
                    self._opened.add(self)
                else:
                    self._changed.wait()
            fd = self._fd
            self._users.append(threading.get_ident())
        try:
            yield fd
        finally:
            with self._changed:
                self._users.remove(threading.get_ident())
                self._last_use = next(self._clock)
                self._changed.notify_all()

    def close(self) -> None:
        """Close the descriptor once nobody uses it; the next use opens it again."""
        with self._changed:
            while self._users:
                self._changed.wait()
            self._close()
            self._changed.notify_all()

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at exit this module may have lost its `os`
        if (fd := getattr(self, "_fd", None)) is not None:  # one that was never put together has none
            close(fd)

    def __getstate__(self) -> dict[str, Any]:
        if self.writable:
            raise TypeError(f"{self.path} is being written: what writes it cannot be copied or pickled")
        return {"path": self.path, "writable": self.writable, "_stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"], state["writable"])  # type: ignore[misc]
        self._stamp = state["_stamp"]

    def _open(self) -> int:
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC) if self.writable else open_regular(self.path)
        if self._stamp is None:
            self._stamp = Stamp.of(os.fstat(fd))
        try:
            self.require_same(fd)
        except OSError:
            os.close(fd)
            raise
        return fd

    def require_same(self, fd: int) -> None:
        """Refuse what was read of a file that is not written here, if it changed since it was opened first.

        Raises:
            OSError: it did.
        """
        if self.writable or self._stamp is None:
            return
        size, content, entry, _ = self._stamp
        now = os.fstat(fd)
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) == (
            size,
            content,
            entry,
        ):  # nearly always, and after every read
            return
        if not self._stamp.fits(Stamp.of(now)):
            raise OSError("it changed since it was opened first")

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            self._opened.discard(self)
            os.close(fd)

    @classmethod
    def _close_idlest(cls) -> bool:
        idle = [file for file in cls._opened if not file._users]
        if idle:
            min(idle, key=lambda file: file._last_use)._close()
        return bool(idle)

    @classmethod
    def _forked(cls) -> None:
        """In a forked child: of the threads only this one is there, so what others were using nobody uses."""
        cls._changed = threading.Condition()
        for file in cls._opened:
            file._users = [user for user in file._users if user == threading.get_ident()]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: OpenFile._changed.acquire(),
        after_in_parent=lambda: OpenFile._changed.release(),
        after_in_child=OpenFile._forked,
    )


def _flat(buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast
