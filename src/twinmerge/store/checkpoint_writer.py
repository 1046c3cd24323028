"""Writing the safetensors files of a model: laid out at once, then filled in any order, summed while the bytes are at
hand."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twinmerge.store import disk
from twinmerge.store.checkpoint import SINGLE, Spec, check_range
from twinmerge.store.checksum import BLOCK, block_digests, joined, streamed
from twinmerge.store.header import header_of
from twinmerge.store.locate import SHARD
from twinmerge.store.ranges import OpenFile, begin_to_sync, bytes_of, read_into, write_from

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

SYNC_BYTES = 1 << 18
SHARD_BYTES = 5 * 10**9
PYTORCH = {"format": "pt"}


class CheckpointWriter:
    """The safetensors files of a model, made at once in their full length and then filled in any order, by any thread.

    A file that is there with just this header and length is kept, so that writing can go on after an interruption.

    Args:
        folder: where; it must be there.
        files: as `layout` gives them.
        metadata: of each file.
        summed: keep the checksums of what is written here; without, `finish` gives none.

    Attributes:
        kept: every file was there, so what was written before is in its place; otherwise a journal of it is void.

    Example:
        >>> import numpy, tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> writer = CheckpointWriter(folder, {"model.safetensors": {"w": Spec("I8", (2, 2))}})
        >>> writer.write("w", 2, numpy.array([3, 4], numpy.uint8))
        >>> writer.write("w", 0, numpy.array([1, 2], numpy.uint8))
        >>> list(writer.finish())
        ['w']
        >>> (folder / "model.safetensors").read_bytes()[-4:]
        b'\\x01\\x02\\x03\\x04'
    """

    def __init__(
        self,
        folder: Path,
        files: Mapping[str, Mapping[str, Spec]],
        metadata: Mapping[str, str] = PYTORCH,
        summed: bool = True,
    ) -> None:
        self._folder = folder
        self._files = files
        self._headers = {file: header_of(specs, metadata) for file, specs in files.items()}
        self._summed = summed
        self.kept = True
        for file, specs in files.items():
            header = self._headers[file]
            size = len(header) + sum(spec.bytes for spec in specs.values())
            if not _is_begun(folder / file, header, size):
                self.kept = False
                _begin(folder / file, header, size)
        self._open()

    def _open(self) -> None:
        self._handles = [OpenFile(self._folder / file, writable=True) for file in self._files]
        self._place: dict[str, tuple[OpenFile, int, Spec]] = {}
        self._blocks: dict[str, dict[int, str]] = {}  # tensor -> number of a block -> its checksum
        for (file, specs), handle in zip(self._files.items(), self._handles, strict=True):
            offset = len(self._headers[file])
            for name, spec in specs.items():
                self._place[name] = (handle, offset, spec)
                offset += spec.bytes

    def __getstate__(self) -> tuple[Path, Mapping[str, Mapping[str, Spec]], dict[str, bytes]]:
        """What a worker elsewhere needs to write into the same files."""
        return self._folder.absolute(), self._files, self._headers

    def __setstate__(self, state: tuple[Path, Mapping[str, Mapping[str, Spec]], dict[str, bytes]]) -> None:
        self._folder, self._files, self._headers = state
        self._summed, self.kept = False, True
        self._open()

    def write(self, name: str, start: int, flat: Flat) -> None:
        """Put a tensor's elements from `start` on in their place, without a copy.

        Args:
            name: of the tensor.
            start: its first element that is written.
            flat: contiguous, 1-D, on the CPU, of the dtype laid out; or bytes.

        Raises:
            ValueError: elements that the tensor does not have, or another kind of `flat`.
            OSError: the disk is full or fails.
        """
        handle, offset, spec = self._place[name]
        check_range(name, spec, start, flat)
        with handle.use() as fd:
            write_from(fd, bytes_of(flat), offset + start * spec.itemsize)
            if flat.nbytes >= SYNC_BYTES:  # small parts share pages, which would be written again and again
                begin_to_sync(fd, offset + start * spec.itemsize, flat.nbytes)
        if self._summed:
            self._sum(name, start, spec, flat)

    def read_into(self, name: str, start: int, flat: Flat) -> None:
        """Fill `flat` with what lies where `write` would put it; nothing that was written reads as zeros.

        Raises:
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
                disk.sync(fd)

    def finish(self) -> dict[str, str]:
        """Sync and close the files, and write the index where there are shards.

        Returns:
            tensor -> its checksum; what did not come in whole blocks is read for it once more.
        """
        sums = self.sums()
        self.sync()
        self.close()
        if len(self._files) > 1:
            total = sum(spec.bytes for _, _, spec in self._place.values())
            weight_map = {name: file for file, specs in self._files.items() for name in specs}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            stem = SHARD.sub("", next(iter(self._files)).removesuffix(".safetensors"))
            disk.write_json(self._folder / f"{stem}.safetensors.index.json", index)
        return sums

    def sums(self) -> dict[str, str]:
        """Tensor -> the checksum of what is written of it, all of which must be."""
        return {name: self._sum_of(name) for name in self._place} if self._summed else {}

    def rewrite(self, file: str, header: bytes) -> None:
        """Put another header of the same length in the place of the one laid out."""
        with self._handles[list(self._files).index(file)].use() as fd:
            write_from(fd, header, 0)

    def close(self) -> None:
        """Close the files as they are."""
        for handle in self._handles:
            handle.close()

    def _sum(self, name: str, start: int, spec: Spec, flat: Flat) -> None:
        raw = np.frombuffer(bytes_of(flat), np.uint8)
        stop = start + raw.nbytes // spec.itemsize
        known = self._blocks.setdefault(name, {})
        if start % BLOCK or (stop % BLOCK and stop < spec.numel):  # what it touches is no longer known
            for block in range(start // BLOCK, -(-stop // BLOCK)):
                known.pop(block, None)
            return
        known.update(enumerate(block_digests(raw, spec.itemsize), start // BLOCK))

    def _sum_of(self, name: str) -> str:
        spec, known = self._place[name][2], self._blocks.get(name, {})
        if len(known) == -(-spec.numel // BLOCK):
            return joined(known[block] for block in range(len(known)))
        return streamed(partial(self.read_into, name), spec.itemsize, spec.numel)


def layout(specs: Mapping[str, Spec], shard_bytes: int = SHARD_BYTES, name: str = SINGLE) -> dict[str, dict[str, Spec]]:
    """File name -> its tensors: by name into shards of at most `shard_bytes`, wide dtypes first inside (alignment).

    Args:
        specs: of the tensors.
        shard_bytes: of a file, at most.
        name: of the file, where it is one.
    """
    shards: list[dict[str, Spec]] = [{}]
    size = 0
    for tensor in sorted(specs):
        if shards[-1] and size + specs[tensor].bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][tensor] = specs[tensor]
        size += specs[tensor].bytes
    shards = [dict(sorted(s.items(), key=lambda item: (-item[1].itemsize, item[0]))) for s in shards]
    if len(shards) == 1:
        return {name: shards[0]}
    stem = name.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def write_checkpoint(
    folder: Path, files: Mapping[str, Mapping[str, Spec]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, str]:
    """Write the tensors, which come in the order of `files` (see `layout`), with the index where there are shards.

    One tensor is held in memory at a time.

    Returns:
        tensor -> its checksum.
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
        return writer.finish()
    finally:
        writer.close()


def _is_begun(file: Path, header: bytes, size: int) -> bool:
    if file.is_symlink() or not file.is_file() or file.stat().st_size != size:
        return False
    with file.open("rb") as there:
        return there.read(len(header)) == header


def _begin(file: Path, header: bytes, size: int) -> None:
    """Make `file` with this header and size; never through a link that somebody put in its place."""
    fd = disk.open_new(file)
    try:
        write_from(fd, header, 0)
        disk.truncate(fd, size)
    finally:
        os.close(fd)
