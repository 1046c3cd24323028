"""Outputs that appear under their name only when they are whole: folders with a manifest, and single files.

Longer than other files: folders and files appear in one way, step by step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from twinmerge.errors import OutputError, TwinmergeError, UsageError
from twinmerge.progress import logged
from twinmerge.store import disk
from twinmerge.store.checkpoint import is_in_use
from twinmerge.store.manifest import Manifest, write_manifest
from twinmerge.store.partial import (
    CONTENT,
    DISK_FULL,
    HELD,
    JOURNAL,
    LOCK,
    REPLACED,
    first_line,
    is_no_folder,
    is_ours,
    lock_file,
    read_journal,
)


class _Output(ABC):
    """What folders and files share: `<name>.partial`, a folder with a lock, a journal, and what will get the name.

    A `.partial` without a lock and a journal of ours is somebody else's, and is left alone.

    Attributes:
        before_naming: is called once all is on the disk, just before it gets its name; where it fails, so does the
            output.

    Args:
        target: what will be there.
        key: what identifies the work, None for one that is always begun anew.
        needed_bytes: of space.
    """

    what = "folder"

    def __init__(self, target: str | os.PathLike[str], key: str | None, needed_bytes: int) -> None:
        self.target = Path(target)
        if self.target.name in ("", ".."):
            raise UsageError(f"The output {self.target} has no name of its own. Name a folder, such as ./merged.")
        self.partial = self.target.with_name(self.target.name + ".partial")
        self.content = self.partial / CONTENT
        self.needed_bytes = needed_bytes
        self.key = key
        self.done: list[dict[str, Any]] = []
        self.before_naming: Callable[[], object] | None = None
        self._lock: int | None = None
        self._journal: int | None = None

    def check(self) -> None:
        """Refuse now what would fail later."""
        if self.target.is_symlink():
            raise UsageError(f"The output {self.target} is a link. Name the {self.what} itself.")
        try:
            self._check_target()
        except TwinmergeError:
            self._clear()
            raise
        if is_no_folder(self.partial):
            raise UsageError(
                f"{self.partial}, where the output is written first, is no folder. Remove it or name another output."
            )
        if not is_ours(self.partial):
            raise UsageError(
                f"{self.partial}, where the output is written first, is there already and was not made by twinmerge, "
                "or by an older release. Move it away or name another output."
            )
        if self.partial.exists() and is_in_use(self.partial):
            raise UsageError(
                f"{self.partial}, where the output is written first, holds an input. Move that away or name another "
                "output."
            )
        needed, free = self._space()
        if free < needed:
            raise OutputError(
                f"No space for {self.target}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
                "Free some, or name a folder on another disk."
            )

    def record(self, line: dict[str, Any]) -> None:
        """Append one JSON object to the journal, from any thread; record a piece once its bytes are written.

        A journal survives the death of the process, and of the machine if the bytes were synced before.
        """
        assert self._journal is not None and self.key is not None, "only inside the with, and with a key"
        disk.append(self._journal, json.dumps(line).encode() + b"\n")

    def __enter__(self) -> Path:
        self.check()
        try:
            self._lock = lock_file(self.partial / LOCK, self.target)
            try:
                self.check()  # the process that had the lock may have finished since the first look
                self._begin()
            except BaseException:
                if self._journal is not None and not self.done:  # nothing is lost with it
                    self._close()
                    with contextlib.suppress(OSError):
                        disk.remove_tree(self.content)
                    with contextlib.suppress(OSError):
                        disk.remove(self.partial / JOURNAL)
                self._close()
                self._unlock()
                raise
        except OSError as error:
            raise OutputError(f"The output {self.target} cannot be made: {error}. Name another one.") from error
        return self.content

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure, named = error, False
        if failure is None:
            try:
                with logged(f"synced {self.target} to the disk", "store"):
                    self._complete()
                    self._sync()
                if self.before_naming is not None:
                    self.before_naming()
                named = True
                self._appear()
            except BaseException as late:
                failure = late
        self._close()
        if failure is None:
            self._unlock()
            return
        full = isinstance(failure, OSError) and failure.errno in DISK_FULL
        advice = "what was written is removed. Free some space and run again."
        if not named and (self.key is None or isinstance(failure, TwinmergeError)):
            with contextlib.suppress(OSError):  # running a mistake again would not mend it
                disk.remove_tree(self.content)
                disk.remove(self.partial / JOURNAL)
        elif full:
            needed, free = self._space()
            missing = f"{needed - free} bytes are missing" if needed > free else "the disk or your share of it is full"
            advice = f"{missing}. Free some space and run the same command again: it goes on where it stopped."
        self._unlock()
        if isinstance(failure, KeyboardInterrupt):
            failure.add_note(self._left())
        if full:
            raise OutputError(f"No space left while writing {self.target}; {advice}") from failure
        if error is None:
            raise failure

    def _left(self) -> str:
        """What is there of it, and how to go on, for who interrupted the work."""
        if not os.path.lexists(self.content):
            return f"Nothing of {self.target} is left on the disk. Run the same command again: it begins anew."
        return (
            f"{self.partial} holds what is done of {self.target}. Run the same command again: it goes on from there; or "
            "remove that folder."
        )

    @abstractmethod
    def _check_target(self) -> None:
        """Refuse what has the name."""

    def _clear(self) -> None:
        """Remove the `.partial` of a run that was killed just after its output got the name."""
        if self.partial.is_symlink() or not self.partial.is_dir() or not is_ours(self.partial):
            return
        with contextlib.suppress(OSError, TwinmergeError):  # it is somebody's who is at work
            if {path.name for path in self.partial.iterdir()} - {LOCK, JOURNAL, REPLACED}:
                return
            self._lock = lock_file(self.partial / LOCK, self.target)
            try:
                if not os.path.lexists(self.content):
                    if os.path.lexists(self.target):
                        disk.remove_tree(self.partial / REPLACED)
                    disk.remove(self.partial / JOURNAL)
            finally:
                self._unlock()

    def _complete(self) -> None:  # noqa: B027 (most have none)
        """The last things that are written."""

    def _tidy(self) -> None:
        """Make the content as it was when its journal ended."""
        with contextlib.suppress(FileNotFoundError):
            disk.remove_tree(self.content)

    def _space(self) -> tuple[int, int]:
        """Bytes that are still needed and bytes that are free; what lies in `.partial` is used again or removed."""
        there = 0
        for folder, _, files in os.walk(self.partial):
            for file in files:
                with contextlib.suppress(OSError):  # gone since
                    found = os.lstat(os.path.join(folder, file))
                    there += getattr(found, "st_blocks", 0) * 512
        parent = next(p for p in [self.target.absolute(), *self.target.absolute().parents] if p.exists())
        return max(self.needed_bytes - there, 0), shutil.disk_usage(parent).free

    def _begin(self) -> None:
        journal = self.partial / JOURNAL
        lines = None if self.key is None else read_journal(journal, self.key)
        if lines is None:
            with contextlib.suppress(FileNotFoundError):
                disk.remove_tree(self.content)
            disk.remove(journal)
        self.done = lines or []
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | disk.NO_LINK
        self._journal = disk.call(os.open, journal, flags, 0o666)
        if lines is None:
            disk.append(self._journal, first_line(self.key))
        self._tidy()

    def _sync(self) -> None:
        if self.content.is_dir():
            disk.sync_tree(self.content)
        else:
            disk.sync_path(self.content)

    def _appear(self) -> None:
        try:
            disk.rename(self.content, self.target)
        except OSError as error:
            raise OutputError(
                f"The output is whole in {self.content}, but cannot be named {self.target}: {error}. Rename it."
            ) from error
        with contextlib.suppress(OSError):  # it has its name, and what is left of the `.partial` is known to be ours
            disk.sync_path(self.target.absolute().parent)
            # The lock is held until all is over: nobody may take what is whole for a stale rest before.
            disk.remove(self.partial / JOURNAL)

    def _close(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _unlock(self) -> None:
        """Give the lock back, and remove the `.partial` if nothing else is in it."""
        with contextlib.suppress(OSError):
            disk.remove(self.partial / LOCK)
        with contextlib.suppress(OSError):
            disk.remove_folder(self.partial)
        if self._lock is not None:
            HELD.discard(self._lock)
            os.close(self._lock)
            self._lock = None


class OutputFolder(_Output):
    """A folder that appears under its name only when everything in it is written.

    Files go to a folder in `<name>.partial`, which gets the name at the end, with a manifest of all files. After an
    error it is removed; with a `key` it is left, unless the error is the user's, and the next run with the same key
    goes on from what its journal says is done. One process at a time.

    Args:
        folder: the output; not there yet, or empty.
        needed_bytes: compared with the free space, plus what a `.partial` of an earlier run occupies.
        key: what identifies the work: same key, same bytes.
        kept: the files that a journal speaks of; whatever else an earlier run left is removed and written anew.
        manifest: write one; not for a folder whose files will change.
        offers: whoever writes it can be asked to overwrite, which the refusal says.
        overwrite: a folder that has the name and was written here gives way at the end. Where a process dies between
            the two renames, it lies in `<name>.partial/replaced`, and gets its name back at the next run.

    Attributes:
        done: inside the `with`, what earlier runs with this key recorded.
        sums: of tensors, for the manifest (see `store/manifest.py`).

    Raises:
        TwinmergeError: the folder exists and is not empty, cannot be made, another process writes it, its `.partial`
            is somebody else's, or the disk is full.

    Example:
        >>> import tempfile
        >>> where = Path(tempfile.mkdtemp()) / "out"
        >>> def run(fail):
        ...     output = OutputFolder(where, key="recipe 1", kept=["a.txt"])
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
        ['a.txt', 'twinmerge.checksums.json']
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        needed_bytes: int = 0,
        key: str | None = None,
        *,
        kept: Collection[str] = (),
        manifest: bool = True,
        overwrite: bool = False,
        offers: bool = False,
    ) -> None:
        super().__init__(folder, key, needed_bytes)
        self.folder, self._kept, self._manifest, self._overwrite = self.target, set(kept), manifest, overwrite
        self._offers = offers
        self.sums: dict[str, Mapping[str, str]] = {}

    def finish(self) -> bool:
        """Give its name to what an earlier run with this key left whole; False where it left no such thing."""
        if self.key is None or not is_ours(self.partial):
            return False
        if read_journal(self.partial / JOURNAL, self.key) is None:
            self._clear()
            return False
        self._lock = lock_file(self.partial / LOCK, self.target)
        try:
            whole = not self.content.is_symlink() and Manifest.of(self.content) is not None
            if whole:
                self._check_target()
                self._appear()
            elif not self.content.exists():  # it has its name
                disk.remove(self.partial / JOURNAL)
        finally:
            self._unlock()
        return whole

    def _check_target(self) -> None:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        if not self._overwrite:
            more = " or add --overwrite (overwrite=True), since twinmerge wrote it" if self._may_give_way() else ""
            comma = "," if more else " or"
            raise UsageError(
                f"The output {self.folder} is there already and not empty. Name another one{comma} remove it{more}."
            )
        if not self.folder.is_dir() or Manifest.of(self.folder) is None:
            raise UsageError(f"{self.folder} was not written by twinmerge, so it is not overwritten. Move it away.")
        if is_in_use(self.folder):
            raise UsageError(f"The output {self.folder} is one of the inputs. Name another one.")

    def _may_give_way(self) -> bool:
        """Whether it would be overwritten if that was asked."""
        with contextlib.suppress(TwinmergeError):
            ours = self.folder.is_dir() and Manifest.of(self.folder) is not None
            return self._offers and ours and not is_in_use(self.folder)
        return False

    def _begin(self) -> None:
        replaced = self.partial / REPLACED
        if self._overwrite and replaced.is_dir() and not os.path.lexists(self.target):
            disk.rename(replaced, self.target)  # a process died between the two renames
        super()._begin()

    def _appear(self) -> None:
        replaced = self.partial / REPLACED
        if not self._overwrite or not self.folder.exists():
            super()._appear()
            return
        with contextlib.suppress(FileNotFoundError):
            disk.remove_tree(replaced)
        disk.rename(self.folder, replaced)
        super()._appear()
        with contextlib.suppress(OSError):
            disk.remove_tree(replaced)
            disk.remove_folder(self.partial)

    def _tidy(self) -> None:
        if self.content.is_symlink() or not self.content.is_dir():
            disk.remove(self.content)
            disk.make_folder(self.content)
        for path in sorted(self.content.rglob("*"), reverse=True):  # what is inside before what it is in
            name = path.relative_to(self.content).as_posix()
            leads = path.is_dir() and not path.is_symlink() and any(kept.startswith(f"{name}/") for kept in self._kept)
            if not leads and (name not in self._kept or path.is_dir()):
                disk.remove_tree(path)

    def _complete(self) -> None:
        if self._manifest:
            write_manifest(self.content, self.sums)


