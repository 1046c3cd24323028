"""Reading the safetensors files of a model folder, one file or shards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twinmerge.errors import TwinmergeError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Spec(NamedTuple):
    """What a header says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Checkpoint:
    """The tensors of one folder by name; headers are read at once, tensors on demand.

    Errors:
        TwinmergeError: no safetensors, only pickles, a missing shard, a truncated or corrupt file (named).
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.specs: dict[str, Spec] = {}
        self.metadata: dict[str, str] = {}
        self._where: dict[str, Path] = {}
        self._open: dict[Path, tuple[AbstractContextManager[Any], Any]] = {}
        for file in self.files:
            handle = self._handle(file)
            self.metadata.update(handle.metadata() or {})
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if name in self._where:
                    raise TwinmergeError(
                        f"Tensor {name!r} stands in both {self._where[name]} and {file}. Remove the file that is not the model's."
                    )
                piece = handle.get_slice(name)
                if piece.get_dtype() not in DTYPES:
                    raise TwinmergeError(
                        f"Tensor {name!r} in {file} has dtype {piece.get_dtype()}, which cannot be merged. "
                        "Convert the model to bfloat16, float16 or float32 first (load it in transformers with "
                        "dtype=torch.bfloat16, dequantize, save_pretrained)."
                    )
                self._where[name] = file
                self.specs[name] = Spec(DTYPES[piece.get_dtype()], tuple(piece.get_shape()))

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open a model folder: its index if it has one, else model.safetensors, else its only safetensors file."""
        if (index := folder / INDEX).is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise TwinmergeError(
                    f"{index} is not a valid index (weight_map: tensor -> file). Download it again."
                ) from error
            for shard in shards:
                if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
                    raise TwinmergeError(
                        f"{index} names the shard {shard!r}, which is not in the folder. Download it again."
                    )
            return cls(folder / shard for shard in shards)
        if (single := folder / SINGLE).is_file():
            return cls([single])
        loose = sorted(folder.glob("*.safetensors"))
        if len(loose) == 1:
            return cls(loose)
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
        file = self._where[name]
        try:
            tensor: Tensor = self._handle(file).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise TwinmergeError(
                f"Tensor {name!r} in {file} cannot be read: {error}. Download the file again."
            ) from error
        return tensor

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            try:
                context = safe_open(file, framework="pt")
                self._open[file] = (context, context.__enter__())
            except (SafetensorError, OSError, ValueError) as error:
                raise TwinmergeError(
                    f"{file} is truncated or no safetensors file ({error}). Download or save it again."
                ) from error
        return self._open[file][1]

    def close(self) -> None:
        for context, _ in self._open.values():
            context.__exit__(None, None, None)
        self._open.clear()
