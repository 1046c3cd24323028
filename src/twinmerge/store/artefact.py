"""The one format of everything that is not a model: safetensors with a JSON header of kind, version and base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.foreign import find, parse_json
from twinmerge.store.output import header_of, write_tensor

if TYPE_CHECKING:
    from torch import Tensor

KEY = "twinmerge"
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


def save_artefact(file: Path, artefact: Artefact) -> None:
    """Write `file`; the bytes depend on the artefact only."""
    head, specs = _head_and_specs(artefact)
    with file.open("wb") as out:
        out.write(header_of(specs, head))
        for name in specs:
            write_tensor(out, artefact.tensors[name])


def artefact_bytes(artefact: Artefact) -> int:
    """How long the file will be."""
    head, specs = _head_and_specs(artefact)
    return len(header_of(specs, head)) + sum(spec.bytes for spec in specs.values())


def metadata_of(artefact: Artefact) -> dict[str, str]:
    """What the file's header says beside its tensors."""
    head = {"kind": artefact.kind, "version": artefact.version, "base": artefact.base, **artefact.header}
    return {KEY: json.dumps(head, sort_keys=True, ensure_ascii=False)}


def in_order(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The tensors in the order of the file: wide dtypes first (alignment), then by name."""
    return dict(sorted(specs.items(), key=lambda item: (-item[1].itemsize, item[0])))


def _head_and_specs(artefact: Artefact) -> tuple[dict[str, str], dict[str, Spec]]:
    specs = {name: Spec(t.dtype, tuple(t.shape)) for name, t in artefact.tensors.items()}
    return metadata_of(artefact), in_order(specs)


def load_artefact(file: Path, kind: str, version: int, base: str | None = None) -> Artefact:
    """Read `file` and check its kind, its version (at most `version`) and, where `base` is given, that it belongs to that model.

    Errors:
        TwinmergeError: missing, corrupt, another kind, a version this release does not read, another base.
    """
    found, checkpoint = open_artefact(file, kind, version, base)
    for name in checkpoint.specs:
        found.tensors[name] = checkpoint.read(name)
    checkpoint.close()
    return found


def open_artefact(file: Path, kind: str, version: int, base: str | None = None) -> tuple[Artefact, Checkpoint]:
    """The same without its tensors, which are read from the checkpoint when they are wanted."""
    if find(file.parent, file.name) is None:
        raise TwinmergeError(f"{file} is missing. Copy the whole folder again, or build it again.")
    checkpoint = Checkpoint([file])
    try:
        head = parse_json(checkpoint.metadata[KEY])
        found = Artefact(head.pop("kind"), int(head.pop("version")), head.pop("base"), head, {})
    except (LookupError, ArithmeticError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise TwinmergeError(f"{file} is no twinmerge artefact. Build it again.") from error
    if found.kind != kind:
        raise TwinmergeError(f"{file} is a {found.kind!r} artefact, expected {kind!r}. Name the right file.")
    if not 1 <= found.version <= version:
        raise TwinmergeError(
            f"{file} has version {found.version} of the {kind!r} layout, this release reads version {version}. Build it again."
        )
    if base is not None and found.base != base:
        raise TwinmergeError(f"{file} belongs to another base model than the weights beside it. Build it again.")
    return found, checkpoint


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Within the context a file's content is put together; whatever does not fit there is damage to the file.

    Errors:
        TwinmergeError: in place of anything that Python or torch finds wrong; a sentence of our own stays.

    Example:
        >>> with undamaged(Path("twin.safetensors")):
        ...     {}["experts"]
        Traceback (most recent call last):
        ...
        twinmerge.errors.TwinmergeError: twin.safetensors is damaged or was changed by hand. Copy the whole folder again, \
or build it again.
    """
    try:
        yield
    except TwinmergeError:
        raise
    except (LookupError, ArithmeticError, ValueError, AttributeError, TypeError, RuntimeError) as error:
        raise TwinmergeError(
            f"{file} is damaged or was changed by hand. Copy the whole folder again, or build it again."
        ) from error
