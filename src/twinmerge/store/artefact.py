"""The one format of everything that is not a model: safetensors with a JSON header of kind, version, base and
checksums.

The header carries the checksum of every tensor, and a seal: the checksum of the header's own bytes, names, dtypes and
shapes included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import DamagedFile, DataError, TwinmergeError
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.checkpoint_writer import CheckpointWriter
from twinmerge.store.checksum import UNSEALED, is_sealed, sealed
from twinmerge.store.foreign import find, parse_json
from twinmerge.store.header import header_of, raw_header
from twinmerge.store.manifest import SEAL

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

KEY, SUMS = "twinmerge", "checksums"
LONGEST = -1.2345678901234567e-300  # no float64 is written longer: it keeps room for one
SAMPLE = 4096  # elements of each tensor that enter a fingerprint


class Artefact(NamedTuple):
    """kind: what it is ("twin", "router", "heads", ...); version: of that kind's layout; base: fingerprint of the
    model that it belongs to; header: the kind's own JSON; tensors: by name."""

    kind: str
    version: int
    base: str
    header: dict[str, Any]
    tensors: dict[str, Tensor]


def fingerprint(specs: Mapping[str, Spec], beginning: Callable[[str, int], NDArray[np.uint8]]) -> str:
    """SHA-256 over names, dtypes, shapes and the first 4,096 elements of every tensor.

    Tells models apart at the cost of a few pages per tensor; it is no checksum of the files.

    Args:
        beginning: gives the bytes of the first so many elements of a tensor, flat.
    """
    digest = hashlib.sha256()
    for name in sorted(specs):
        digest.update(f"{name}\0torch.{specs[name].name}\0{specs[name].shape}\0".encode())
        digest.update(beginning(name, min(SAMPLE, specs[name].numel)).data)
    return digest.hexdigest()


