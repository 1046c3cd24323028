"""Writing a model folder: safetensors shards laid out first, then filled; whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.store.checkpoint import DTYPES, INDEX, SINGLE, Spec

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9


class OutputFolder:
    """A folder that appears under its name only when everything in it is written.

    Files go to the twin `<name>.partial`, which is renamed at the end and removed after an error.

    Errors:
        TwinmergeError: the folder exists and is not empty, cannot be made, or the disk is full.

    Example:
        >>> import tempfile
        >>> where = Path(tempfile.mkdtemp()) / "out"
        >>> with OutputFolder(where) as partial:
        ...     _ = (partial / "a.txt").write_text("a")
        ...     where.exists()
        False
        >>> sorted(path.name for path in where.iterdir())
        ['a.txt']
    """

    def __init__(self, folder: str | os.PathLike[str], needed_bytes: int = 0) -> None:
        self.folder = Path(folder)
        if self.folder.name in ("", ".."):
            raise TwinmergeError(f"The output {self.folder} has no name of its own. Name a folder, such as ./merged.")
        self.partial = self.folder.with_name(self.folder.name + ".partial")
        self.needed_bytes = needed_bytes

    def check(self) -> None:
        """Refuse now what would fail later."""
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise TwinmergeError(
                f"The output {self.folder} is there already and not empty. Name another one or remove it."
            )
        parent = next(p for p in [self.folder.absolute(), *self.folder.absolute().parents] if p.exists())
        free = shutil.disk_usage(parent).free
        if free < self.needed_bytes:
            raise TwinmergeError(
                f"No space for {self.folder}: it needs {self.needed_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free. "
                "Free some, or name a folder on another disk."
            )

    def __enter__(self) -> Path:
        self.check()
        try:
            if self.partial.exists():
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise TwinmergeError(f"The output {self.folder} cannot be made: {error}. Name another folder.") from error
        return self.partial

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self.folder.exists():
                self.folder.rmdir()
            os.replace(self.partial, self.folder)
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise TwinmergeError(
                f"No space left while writing {self.folder}; what was written is removed. Free some space and run again."
            ) from error


def header_of(specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    """The safetensors header (length prefix included) of tensors laid out in the order of `specs`."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        table[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append the tensor's bytes; the file object loops over short writes."""
    flat = tensor.detach().contiguous().reshape(-1).cpu()
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)


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
    shards = [dict(sorted(s.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))) for s in shards]
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
    for file, specs in files.items():
        with (folder / file).open("wb") as out:
            out.write(header_of(specs, {"format": "pt"}))
            for name, spec in specs.items():
                got, tensor = next(stream)
                if got != name or tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
                    raise AssertionError(f"laid out {name} {spec}, got {got} {tensor.dtype} {tuple(tensor.shape)}")
                write_tensor(out, tensor)
            out.flush()
            os.fsync(out.fileno())
    if len(files) > 1:
        total = sum(spec.bytes for specs in files.values() for spec in specs.values())
        weight_map = {name: file for file, specs in files.items() for name in specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
