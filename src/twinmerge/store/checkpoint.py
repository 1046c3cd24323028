"""Reading the safetensors files of a model folder, one file or shards."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import TwinmergeError
from twinmerge.store.header import MAX_HEADER, no_key_twice, read_header, shown
from twinmerge.store.header import Spec as Spec
from twinmerge.store.ranges import OpenFile, bytes_of, read_into

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """The tensors of one folder by name; headers are read at once, tensors on demand, by any number of threads.

    Bytes are read into fresh memory: pages of a mapped file would count as this process's own.

    Attributes:
        files: the safetensors files; specs: name -> dtype and shape; metadata: of all files together.

    Errors:
        TwinmergeError: no safetensors, only pickles, a missing shard, a link out of the folder, a truncated or corrupt
            file, an index that does not fit its shards (each named).

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
        self._handles = [OpenFile(file) for file in self.files]
        self._place: dict[str, tuple[int, int]] = {}
        for i, (file, handle) in enumerate(zip(self.files, self._handles, strict=True)):
            try:
                with handle.use() as fd:
                    header = read_header(fd, file)
            except OSError as error:
                raise TwinmergeError(
                    f"{file} cannot be opened: {error.strerror}. Make it readable or save it again."
                ) from error
            handle.close()
            for name in header.specs:
                if name in self._place:
                    raise TwinmergeError(
                        f"Tensor {name!r} stands in both {self.files[self._place[name][0]]} and {file}. Remove the file "
                        "that is not the model's."
                    )
                self._place[name] = (i, header.offsets[name])
            self.specs.update(header.specs)
            self.metadata.update(header.metadata)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a model folder: its index if it has one, else model.safetensors, else its only safetensors file."""
        if (index := folder / INDEX).is_file():
            weight_map = _read_index(_inside(folder, index))
            checkpoint = cls(_inside(folder, folder / shard) for shard in sorted(set(weight_map.values())))
            checkpoint._check(index, weight_map)
            return checkpoint
        if (single := folder / SINGLE).is_file():
            return cls([_inside(folder, single)])
        loose = sorted(folder.glob("*.safetensors"))
        if len(loose) == 1:
            return cls([_inside(folder, loose[0])])
        if loose:
            raise TwinmergeError(f"{folder} holds {len(loose)} safetensors files but no {INDEX}. Add the index.")
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise TwinmergeError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are opened. Convert "
                "them where you trust them: AutoModel.from_pretrained(folder).save_pretrained(new_folder)."
            )
        raise TwinmergeError(f"{folder} holds no safetensors file. Name a folder with model.safetensors or its shards.")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, whole."""
        import torch

        spec = self.specs[name]
        flat = torch.empty(spec.numel, dtype=spec.dtype)
        self.read_into(name, 0, flat)
        return flat.view(spec.shape)

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with a tensor's elements from `start` on, flat.

        Args:
            name: of the tensor.
            start: its first element that is read.
            out: contiguous, 1-D, on the CPU, of the stored dtype; or bytes.

        Errors:
            TwinmergeError: the file changed or became shorter since its header was read, or the disk fails.
            ValueError: elements that the tensor does not have, or another kind of `out`.
        """
        spec, (i, offset) = self.specs[name], self._place[name]
        check_range(name, spec, start, out)
        try:
            with self._handles[i].use() as fd:
                read_into(fd, bytes_of(out), offset + start * spec.itemsize)
        except (EOFError, OSError) as error:
            raise TwinmergeError(
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
        """Within the context the files stay open (their descriptors), so that what takes the name of one is not read for it.

        Errors:
            OSError: a file changed since its header was read.
        """
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(handle.use()) for handle in self._handles]

    def close(self) -> None:
        """Close the files; reading opens them again."""
        for handle in self._handles:
            handle.close()

    def _check(self, index: Path, weight_map: Mapping[str, str]) -> None:
        for name, shard in weight_map.items():
            if name not in self._place or self.files[self._place[name][0]].name != shard:
                raise TwinmergeError(
                    f"{index} puts the tensor {name!r} into {shard}, which does not hold it. Download both again."
                )
        for name, (i, _) in self._place.items():
            if name not in weight_map:
                raise TwinmergeError(
                    f"{self.files[i]} holds the tensor {name!r}, which {index} does not name. Download both again."
                )


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


def _read_index(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > MAX_HEADER:
            raise ValueError("it is too long")
        table = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
        weight_map: dict[str, str] = table["weight_map"]
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("its weight_map is not one of names")
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise TwinmergeError(
            f"{index} is not a valid index (weight_map: tensor -> file): {error}. Download it again."
        ) from error
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or not os.path.isfile(index.parent / shard):  # never raises, whatever the name
            raise TwinmergeError(
                f"{index} names the shard {shown(shard)}, which is not in the folder. Download it again."
            )
    return weight_map


def _inside(folder: Path, file: Path) -> Path:
    """`file`, unless it is a link out of the model; the hub cache's links, snapshots/<commit>/x -> blobs/y, are its own."""
    if file.is_symlink():
        home, real = folder.resolve(), file.resolve()
        blobs = home.parent.parent / "blobs"
        if not (real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs))):
            raise TwinmergeError(f"{file} is a link to {real}, outside its folder. Put the file itself in its place.")
    return file
