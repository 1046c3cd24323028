"""Reading old checkpoints, which are pickles, where that is asked for: with torch's loader of tensors alone.

`torch.load(weights_only=True)` makes tensors and plain containers and calls nothing else; the numbers stay in the file,
which is mapped, until they are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from twinmerge.errors import DamagedFile, ModelError
from twinmerge.store.checkpoint import DIFFUSION, SINGLE, check_range
from twinmerge.store.foreign import find, is_file_name, matches, read_json, reason
from twinmerge.store.header import Spec
from twinmerge.store.locate import PICKLED, converting
from twinmerge.store.ranges import bytes_of

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.store.ranges import Flat

NAMES = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin")
OTHERS = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "*.index.json")
"""Pickles beside the weights of a model, which are none."""


def pickles_in(folder: Path) -> list[Path] | None:
    """The files of a folder whose weights are pickled; None where it has safetensors, or nothing.

    Raises:
        TwinmergeError: several files of which no index says that they belong together; an index of files that are not
            there.
    """
    if find(folder, SINGLE) or find(folder, DIFFUSION) or any(folder.glob("*.safetensors")):
        return None
    for name in NAMES[:2]:
        if (index := find(folder, f"{name}.index.json")) is not None:
            names = sorted(set((read_json(index).get("weight_map") or {}).values()))
            found = [find(folder, each) if is_file_name(str(each)) else None for each in names]
            if not names or None in found:
                raise DamagedFile(f"{index} names files that are not in the folder. Download it again.")
            return [file for file in found if file is not None]
        if (single := find(folder, name)) is not None:
            return [single]
    loose = [p for p in sorted(folder.glob("*")) if p.suffix in PICKLED and not matches(p.name, OTHERS)]
    if len(loose) > 1:
        raise ModelError(f"{folder} holds {len(loose)} pickles and no index. Name the file that is the model.")
    return [file for p in loose if (file := find(folder, p.name)) is not None] or None


class Pickled:
    """The tensors of pickled files by name, as `Checkpoint` has those of safetensors.

    Args:
        files: of one model.

    Attributes:
        files: the same.
        specs: name -> dtype and shape.

    Raises:
        TwinmergeError: a file that holds something else than tensors, or that an old release of torch wrote.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(files)
        self.specs: dict[str, Spec] = {}
        self._tensors: dict[str, Tensor] = {}
        self._place: dict[str, tuple[int, int]] = {}
        for i, file in enumerate(self.files):
            for name, tensor in _read(file).items():
                if name in self._tensors:
                    raise ModelError(f"Tensor {name!r} stands in {file} and in another file. Remove one of them.")
                self._tensors[name] = tensor
                self._place[name] = (i, tensor.data_ptr())
                with contextlib.suppress(KeyError):
                    self.specs[name] = Spec(tensor.dtype, tuple(tensor.shape))
                if name not in self.specs:
                    raise ModelError(f"Tensor {name!r} in {file} is {tensor.dtype}, which no model of weights has.")

    def read(self, name: str) -> Tensor:
        """The tensor `name`, whole."""
        return self._tensors[name].clone().contiguous()

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat."""
        import torch

        spec = self.specs[name]
        check_range(name, spec, start, out)
        to = np.frombuffer(bytes_of(out), np.uint8)
        flat = self._tensors[name].contiguous().reshape(-1)[start : start + to.nbytes // spec.itemsize]
        if flat.numel():
            to[:] = flat.view(torch.uint8).numpy()

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: the number of its file, and an order inside it."""
        return self._place[name]


def _read(file: Path) -> Mapping[str, Tensor]:
    """Name -> tensor of one file, mapped."""
    import torch

    try:
        raw: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds here; the user needs one sentence
        raise ModelError(
            f"{file} cannot be read as tensors alone ({reason(error)[:200]}). {converting(file)}"
        ) from error
    wrapped = isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping)
    found = raw["state_dict"] if wrapped else raw
    if not isinstance(found, Mapping):
        raise ModelError(f"{file} holds a {type(found).__name__} and no tensors by name. Save a state_dict.")
    for name, value in found.items():
        if not isinstance(name, str) or not torch.is_tensor(value) or value.is_sparse or value.is_quantized:
            raise ModelError(f"{file} holds {name!r:.80}, a {type(value).__name__}, beside tensors. Save a state_dict.")
    return {name: value.detach() for name, value in found.items()}
