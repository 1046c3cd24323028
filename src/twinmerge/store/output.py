"""Writing a model folder: safetensors shards laid out first, then filled; whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint import INDEX, SINGLE, Spec, check_range
from twinmerge.store.header import header_of as header_of
from twinmerge.store.ranges import OpenFile, begin_to_sync, bytes_of, read_into, write_from

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SYNC_BYTES = 1 << 18
SHARD_BYTES = 5 * 10**9
JOURNAL, LOCK = "journal", "lock"
PYTORCH = {"format": "pt"}
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
_HELD: set[int] = set()  # descriptors of locks; a forked worker must not keep a lock that its parent lost by dying


def _let_go() -> None:
    while _HELD:
        os.close(_HELD.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class OutputFolder:
    """A folder that appears under its name only when everything in it is written.

    Files go to the twin `<name>.partial`, which is renamed at the end. After an error it is removed; with a `key` it is
    left, unless the error is the user's, and the next run with the same key goes on from what its journal says is done.
    One process at a time.

    Args:
        folder: the output; not there yet, or empty.
        needed_bytes: compared with the free space, plus what a `.partial` of an earlier run occupies.
        key: what identifies the work: same key, same bytes.

    Attributes:
        done: inside the `with`, what earlier runs with this key recorded.

    Errors:
        TwinmergeError: the folder exists and is not empty, cannot be made, another process writes it, or the disk is
            full.

    Example:
        >>> import tempfile
        >>> where = Path(tempfile.mkdtemp()) / "out"
        >>> def run(fail):
        ...     output = OutputFolder(where, key="recipe 1")
        ...     with output as partial:
        ...         print(output.done, where.exists())
        ...         _ = (partial / "a.txt").write_text("a")
        ...         output.record({"file": "a.txt"})
        ...         if fail:
        ...             raise KeyboardInterrupt
        >>> try:
        ...     run(fail=True)
        ... except KeyboardInterrupt:
        ...     run(fail=False)
        [] False
        [{'file': 'a.txt'}] False
        >>> sorted(path.name for path in where.iterdir())
        ['a.txt']
    """

    def __init__(self, folder: str | os.PathLike[str], needed_bytes: int = 0, key: str | None = None) -> None:
        self.folder = Path(folder)
        if self.folder.name in ("", ".."):
            raise TwinmergeError(f"The output {self.folder} has no name of its own. Name a folder, such as ./merged.")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.needed_bytes = needed_bytes
        self.key = key
        self.done: list[dict[str, Any]] = []
        self._lock: int | None = None
        self._journal: int | None = None

    def check(self) -> None:
        """Refuse now what would fail later."""
        if self.folder.is_symlink():
            raise TwinmergeError(f"The output {self.folder} is a link. Name the folder itself.")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise TwinmergeError(
                f"The output {self.folder} is there already and not empty. Name another one or remove it."
            )
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise TwinmergeError(
                f"{self.partial}, where the output is written first, is no folder. Remove it or name another output."
            )
        needed, free = self._space()
        if free < needed:
            raise TwinmergeError(
                f"No space for {self.folder}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
                "Free some, or name a folder on another disk."
            )

    def record(self, line: dict[str, Any]) -> None:
        """Append one JSON object to the journal, from any thread; record a piece once its bytes are written.

        A journal survives the death of the process, and of the machine if the bytes were synced before.
        """
        assert self._journal is not None, "only inside the with, and with a key"
        text = json.dumps(line).encode() + b"\n"
        if os.write(self._journal, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self) -> Path:
        self.check()
        try:
            self._lock = _lock(self.partial / LOCK, self.folder)
            try:
                self.check()  # the process that had the lock may have finished since the first look
                self._begin()
            except BaseException:
                self._unlock()
                raise
        except OSError as error:
            raise TwinmergeError(f"The output {self.folder} cannot be made: {error}. Name another folder.") from error
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None
        if error is None:
            self._appear()
            return
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        advice = "what was written is removed. Free some space and run again."
        if self.key is None or isinstance(error, TwinmergeError):  # running a mistake again would not mend it
            with contextlib.suppress(OSError):
                _clear(self.partial)
        elif full:
            needed, free = self._space()
            missing = f"{needed - free} bytes are missing" if needed > free else "the disk or your share of it is full"
            advice = f"{missing}. Free some space and run the same command again: it goes on where it stopped."
        self._unlock()
        if full:
            raise TwinmergeError(f"No space left while writing {self.folder}; {advice}") from error

    def _space(self) -> tuple[int, int]:
        """Bytes that are still needed and bytes that are free; what lies in `.partial` is used again or removed."""
        there = 0
        for folder, _, files in os.walk(self.partial):
            for file in files:
                with contextlib.suppress(OSError):  # gone since
                    found = os.lstat(os.path.join(folder, file))
                    there += getattr(found, "st_blocks", 0) * 512
        parent = next(p for p in [self.folder.absolute(), *self.folder.absolute().parents] if p.exists())
        return max(self.needed_bytes - there, 0), shutil.disk_usage(parent).free

    def _begin(self) -> None:
        journal = self.partial / JOURNAL
        lines = None if self.key is None else _read_journal(journal, self.key)
        if lines is None:
            _clear(self.partial)
        self.done = lines or []
        if self.key is not None:
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if lines is None:
                self.record({"key": self.key})

    def _appear(self) -> None:
        try:
            (self.partial / JOURNAL).unlink(missing_ok=True)
            if self.folder.exists():
                self.folder.rmdir()
            # The lock is held until the name has changed: nobody may take what is whole for a stale rest before.
            os.replace(self.partial, self.folder)
        except OSError as error:
            self._unlock()
            raise TwinmergeError(
                f"The output is whole in {self.partial}, but cannot be named {self.folder}: {error}. Rename it."
            ) from error
        self._unlock(self.folder)

    def _unlock(self, folder: Path | None = None) -> None:
        """Give the lock back, and remove the `.partial` if nothing else is in it."""
        with contextlib.suppress(OSError):
            ((folder or self.partial) / LOCK).unlink()
        if folder is None:
            with contextlib.suppress(OSError):
                self.partial.rmdir()
        if self._lock is not None:
            _HELD.discard(self._lock)
            os.close(self._lock)
            self._lock = None


class CheckpointWriter:
    """The safetensors files of a model, made at once in their full length and then filled in any order, by any thread.

    A file that is there with just this header and length is kept, so that writing can go on after an interruption.

    Args:
        folder: where; it must be there.
        files: as `layout` gives them.
        metadata: of each file.

    Attributes:
        kept: every file was there, so what was written before is in its place; otherwise a journal of it is void.

    Example:
        >>> import numpy, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> writer = CheckpointWriter(folder, {"model.safetensors": {"w": Spec("I8", (2, 2))}})
        >>> writer.write("w", 2, numpy.array([3, 4], numpy.uint8))
        >>> writer.write("w", 0, numpy.array([1, 2], numpy.uint8))
        >>> writer.finish()
        >>> (folder / "model.safetensors").read_bytes()[-4:]
        b'\\x01\\x02\\x03\\x04'
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Mapping[str, Spec]], metadata: Mapping[str, str] = PYTORCH
    ) -> None:
        self._folder = folder
        self._files = files
        self._handles: list[OpenFile] = []
        self._place: dict[str, tuple[OpenFile, int, Spec]] = {}
        self.kept = True
        for file, specs in files.items():
            header = header_of(specs, metadata)
            handle, offset = OpenFile(folder / file, writable=True), len(header)
            for name, spec in specs.items():
                self._place[name] = (handle, offset, spec)
                offset += spec.bytes
            if not _is_begun(folder / file, header, offset):
                self.kept = False
                _begin(folder / file, header, offset)
            self._handles.append(handle)

    def write(self, name: str, start: int, flat: Flat) -> None:
        """Put a tensor's elements from `start` on in their place, without a copy.

        Args:
            name: of the tensor.
            start: its first element that is written.
            flat: contiguous, 1-D, on the CPU, of the dtype laid out; or bytes.

        Errors:
            ValueError: elements that the tensor does not have, or another kind of `flat`.
            OSError: the disk is full or fails.
        """
        handle, offset, spec = self._place[name]
        check_range(name, spec, start, flat)
        with handle.use() as fd:
            write_from(fd, bytes_of(flat), offset + start * spec.itemsize)
            if flat.nbytes >= SYNC_BYTES:  # small parts share pages, which would be written again and again
                begin_to_sync(fd, offset + start * spec.itemsize, flat.nbytes)

    def read_into(self, name: str, start: int, flat: Flat) -> None:
        """Fill `flat` with what lies where `write` would put it; nothing that was written reads as zeros.

        Errors:
            ValueError, OSError: as `write`.
        """
        handle, offset, spec = self._place[name]
        check_range(name, spec, start, flat)
        with handle.use() as fd:
            read_into(fd, bytes_of(flat), offset + start * spec.itemsize)

    def sync(self) -> None:
        """Return when all that is written is on the disk."""
        for handle in self._handles:
            with handle.use() as fd:
                os.fsync(fd)

    def finish(self) -> None:
        """Sync and close the files, and write the index where there are shards."""
        self.sync()
        self.close()
        if len(self._files) > 1:
            total = sum(spec.bytes for _, _, spec in self._place.values())
            weight_map = {name: file for file, specs in self._files.items() for name in specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def close(self) -> None:
        """Close the files as they are."""
        for handle in self._handles:
            handle.close()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the context no other process changes the folder, if it asks too.

    Errors:
        TwinmergeError: one does.
    """
    fd = _lock(folder / LOCK, folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        if fd is not None:
            _HELD.discard(fd)
            os.close(fd)


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append the tensor's bytes; the file object loops over short writes."""
    file.write(bytes_of(tensor.detach().contiguous().reshape(-1).cpu()))


def layout(specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES) -> dict[str, dict[str, Spec]]:
    """File name -> its tensors: by name into shards of at most `shard_bytes`, wide dtypes first inside (alignment)."""
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + specs[name].bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = specs[name]
        size += specs[name].bytes
    shards = [dict(sorted(s.items(), key=lambda item: (-item[1].itemsize, item[0]))) for s in shards]
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_checkpoint(
    folder: Path, files: Mapping[str, Mapping[str, Spec]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write the tensors, which come in the order of `files` (see `layout`), with the index where there are shards.

    One tensor is held in memory at a time.
    """
    stream = iter(tensors)
    writer = CheckpointWriter(folder, files)
    try:
        for specs in files.values():
            for name, spec in specs.items():
                got, tensor = next(stream)
                if got != name or spec != Spec(tensor.dtype, tuple(tensor.shape)):
                    raise AssertionError(f"laid out {name} {spec}, got {got} {tensor.dtype} {tuple(tensor.shape)}")
                writer.write(name, 0, tensor.detach().contiguous().reshape(-1).cpu())
        writer.finish()
    finally:
        writer.close()


def _is_begun(file: Path, header: bytes, size: int) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as there:
        return there.read(len(header)) == header


def _begin(file: Path, header: bytes, size: int) -> None:
    """Make `file` with this header and size; never through a link that somebody put in its place."""
    file.unlink(missing_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        write_from(fd, header, 0)
        os.ftruncate(fd, size)
    finally:
        os.close(fd)


def _read_journal(file: Path, key: str) -> list[dict[str, Any]] | None:
    """The lines after the first, or None where it is not the journal of `key`; a torn end is cut off."""
    if file.is_symlink() or not file.is_file():
        return None
    lines, whole = [], 0
    for text in file.read_bytes().split(b"\n")[:-1]:  # what follows the last newline was being written
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
        whole += len(text) + 1
    if not lines or lines[0] != {"key": key}:
        return None
    os.truncate(file, whole)
    return lines[1:]


def _clear(folder: Path) -> None:
    """Remove everything in `folder` but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _lock(file: Path, output: Path) -> int | None:
    """Make the lock's folder and take the lock.

    Returns:
        A descriptor that holds it, or None where the system knows no such locks and the file itself is the lock.

    Errors:
        TwinmergeError: another process holds it.
    """
    busy = f"The output {output} is being written by another process. Wait for it, or name another folder"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | (0 if fcntl else os.O_EXCL)
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(file, flags, 0o666)
        except FileNotFoundError:  # another process renamed or removed the folder just now
            continue
        except FileExistsError:
            raise TwinmergeError(f"{busy}; if there is none, remove {file}.") from None
        if not fcntl:
            os.close(fd)
            return None
        held = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.path.samestat(os.fstat(fd), os.stat(file))  # or it is a lock that was removed meanwhile
        except BlockingIOError:
            raise TwinmergeError(f"{busy}.") from None
        except (
            FileNotFoundError
        ):  # the folder was renamed while the lock was opened: it may have been made in the finished one
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), os.stat(output / LOCK)):
                    (output / LOCK).unlink()
        finally:
            if not held:
                os.close(fd)
        if held:
            _HELD.add(fd)
            return fd
