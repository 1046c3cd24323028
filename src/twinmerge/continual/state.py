"""The state file: what is kept of the experts so far, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.errors import DataError, OutputError
from twinmerge.store import disk
from twinmerge.store.artefact import LONGEST, Artefact, ArtefactFile, ArtefactWriter, open_artefact, undamaged
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checksum import UNSEALED
from twinmerge.store.foreign import find
from twinmerge.store.partial import DISK_FULL

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "state.safetensors"
KIND, VERSION = "continual", 3  # 3: names the heads of its experts


@dataclass(frozen=True)
class AddedExpert:
    """One expert that is in the state. model: where it was read from; fingerprint: of that model; content: checksum
    of all that was read of it; norm: ‖τ‖; head: checksum of the file of its head, None without one."""

    name: str
    model: str
    fingerprint: str
    content: str
    norm: float
    licence: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Description:
    """What the state is of.

    base_model: where the base was; method, parameters: of the fold; heads: patterns of tensors that stay with each
    expert; dtype: of the sums; experts: in their order; removed: names that were taken out again; state_norm:
    ‖state‖; twin: the folder of a twin that took the last expert too, and the key of its output, which only lacked
    its name when the state was written.
    """

    base_model: str
    method: str
    parameters: dict[str, Any]
    heads: tuple[str, ...] = ()
    dtype: str = "float64"
    experts: tuple[AddedExpert, ...] = ()
    removed: tuple[str, ...] = ()
    state_norm: float = 0.0
    twin: tuple[str, str] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Description:
        known = {key: value for key, value in header.items() if key != "seal"}  # version 2 had one of its own
        experts = tuple(AddedExpert(**expert) for expert in known.pop("experts"))
        heads, removed = tuple(known.pop("heads")), tuple(known.pop("removed"))
        twin = known.pop("twin")
        known["twin"] = None if twin is None else (str(twin[0]), str(twin[1]))
        found = cls(experts=experts, heads=heads, removed=removed, **known)
        if len(set(found.names)) != len(found.names) or not all(np.isfinite([e.norm for e in experts])):
            raise ValueError("experts")
        return found


class StateFile:
    """An opened state; its header at once, its tensors on demand.

    Attributes:
        folder.
        base: fingerprint of the base model.
        about: the description.
        specs: "part/tensor" -> dtype and shape.
        expected: the same -> checksum.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / FILE
        if find(folder, FILE) is None:
            raise DataError(
                f"{folder} is no continual state: it has no {FILE}. Make one with `twinmerge continual init`."
            )
        self._open = contextlib.ExitStack()
        self._opened = self._held()
        self.base, self.specs, self.expected = self._opened.artefact.base, self._opened.specs, self._opened.expected
        with undamaged(self.file):
            self.about = Description.of(self._opened.artefact.header)
            if self.specs.keys() != self.expected.keys():
                raise ValueError("checksums")

    def _held(self) -> ArtefactFile:
        """The file, which stays open: another state may take its name meanwhile."""
        while True:
            opened = open_artefact(self.file, KIND, VERSION)
            if opened.artefact.version < VERSION:
                raise DataError(
                    f"{self.file} has version {opened.artefact.version} of its layout, which does not name the heads "
                    "of its experts. Make the state again."
                )
            try:
                (self._fd,) = self._open.enter_context(opened.held())
            except OSError:  # replaced between header and opening
                opened.close()
                continue
            return opened

    def read_range(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill the bytes of `out` with elements from `start` on, flat."""
        self._opened.read_into(key, start, out)

    def is_current(self) -> bool:
        """Whether the folder still has this state, and no later one."""
        try:
            now, mine = self.file.stat(), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return os.path.samestat(now, mine) and now.st_mtime_ns == mine.st_mtime_ns

    def close(self) -> None:
        self._open.close()
        self._opened.close()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StateWriter:
    """The next state beside the present one, which it replaces by a rename once everything is on the disk.

    The header comes first in the file but is known last, so room is kept for it.

    Args:
        folder: of the state.
        base: fingerprint of the base model.
        about: description whose state_norm, and last expert's content and norm are not known yet.
        specs: "part/tensor" -> dtype and shape.
    """

    def __init__(self, folder: Path, base: str, about: Description, specs: Mapping[str, Spec]) -> None:
        self.folder, self.base = folder, base
        self.partial = folder / f"{FILE}.partial"
        experts = tuple(replace(expert, norm=LONGEST, content=UNSEALED) for expert in about.experts)
        room = replace(about, state_norm=LONGEST, experts=experts)
        disk.remove(self.partial)  # of a run that was killed
        self._writer = ArtefactWriter(self.partial, self._artefact(room), specs)

    def write(self, key: str, start: int, flat: NDArray[np.uint8]) -> None:
        self._writer.write(key, start, flat)

    def commit(self, about: Description) -> None:
        """Write the header, sync, and take the place of the present state."""
        self._writer.finish(self._artefact(about))
        disk.rename(self.partial, self.folder / FILE)
        disk.sync_path(self.folder)

    def _artefact(self, about: Description) -> Artefact:
        return Artefact(KIND, VERSION, self.base, asdict(about), {})


@contextlib.contextmanager
def next_state(folder: Path, base: str, about: Description, specs: Mapping[str, Spec]) -> Iterator[StateWriter]:
    """A writer that leaves nothing behind unless it commits.

    Raises:
        TwinmergeError: the disk is full or cannot be written; the old state is whole.
    """
    writer = None
    try:
        writer = StateWriter(folder, base, about, specs)
        yield writer
    except OSError as error:
        advice = "Free some space" if error.errno in DISK_FULL else "Look at the disk"
        raise OutputError(
            f"The state {folder} could not be written: {error}. It is as before. {advice} and run again."
        ) from error
    finally:
        if writer is not None:
            writer._writer.close()
        with contextlib.suppress(OSError):
            disk.remove(folder / f"{FILE}.partial")