class ArtefactFile(Checkpoint):
    """An opened artefact: what it says at once, its tensors on demand.

    Attributes:
        artefact: without its tensors.
        sealed: it carries checksums of everything, as all do that this release writes.
    """

    def __init__(self, file: Path) -> None:
        super().__init__([file])
        self.file, self.advice = file, "Copy the whole folder again, or build it again."
        try:
            head = parse_json(self.metadata[KEY], finite=False)
            self.expected = _split(head.pop(SUMS, {}), self.specs)
            self.artefact = Artefact(head.pop("kind"), int(head.pop("version")), head.pop("base"), head, {})
        except (LookupError, ArithmeticError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{file} is no twinmerge artefact. Build it again.") from error
        self.sealed = SEAL in self.metadata
        if self.sealed and not (is_sealed(raw_header(file)) and self.expected.keys() == self.specs.keys()):
            raise damaged(file)

    def check_all(self) -> None:
        """Read every tensor and compare it with its checksum.

        Raises:
            TwinmergeError: one that differs.
        """
        for name in self.specs:
            self.check(name)


class ArtefactWriter:
    """An artefact whose tensors are filled in any order, by any thread; its header is sealed last.

    The header comes first in the file but is known last, so room is kept for it.

    Args:
        file: that is made.
        artefact: what the header says; its tensors are not looked at. Where some of it is not known yet, something
            that is at least as long as it will be.
        specs: name -> dtype and shape.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.safetensors"
        >>> writer = ArtefactWriter(file, Artefact("toy", 1, "", {"n": 10}, {}), {"w": Spec("I8", (2,))})
        >>> writer.write("w", 0, np.array([1, 2], np.uint8))
        >>> writer.finish(Artefact("toy", 1, "", {"n": 3}, {}))
        >>> found = load_artefact(file, "toy", 1)
        >>> found.header, found.tensors["w"].tolist()
        ({'n': 3}, [1, 2])
    """

    def __init__(self, file: Path, artefact: Artefact, specs: Mapping[str, Spec]) -> None:
        self.file, self.artefact, self.specs = file, artefact, in_order(specs)
        metadata = _metadata(artefact, dict.fromkeys(self.specs, UNSEALED))
        self._room = len(header_of(self.specs, metadata))
        self._writer = CheckpointWriter(file.parent, {file.name: self.specs}, metadata)

    def write(self, name: str, start: int, flat: Flat) -> None:
        """As `CheckpointWriter.write`."""
        self._writer.write(name, start, flat)

    def finish(self, artefact: Artefact | None = None) -> None:
        """Seal the header with the checksums of the tensors, sync and close.

        Args:
            artefact: what the header says, where more is known by now.
        """
        header = header_of(self.specs, _metadata(artefact or self.artefact, self._writer.sums()))
        text = header[8:].rstrip(b" ")
        length = self._room - 8
        if len(text) > length:
            raise AssertionError("the header is longer than the room that was kept for it")
        self._writer.rewrite(self.file.name, sealed(length.to_bytes(8, "little") + text.ljust(length)))
        self._writer.sync()
        self.close()

    def close(self) -> None:
        """Close the file as it is."""
        self._writer.close()


def save_artefact(file: Path, artefact: Artefact) -> None:
    """Write `file`; the bytes depend on the artefact only."""
    specs = _specs(artefact)
    with closing(ArtefactWriter(file, artefact, specs)) as writer:
        for name in specs:
            writer.write(name, 0, artefact.tensors[name].detach().contiguous().reshape(-1).cpu())
        writer.finish()


def artefact_bytes(artefact: Artefact) -> int:
    """How long the file will be."""
    specs = _specs(artefact)
    header = header_of(specs, _metadata(artefact, dict.fromkeys(specs, UNSEALED)))
    return len(header) + sum(spec.bytes for spec in specs.values())


def in_order(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The tensors in the order of the file: wide dtypes first (alignment), then by name."""
    return dict(sorted(specs.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _specs(artefact: Artefact) -> dict[str, Spec]:
    return in_order({name: Spec(t.dtype, tuple(t.shape)) for name, t in artefact.tensors.items()})


def _metadata(artefact: Artefact, sums: Mapping[str, str]) -> dict[str, str]:
    """What the file's header says beside its tensors."""
    head = {"kind": artefact.kind, "version": artefact.version, "base": artefact.base, **artefact.header}
    head[SUMS] = "".join(sums[name] for name in sorted(sums))  # a table with names would be most of a small file
    return {SEAL: UNSEALED, KEY: json.dumps(head, sort_keys=True, ensure_ascii=False)}


def _split(sums: Any, specs: Mapping[str, Spec]) -> dict[str, str]:
    """Tensor -> checksum; statistics of before the seals had a table."""
    if not isinstance(sums, str):
        return dict(sums)
    length = len(UNSEALED)
    if len(sums) != length * len(specs):
        raise ValueError(SUMS)
    return {name: sums[i * length : (i + 1) * length] for i, name in enumerate(sorted(specs))}


def load_artefact(file: Path, kind: str, version: int, base: str | None = None, sealed: int | None = None) -> Artefact:
    """Read `file` and check its kind, its version (at most `version`), its checksums and, where `base` is given, that
    it belongs to that model.

    Args:
        sealed: the first version whose files carry checksums; `version` where None.

    Raises:
        TwinmergeError: missing, damaged, another kind, a version this release does not read, another base.
    """
    opened = open_artefact(file, kind, version, base, sealed)
    for name in opened.specs:
        opened.artefact.tensors[name] = opened.read(name)
    opened.close()
    return opened.artefact


def open_artefact(
    file: Path, kind: str, version: int, base: str | None = None, sealed: int | None = None
) -> ArtefactFile:
    """The same without its tensors, which are read, and checked, when they are wanted.

    Files of earlier versions, which had no checksums, are read as they are.
    """
    if find(file.parent, file.name) is None:
        raise DamagedFile(f"{file} is missing. Copy the whole folder again, or build it again.")
    opened = ArtefactFile(file)
    found = opened.artefact
    if found.kind != kind:
        raise DataError(f"{file} is a {found.kind!r} artefact, expected {kind!r}. Name the right file.")
    if not 1 <= found.version <= version:
        raise DataError(
            f"{file} has version {found.version} of the {kind!r} layout, this release reads version {version}. Build "
            "it again."
        )
    if found.version >= (sealed or version) and not opened.sealed:
        raise damaged(file)
    if base is not None and found.base != base:
        raise DataError(f"{file} belongs to another base model than the weights beside it. Build it again.")
    return opened


def damaged(file: Path) -> DamagedFile:
    return DamagedFile(f"{file} is damaged or was changed by hand. Copy the whole folder again, or build it again.")


def head_of_state(expert: str, checksum: str) -> str:
    """Where a state of experts that came over time has the head of one of them: its path in the folder.

    Example:
        >>> head_of_state("math", "0123456789abcdef0123")
        'heads/math.0123456789abcdef.safetensors'
    """
    return f"heads/{expert}.{checksum[:16]}.safetensors"


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Within the context a file's content is put together; whatever does not fit there is damage to the file.

    Raises:
        TwinmergeError: in place of anything that Python or torch finds wrong; a sentence of our own stays.

    Example:
        >>> with undamaged(Path("twin.safetensors")):
        ...     {}["experts"]
        Traceback (most recent call last):
        ...
        twinmerge.errors.DamagedFile: twin.safetensors is damaged or was changed by hand. Copy the whole folder again, \
or build it again.
    """
    try:
        yield
    except TwinmergeError:
        raise
    except (LookupError, ArithmeticError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise damaged(file) from error


def folder_fingerprint(folder: Path) -> str:
    """The fingerprint of a folder's model, by the names in its files."""
    checkpoint = Checkpoint.open(folder)
    try:
        return fingerprint(checkpoint.specs, checkpoint.beginning)
    finally:
        checkpoint.close()
