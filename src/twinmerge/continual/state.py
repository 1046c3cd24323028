"""The state file: what is kept of the experts so far, replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.errors import TwinmergeError
from twinmerge.store.artefact import Artefact, in_order, metadata_of, open_artefact, undamaged
from twinmerge.store.checkpoint import Spec
from twinmerge.store.checksum import joined
from twinmerge.store.foreign import find
from twinmerge.store.output import DISK_FULL, CheckpointWriter, header_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "state.safetensors"
KIND, VERSION = "continual", 2
UNKNOWN = "?" * 32  # as long as a checksum
LONGEST = -1.2345678901234567e-300  # no float64 is written longer


@dataclass(frozen=True)
class Arrived:
    """One expert that is in the state. model: where it was read from; fingerprint: of that model; content: checksum of all that
    was read of it; norm: ‖τ‖; head: label names of its head, None without one."""

    name: str
    model: str
    fingerprint: str
    content: str
    norm: float
    licence: str | None = None


@dataclass(frozen=True)
class Description:
    """What the state is of.

    base_model: where the base was; method, parameters: of the fold; heads: patterns of tensors that stay with each expert; dtype: of the
    sums; experts: in their order; removed: names that were taken out again; state_norm: ‖state‖; checksums: part -> checksum;
    seal: checksum of all of that, empty before it is written.
    """

    base_model: str
    method: str
    parameters: dict[str, Any]
    heads: tuple[str, ...] = ()
    dtype: str = "float64"
    experts: tuple[Arrived, ...] = ()
    removed: tuple[str, ...] = ()
    state_norm: float = 0.0
    checksums: dict[str, str] = field(default_factory=dict)
    seal: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(expert.name for expert in self.experts)

    @classmethod
    def of(cls, header: Mapping[str, Any]) -> Description:
        known = dict(header)
        experts = tuple(Arrived(**expert) for expert in known.pop("experts"))
        heads, removed = tuple(known.pop("heads")), tuple(known.pop("removed"))
        found = cls(experts=experts, heads=heads, removed=removed, **known)
        if len(set(found.names)) != len(found.names) or not all(np.isfinite([e.norm for e in experts])):
            raise ValueError("experts")
        if found.sealed() != found:
            raise ValueError("seal")
        return found

    def sealed(self) -> Description:
        text = json.dumps(asdict(replace(self, seal="")), sort_keys=True)
        return replace(self, seal=joined([text]))


class StateFile:
    """An opened state; its header at once, its tensors on demand.

    Attributes:
        folder; base: fingerprint of the base model; about: the description; specs: "part/tensor" -> dtype and shape.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / FILE
        if find(folder, FILE) is None:
            raise TwinmergeError(
                f"{folder} is no continual state: it has no {FILE}. Make one with `twinmerge continual init`."
            )
        artefact, self._checkpoint = open_artefact(self.file, KIND, VERSION)
        self.base, self.specs = artefact.base, self._checkpoint.specs
        with undamaged(self.file):
            self.about = Description.of(artefact.header)
            if set(self.specs) != set(self.about.checksums):
                raise ValueError("checksums")

    def read_range(self, key: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill the bytes of `out` with elements from `start` on, flat."""
        self._checkpoint.read_into(key, start, out)

    def bytes(self) -> int:
        return self.file.stat().st_size

    def close(self) -> None:
        self._checkpoint.close()

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
        folder: of the state; base: fingerprint of the base model; about: description whose state_norm, checksums, and last expert's
            content and norm are not known yet; specs: "part/tensor" -> dtype and shape.
    """

    def __init__(self, folder: Path, base: str, about: Description, specs: Mapping[str, Spec]) -> None:
        self.folder, self.base, self.specs = folder, base, in_order(specs)
        self.partial = folder / f"{FILE}.partial"
        room = replace(
            about,
            state_norm=LONGEST,
            seal=UNKNOWN,
            checksums=dict.fromkeys(self.specs, UNKNOWN),
            experts=tuple(replace(expert, norm=LONGEST, content=UNKNOWN) for expert in about.experts),
        )
        metadata = metadata_of(self._artefact(room))
        self._room = len(header_of(self.specs, metadata))
        self._writer = CheckpointWriter(folder, {self.partial.name: self.specs}, metadata)

    def write(self, key: str, start: int, flat: NDArray[np.uint8]) -> None:
        self._writer.write(key, start, flat)

    def commit(self, about: Description) -> None:
        """Write the header, sync, and take the place of the present state."""
        header = header_of(self.specs, metadata_of(self._artefact(about.sealed())))
        text = header[8:].rstrip(b" ")
        if len(text) > self._room - 8:
            raise AssertionError("the header is longer than the room that was kept for it")
        self._writer.finish()
        with self.partial.open("r+b") as out:
            out.write(struct.pack("<Q", self._room - 8) + text.ljust(self._room - 8))
            out.flush()
            os.fsync(out.fileno())
        os.replace(self.partial, self.folder / FILE)
        _sync_folder(self.folder)

    def _artefact(self, about: Description) -> Artefact:
        return Artefact(KIND, VERSION, self.base, asdict(about), {})


@contextlib.contextmanager
def next_state(folder: Path, base: str, about: Description, specs: Mapping[str, Spec]) -> Iterator[StateWriter]:
    """A writer that leaves nothing behind unless it commits.

    Errors:
        TwinmergeError: the disk is full or cannot be written; the old state is whole.
    """
    writer = None
    try:
        writer = StateWriter(folder, base, about, specs)
        yield writer
    except OSError as error:
        advice = "Free some space" if error.errno in DISK_FULL else "Look at the disk"
        raise TwinmergeError(
            f"The state {folder} could not be written: {error}. It is as before. {advice} and run again."
        ) from error
    finally:
        if writer is not None:
            writer._writer.close()
        with contextlib.suppress(OSError):
            (folder / f"{FILE}.partial").unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """The rename itself on the disk, where the system lets a folder be synced."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
