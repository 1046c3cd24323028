"""Reading the safetensors files of a model folder, one file or shards."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import DamagedFile, ModelError, unreadable
from twinmerge.store.checksum import block_digests, joined, streamed
from twinmerge.store.foreign import find, is_file_name, matches, read_json, reason, shown
from twinmerge.store.header import Spec as Spec
from twinmerge.store.header import read_header
from twinmerge.store.locate import SHARD, converting
from twinmerge.store.manifest import CHECKSUMS, OUTPUT, Manifest
from twinmerge.store.ranges import OpenFile, bytes_of, read_into

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DIFFUSION = "diffusion_pytorch_model.safetensors"  # as diffusers calls it
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_SHARDS = 10_000

_IN_USE: weakref.WeakSet[Checkpoint] = weakref.WeakSet()


def only_pickles(place: Path) -> bool:
    """Whether a file or folder holds weights in pickles alone, which are opened only when a merge is asked to."""
    if os.path.isdir(place):  # also of what is no path at all
        return bool(_pickles(place)) and not any(place.glob("*.safetensors"))
    return matches(place.name, PICKLES)


def _pickles(folder: Path) -> list[str]:
    return sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))


class Checkpoint:
    """The tensors of one folder by name; headers are read at once, tensors on demand, by any number of threads.

    Bytes are read into fresh memory: pages of a mapped file would count as this process's own.

    Attributes:
        files: the safetensors files.
        specs: name -> dtype and shape.
        metadata: of all files together.
        expected: name -> the checksum that its tensor had when it was written, where that is known: who reads a
            tensor whole finds out whether it still has it, who reads ranges calls `check` or compares what was read.

    Raises:
        TwinmergeError: no safetensors, only pickles, a missing shard, a link out of the folder, a truncated or
            corrupt file, an index that does not fit its shards (each named).

    Example:
        >>> import tempfile
        >>> from twinmerge.store.header import header_of
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = file.write_bytes(header_of({"w": Spec("I8", (2, 2))}, {}) + bytes([1, 2, 3, 4]))
        >>> checkpoint = Checkpoint.open(file.parent)
        >>> checkpoint.read("w").tolist()
        [[1, 2], [3, 4]]
        >>> middle = np.empty(2, np.uint8)
        >>> checkpoint.read_into("w", 1, middle)
        >>> middle.tolist()
        [2, 3]
        >>> checkpoint.close()
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self.expected: dict[str, str] = {}
        self.advice = f"Copy or write it again; if it was changed on purpose, remove {CHECKSUMS} beside it."
        self._handles = [OpenFile(file) for file in self.files]
        _IN_USE.add(self)
        self._place: dict[str, tuple[int, int]] = {}
        for i, (file, handle) in enumerate(zip(self.files, self._handles, strict=True)):
            try:
                with handle.use() as fd:
                    header = read_header(fd, file)
            except OSError as error:
                raise unreadable(error)(
                    f"{file} cannot be opened: {reason(error)}. Make it readable or save it again."
                ) from error
            handle.close()
            for name in header.specs:
                if name in self._place:
                    raise ModelError(
                        f"Tensor {name!r} stands in both {self.files[self._place[name][0]]} and {file}. Remove the "
                        "file that is not the model's."
                    )
                self._place[name] = (i, header.offsets[name])
            self.specs.update(header.specs)
            self.metadata.update(header.metadata)

    @classmethod
    def open(cls, folder: Path, whole: Path | None = None) -> Checkpoint:
        """Open a model folder: its index if it has one, else model.safetensors, else its only safetensors file.

        What twinmerge wrote has a manifest, which its files must still fit.

        Args:
            folder: that has the files.
            whole: what it is a part of, where the manifest is.
        """
        found = cls._in(folder)
        if whole in (None, folder) and Manifest.over(folder)[1]:
            whole = folder.parent
        within = "" if whole in (None, folder) else f"{folder.relative_to(whole).as_posix()}/"
        found.compare(whole or folder, INDEX, f"{DIFFUSION}.index.json", "config.json", within=within)
        return found

    @classmethod
    def _in(cls, folder: Path) -> Checkpoint:
        for name in (SINGLE, DIFFUSION):
            if index := find(folder, f"{name}.index.json"):
                weight_map, shards = _read_index(folder, index)
                checkpoint = cls(shards)
                checkpoint._check(index, weight_map)
                return checkpoint
            if single := find(folder, name):
                return cls([single])
        loose = sorted(folder.glob("*.safetensors"))
        if len(loose) == 1 and SHARD.search(loose[0].stem):
            raise ModelError(f"{loose[0]} is one of several files of a model, without their {INDEX}. Copy them all.")
        if len(loose) == 1 and (only := find(folder, loose[0].name)):
            return cls([only])
        if loose:
            raise ModelError(f"{folder} holds {len(loose)} safetensors files but no {INDEX}. Add the index.")
        if pickles := _pickles(folder):
            raise ModelError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are opened. "
                f"{converting(folder / pickles[0])}"
            )
        if packed := sorted(p.name for p in folder.glob("*.gguf")):
            raise ModelError(
                f"{folder} holds only GGUF files ({packed[0]}), whose weights are packed for llama.cpp. Name the file, "
                "to be told how it is unpacked, or give the model that it was made of."
            )
        raise ModelError(f"{folder} holds no safetensors file. Name a folder with model.safetensors or its shards.")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, whole."""
        import torch

        spec = self.specs[name]
        flat = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, flat)
        if name in self.expected:
            raw = np.frombuffer(bytes_of(flat), np.uint8)
            self.require(name, joined(block_digests(raw, spec.itemsize)))
        return flat.view(spec.shape)

    def compare(self, folder: Path, *others: str, within: str = "") -> None:
        """Hold the files, and others beside them, to the folder's manifest, if it has one; the tensors when they are
        read.

        Args:
            folder: that has the manifest.
            others: names of files.
            within: where in the folder they and the weights are: "text_encoder/".

        Raises:
            TwinmergeError: a file that is not what was written.
        """
        if (manifest := Manifest.of(folder)) is not None:
            manifest.check(*(f"{within}{name}" for name in (*others, *(file.name for file in self.files))))
            sums = manifest.sums.get(OUTPUT, {})
            self.expected = {name: sums[within + name] for name in self.specs if within + name in sums}

    def check(self, name: str) -> None:
        """Read a tensor and compare it with what was written, where that is known.

        Raises:
            TwinmergeError: another one.
        """
        if name in self.expected:
            self.require(name, self.sum_of(name))

    def sum_of(self, name: str) -> str:
        """The checksum of a tensor as it is now, read piece by piece."""
        spec = self.specs[name]
        return streamed(lambda start, out: self.read_into(name, start, out), spec.itemsize, spec.numel)

    def require(self, name: str, found: str) -> None:
        """Refuse a tensor whose checksum is not the expected one, where that is known.

        Raises:
            DamagedFile: another one.
        """
        if self.expected.get(name, found) != found:
            raise DamagedFile(
                f"Tensor {name!r} in {self.files[self._place[name][0]]} is not what twinmerge wrote: the file is "
                f"damaged or was changed. {self.advice}"
            )

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with a tensor's elements from `start` on, flat.

        Args:
            name: of the tensor.
            start: its first element that is read.
            out: contiguous, 1-D, on the CPU, of the stored dtype; or bytes.

        Raises:
            TwinmergeError: the file changed or became shorter since its header was read, or the disk fails.
            ValueError: elements that the tensor does not have, or another kind of `out`.
        """
        spec, (i, offset) = self.specs[name], self._place[name]
        check_range(name, spec, start, out)
        try:
            with self._handles[i].use() as fd:
                read_into(fd, bytes_of(out), offset + start * spec.itemsize)
                self._handles[i].require_same(fd)
        except (EOFError, OSError) as error:
            raise unreadable(error)(
                f"Tensor {name!r} in {self.files[i]} cannot be read: {error}. Restore the file and run again."
            ) from error

    def beginning(self, name: str, count: int) -> NDArray[np.uint8]:
        """The bytes of the first `count` elements of a tensor, flat."""
        out = np.empty(count * self.specs[name].itemsize, np.uint8)
        self.read_into(name, 0, out)
        return out

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor's bytes lie: the index of its file in `files` and the offset in it; sorts reads."""
        return self._place[name]

    @contextlib.contextmanager
    def held(self) -> Iterator[list[int]]:
        """Within the context the files stay open (their descriptors), so that what takes the name of one is not read
        for it.

        Raises:
            OSError: a file changed since its header was read.
        """
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(handle.use()) for handle in self._handles]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        _IN_USE.discard(self)
        for handle in self._handles:
            handle.close()

    def _check(self, index: Path, weight_map: Mapping[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._place or self.files[self._place[name][0]].name != shard:
                raise DamagedFile(
                    f"{index} puts the tensor {name!r} into {shard}, which does not hold it. Download both again."
                )
        for name, (i, _) in self._place.items():
            if name not in weight_map:
                raise DamagedFile(
                    f"{self.files[i]} holds the tensor {name!r}, which {index} does not name. Download both again."
                )


def is_in_use(folder: Path) -> bool:
    """Whether a checkpoint that this process has open lies in the folder."""
    home = folder.resolve()
    return any(file.resolve().is_relative_to(home) for opened in list(_IN_USE) for file in opened.files)


def check_range(name: str, spec: Spec, start: int, flat: Flat) -> None:
    """Refuse a part that is not one of the tensor `name`.

    Example:
        >>> check_range("w", Spec("I8", (2, 2)), 3, np.zeros(2, np.uint8))
        Traceback (most recent call last):
        ...
        ValueError: 'w' has 4 elements of int8, not 3 ... 4 of int8
    """
    if isinstance(flat, np.ndarray):
        (count, rest), kind = divmod(flat.nbytes, spec.itemsize), spec.name
    else:
        count, rest, kind = flat.numel(), 0, str(flat.dtype).removeprefix("torch.")
    if kind != spec.name or rest or not 0 <= start <= spec.numel - count:
        raise ValueError(
            f"{name!r} has {spec.numel} elements of {spec.name}, not {start} ... {start + count - 1} of {kind}"
        )


def _read_index(folder: Path, index: Path) -> tuple[dict[str, str], list[Path]]:
    """Tensor name -> its file's name, and the files."""
    advice = "Download it again."
    table = read_json(index, advice=advice)
    weight_map: dict[str, str] = table.get("weight_map") or {}
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise DamagedFile(f"{index} is not a valid index (weight_map: tensor -> file). {advice}")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise DamagedFile(
            f"{index} names {len(names)} files, more than the {MAX_SHARDS} that a model may have. {advice}"
        )
    shards = []
    for name in names:
        if not is_file_name(name) or (shard := find(folder, name)) is None:
            raise DamagedFile(f"{index} names the shard {shown(name)}, which is not in the folder. {advice}")
        shards.append(shard)
    return weight_map, shards