class OutputFile(_Output):
    """A single file that appears under its name only when it is whole; the context gives the path to write it to.

    Args:
        file: the output.
        replace: a file that has the name gives way at the end; without, it is refused.

    Raises:
        TwinmergeError: a link or a folder has the name, another process writes it, as `OutputFolder`.

    Example:
        >>> import tempfile
        >>> where = Path(tempfile.mkdtemp()) / "a.json"
        >>> with OutputFile(where) as file:
        ...     disk.write_text(file, "{}")
        ...     print(where.exists())
        False
        >>> where.read_text(), [path.name for path in where.parent.iterdir()]
        ('{}', ['a.json'])
    """

    what = "file"

    def __init__(self, file: str | os.PathLike[str], needed_bytes: int = 0, *, replace: bool = False) -> None:
        super().__init__(file, None, needed_bytes)
        self.content = self.partial / f"{CONTENT}{self.target.suffix}"  # which some writers tell the format by
        self._replace = replace

    def _check_target(self) -> None:
        if self.target.exists() and not (self._replace and self.target.is_file()):
            raise UsageError(f"The output {self.target} is there already. Name another one or remove it.")


def replace_text(file: Path, text: str) -> None:
    """A file with this text, whole, in the place of one that has the name.

    Raises:
        TwinmergeError: as `OutputFile`.
    """
    with OutputFile(file, replace=True) as new:
        disk.write_text(new, text)
