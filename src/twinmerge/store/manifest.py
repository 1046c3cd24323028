"""The manifest of a folder that was written here: the size and checksum of every file in it, and of every tensor.

`twinmerge.checksums.json` is written last. Of weights it has the checksum of the header and those of the tensors,
which the writer has anyway; artefacts carry those of their tensors themselves; of any other file all bytes are
summed. The seal is the checksum of the manifest's own bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from twinmerge.errors import DamagedFile
from twinmerge.store import disk
from twinmerge.store.checksum import UNSEALED, is_sealed, of_bytes, of_file, sealed
from twinmerge.store.foreign import AGAIN, Most, find, open_regular, parse_json, read_bytes
from twinmerge.store.header import Header, raw_header, read_header

CHECKSUMS = "twinmerge.checksums.json"
OUTPUT = "output"
SHARED = "shared"  # the folder inside a twin that is its shared model
SEAL = "seal"  # key of the metadata of a file that carries checksums of its own
MOST = Most(256_000_000, 8_000_000)  # 32 characters for each tensor of the output and of every input
HUB_FILES = {".gitattributes", ".cache"}  # which come with a download
VERSION = 2  # 1 was a table of tensors only

Sums = Mapping[str, Mapping[str, str]]
"""OUTPUT or the name of an input -> tensor, by its name in the output -> checksum."""


class Manifest(NamedTuple):
    """folder; files: path in it -> "size" and "sum" of all bytes, or "size" and "header" (its checksum); sums: of
    tensors."""

    folder: Path
    files: dict[str, dict[str, Any]]
    sums: dict[str, dict[str, str]]

    @classmethod
    def of(cls, folder: Path) -> Manifest | None:
        """Of a folder; None where it has none, or one without checksums of files, of before the first release.

        Raises:
            TwinmergeError: a damaged one, or one of a later release.
        """
        file = folder / CHECKSUMS
        if find(folder, CHECKSUMS) is None:
            return None
        raw = read_bytes(file, MOST.bytes, AGAIN)
        try:
            table = parse_json(raw, MOST)
            if table.get("twinmerge") != VERSION:
                if "twinmerge" not in table and SEAL not in table and OUTPUT in table:
                    return None
                raise ValueError(f"it is of version {table.get('twinmerge')}, this release reads {VERSION}")
            if not is_sealed(raw):
                raise ValueError("it is damaged or was changed")
            return cls(folder, table["files"], table["sums"])
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            raise DamagedFile(
                f"{file} cannot be used: {error}. Copy the whole folder again; if it was changed on purpose, remove "
                "this file."
            ) from error

    @classmethod
    def over(cls, folder: Path) -> tuple[Manifest | None, str]:
        """The manifest that a folder's files are held to, and what stands before their names in it: the folder's own,
        or that of the twin whose shared model the folder is.

        Raises:
            TwinmergeError: as `of`.
        """
        own = cls.of(folder)
        if own is not None or folder.name != SHARED:
            return own, ""
        around, within = cls.of(folder.parent), f"{SHARED}/"
        known = around is not None and any(name.startswith(within) for name in around.files)
        return (around, within) if known else (None, "")

    def check(self, *names: str) -> None:
        """Refuse files that are not what was written; those that the manifest does not name are left alone.

        Of weights and artefacts that is their header; the rest is checked when it is read.

        Raises:
            DamagedFile: a file that changed or is gone.
        """
        for name in names:
            if name in self.files and (said := self.differs(name)):
                raise DamagedFile(
                    f"{self.folder / name} {said}. Copy the whole folder again; if it was changed on purpose, remove "
                    f"{CHECKSUMS} beside it."
                )

    def check_all(self, *but: str) -> None:
        """The same for all files, without those named."""
        self.check(*(name for name in self.files if name not in but))

    def differs(self, name: str) -> str | None:
        """In what a file that the manifest names is no longer what was written; None where it is."""
        wanted, file = self.files[name], self.folder / name
        try:
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                return "is no file"
            if status.st_size != wanted["size"]:
                return f"has {status.st_size} bytes, {wanted['size']} were written"
            found = of_file(file) if "sum" in wanted else of_bytes(raw_header(file))
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if found == wanted.get("sum", wanted.get("header")) else "is not what was written"

    def renewed(self, *names: str) -> bytes:
        """The manifest's own file, once these files were changed on purpose."""
        changed = {name: _entry(self.folder, name, self.sums.get(OUTPUT, {})) for name in names}
        return _text({**self.files, **changed}, self.sums)

    def strange(self) -> list[str]:
        """Files of the folder that the manifest does not name."""
        return [name for name in files_in(self.folder) if name not in self.files]


def write_manifest(folder: Path, sums: Sums) -> None:
    """Write the manifest of all that is in the folder.

    Args:
        sums: of tensors, with the folder that they are in before the name; files whose tensors are all in OUTPUT are
            not read again.
    """
    known = sums.get(OUTPUT, {})
    files = {name: _entry(folder, name, known) for name in files_in(folder)}
    disk.write_file(folder / CHECKSUMS, _text(files, sums))


def _text(files: Mapping[str, Mapping[str, Any]], sums: Sums) -> bytes:
    return sealed(json.dumps({"twinmerge": VERSION, SEAL: UNSEALED, "files": files, "sums": sums}, indent=0).encode())


def files_in(folder: Path) -> Iterator[str]:
    """The paths of all files below the folder, without its manifest and what the hub adds, in order and with
    slashes."""
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - HUB_FILES)
        for name in sorted(set(names) - HUB_FILES):
            path = (Path(where) / name).relative_to(folder).as_posix()
            if path != CHECKSUMS:
                yield path


def header_in(file: Path) -> Header:
    """Of a safetensors file.

    Raises:
        TwinmergeError: as `read_header`.
    """
    with open(open_regular(file), "rb") as content:
        return read_header(content.fileno(), file)


def _entry(folder: Path, name: str, known: Mapping[str, str]) -> dict[str, Any]:
    file = folder / name
    found: dict[str, Any] = {"size": file.stat().st_size}
    if file.suffix == ".safetensors":
        header = header_in(file)
        within = f"{name.rpartition('/')[0]}/" if "/" in name else ""
        if SEAL in header.metadata or all(f"{within}{tensor}" in known for tensor in header.specs):
            return {**found, "header": of_bytes(raw_header(file))}
    return {**found, "sum": of_file(file)}
