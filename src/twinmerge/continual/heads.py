"""The heads of the experts in a state: a file each, which the state names by its checksum, so that state and heads
change as one.

A new head is written before the state that names it, and one that is not named any more is removed after: a reader
finds all the heads of the state that it has open, or another state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from transformers import CONFIG_MAPPING

from twinmerge.continual.state import AddedExpert, Description, StateFile
from twinmerge.errors import DamagedFile, TwinmergeError
from twinmerge.models.head_files import HEADS_VERSION, HeadSpec, head_artefact
from twinmerge.store import disk
from twinmerge.store.artefact import head_of_state, load_artefact, save_artefact, undamaged
from twinmerge.store.checksum import of_file

FOLDER = "heads"


def head_file(folder: Path, entry: AddedExpert) -> Path:
    """Where the head of an expert lies."""
    return folder / head_of_state(entry.name, entry.head or "")


def write_head(folder: Path, name: str, head: HeadSpec, base: str) -> str:
    """Write the head of an expert that is about to come.

    Returns:
        The checksum that its entry in the state is to have.
    """
    made = head_artefact(name, head, base)
    made.header["config"] = head.config.to_dict() | {"model_type": head.config.model_type}
    partial = folder / FOLDER / f"{name}.partial"
    disk.make_folder(partial.parent)
    save_artefact(partial, made)
    disk.sync_path(partial)
    checksum = of_file(partial)
    disk.rename(partial, head_file(folder, AddedExpert(name, "", "", "", 0.0, head=checksum)))
    disk.sync_path(partial.parent)
    return checksum


def read_heads(state: StateFile) -> dict[str, HeadSpec]:
    """The heads of the experts that have one, in their order.

    Raises:
        FileNotFoundError: one is missing; TwinmergeError: one is damaged.
    """
    return {entry.name: _read(state, entry) for entry in state.about.experts if entry.head is not None}


@contextlib.contextmanager
def with_heads(folder: Path) -> Iterator[tuple[StateFile, dict[str, HeadSpec]]]:
    """An opened state and its heads: all of the old state or all of the new one, whatever another process does
    meanwhile.

    Raises:
        DamagedFile: a head is missing or damaged.
    """
    while True:
        with StateFile(folder) as state:
            try:
                heads = read_heads(state)
            except (FileNotFoundError, TwinmergeError) as error:
                if not state.is_current():  # an expert left just now, and its head with it
                    continue
                if isinstance(error, TwinmergeError):
                    raise
                raise DamagedFile(
                    f"The state {folder} lacks the head {error.filename}. Restore it from a copy of the state, or make "
                    "the state again."
                ) from error
            yield state, heads
            return


def remove_others(folder: Path, about: Description) -> None:
    """Remove what lies beside the heads of a state: those of experts that left, and of adds that were killed."""
    known = {head_file(folder, entry).name for entry in about.experts if entry.head is not None}
    for file in (folder / FOLDER).glob("*"):
        if file.name not in known and file.name.endswith((".safetensors", ".partial")):
            disk.remove(file)
    with contextlib.suppress(OSError):
        disk.remove_folder(folder / FOLDER)


def heads_bytes(folder: Path, about: Description) -> int:
    """What the heads of a state take on the disk."""
    found = (head_file(folder, entry) for entry in about.experts if entry.head is not None)
    return sum(file.stat().st_size for file in found if file.is_file())


def _read(state: StateFile, entry: AddedExpert) -> HeadSpec:
    file = head_file(state.folder, entry)
    if of_file(file) != entry.head:
        raise DamagedFile(f"{file} is not what was written: the file is damaged. Restore it from a copy of the state.")
    with undamaged(file):
        artefact = load_artefact(file, "head", HEADS_VERSION, state.base)
        config = artefact.header["config"]
        return HeadSpec(CONFIG_MAPPING[config["model_type"]].from_dict(config), artefact.tensors)
