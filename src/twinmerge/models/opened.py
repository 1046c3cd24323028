"""An opened model: canonical tensor names, specs and values, wherever it comes from."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import TwinmergeError, nearest
from twinmerge.store.artefact import fingerprint
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.header import SIZES
from twinmerge.store.locate import locate

if TYPE_CHECKING:  # torch and transformers take seconds and 200 MB to import, which a plain merge does without
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from twinmerge.maths.lowrank import Factors
    from twinmerge.models.adapter import Adapter
    from twinmerge.models.architecture import Architecture
    from twinmerge.store.ranges import Flat

ModelLike = str | os.PathLike[str] | Any
"""A path, a hub id, `base+adapter`, a transformers PreTrainedModel or a PeftModel."""


class Source(Protocol):
    """Where a model's tensors are read from, by their stored names."""

    def read(self, name: str) -> Tensor:
        """The whole tensor."""

    def read_into(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat, in the stored dtype."""

    def place(self, name: str) -> tuple[int, int]:
        """Where it lies, for reading in the order of the disk: file number and offset."""


class InMemory:
    """The tensors of a module."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def read_into(self, name: str, start: int, out: Flat) -> None:
        tensor = self.tensors[name].reshape(-1)
        to = as_tensor(out, tensor.dtype)
        to.copy_(tensor[start : start + len(to)])

    def place(self, name: str) -> tuple[int, int]:
        return 0, list(self.tensors).index(name)


@dataclass
class OpenedModel:
    """A model whose tensors are read on demand.

    name: how messages call it; specs: canonical name -> dtype and shape; stored: canonical -> name in its files;
    architecture: None for bare checkpoints; folder: where its side files are; commit: hub commit;
    labels: label names of a classifier; files: what is read, empty for models in memory.
    """

    name: str
    specs: dict[str, Spec]
    stored: dict[str, str]
    architecture: Architecture | None
    source: Source
    folder: Path | None = None
    commit: str | None = None
    files: tuple[Path, ...] = ()
    factors: Mapping[str, Factors] = field(default_factory=dict)
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def config(self) -> PretrainedConfig | None:
        return self.architecture.config if self.architecture else None

    @property
    def labels(self) -> list[str] | None:
        return self.architecture.labels if self.architecture else None

    @property
    def aliases(self) -> dict[str, str]:
        return self.architecture.aliases if self.architecture else {}

    def turned(self, name: str) -> bool:
        """Whether a matrix is known to be stored (in, out)."""
        return self.architecture is not None and self._own(name) in self.architecture.turned

    def has(self, name: str) -> bool:
        return name in self.specs or self.aliases.get(name) in self.specs

    def spec(self, name: str) -> Spec:
        return self.specs[name] if name in self.specs else self.specs[self.aliases[name]]

    def read(self, name: str) -> Tensor:
        """The tensor, with the adapter's part added (in float32) where there is one."""
        name = self._own(name)
        tensor = self.dense[name] if name in self.dense else self.source.read(self.stored[name])
        if name in self.factors:
            tensor = tensor.float() + self.factors[name].entries(0, tensor.numel()).reshape(tensor.shape)
        return tensor

    def range_code(self, name: str) -> str:
        """The dtype that `read_range` gives, as safetensors calls it: the stored one, F32 where an adapter adds to it."""
        name = self._own(name)
        return "F32" if name in self.factors else self.specs[name].code

    def read_range(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill the bytes of `out` with elements from `start` on of the tensor, flat."""
        name = self._own(name)
        if name in self.dense:
            tensor = self.dense[name].reshape(-1)
            to = as_tensor(out, tensor.dtype)
            to.copy_(tensor[start : start + len(to)])
        elif name in self.factors:
            import torch

            to = as_tensor(out, torch.float32)
            stored = torch.empty(len(to), dtype=self.specs[name].dtype)
            self.source.read_into(self.stored[name], start, stored)
            torch.add(stored.float(), self.factors[name].entries(start, start + len(to)), out=to)
        else:
            self.source.read_into(self.stored[name], start, out)

    def low_rank(self, name: str) -> bool:
        """Whether an adapter changes the tensor."""
        return self._own(name) in self.factors

    def factors_on(self, base: OpenedModel, name: str) -> Factors | None:
        """What takes the base's tensor to this model's, as a low-rank product; None where it is none.

        Rank 0 where the tensor is the base's own. Tensors of the same file are not read for that.
        """
        import torch

        from twinmerge.maths.lowrank import Factors

        name = self._own(name)
        theirs = base._own(name)
        spec = self.spec(name)
        if name in self.dense or theirs in base.dense or base.low_rank(name) or spec != base.spec(name):
            return None
        if not (
            self.files and self.files[: len(base.files)] == base.files and self.stored[name] == base.stored[theirs]
        ):
            own, other = self.source.read(self.stored[name]), base.source.read(base.stored[theirs])
            if own is not other and not torch.equal(own, other):
                return None
        if name in self.factors:
            return self.factors[name]
        rows = spec.shape[0] if spec.shape else 1
        return Factors(torch.zeros(rows, 0), torch.zeros(0, spec.numel // max(rows, 1)))

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: file number and offset."""
        name = self._own(name)
        return (-1, 0) if name in self.dense else self.source.place(self.stored[name])

    def _own(self, name: str) -> str:
        return self.aliases[name] if name not in self.specs and name in self.aliases else name

    def fingerprint(self) -> str:
        return fingerprint(self.specs, self.beginning)

    def beginning(self, name: str, count: int) -> NDArray[np.uint8]:
        """The bytes of the first `count` elements of the tensor, flat."""
        out = np.empty(count * SIZES[self.range_code(name)], np.uint8)
        self.read_range(name, 0, out)
        return out


def as_tensor(flat: Flat, dtype: torch.dtype) -> Tensor:
    """Bytes seen as a 1-D tensor, without a copy; a tensor is what it is."""
    import torch

    if not isinstance(flat, np.ndarray):
        return flat
    return torch.from_numpy(flat).view(dtype) if flat.size else torch.empty(0, dtype=dtype)


def open_model(model: ModelLike, name: str | None = None) -> OpenedModel:
    """Open a path, a hub id, `base+adapter`, a PreTrainedModel or a PeftModel.

    Errors:
        TwinmergeError: as `locate`, `Checkpoint.open` and `read_adapter` say.
    """
    if isinstance(model, (str, os.PathLike)):
        return _open_folder(os.fspath(model), name)
    if "transformers" in sys.modules and isinstance(model, sys.modules["transformers"].PreTrainedModel):
        return _open_module(model, name or type(model).__name__)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _open_peft(model, name or "PeftModel")
    raise TwinmergeError(
        f"Cannot open a {type(model).__name__} as a model. Give a path, a hub id, a PreTrainedModel or a PeftModel."
    )


def _open_folder(ref: str, name: str | None) -> OpenedModel:
    found = locate(ref)
    checkpoint = Checkpoint.open(found.folder)
    architecture = None
    if (found.folder / "config.json").is_file():
        from twinmerge.models.architecture import Architecture, class_of, read_config

        config = read_config(found.folder)
        architecture = Architecture(config, class_of(config)) if config is not None else None
    specs: Mapping[str, Spec] = checkpoint.specs
    source: Source = checkpoint
    if architecture is not None and architecture.converts:
        from twinmerge.models.conversion import taken_apart

        specs, source = taken_apart(architecture, specs, source)
    opened = _named(name or ref, specs, architecture, source)
    opened.folder, opened.commit, opened.files = found.folder, found.commit, checkpoint.files
    if found.adapter is None:
        return opened
    from twinmerge.models.adapter import ADAPTER_FILES, read_adapter

    opened.files += tuple(found.adapter / name for name in ADAPTER_FILES)
    return adapted(opened, read_adapter(found.adapter))


def _named(name: str, specs: Mapping[str, Spec], architecture: Architecture | None, source: Source) -> OpenedModel:
    """Give canonical names to a checkpoint's tensors; a tied tensor that is stored twice counts once."""
    stored: dict[str, str] = {}
    for original in sorted(specs):
        canonical = architecture.canonical(original) if architecture else original
        if canonical in stored:
            raise TwinmergeError(
                f"In {name} the tensors {stored[canonical]!r} and {original!r} are one and the same parameter "
                f"{canonical!r}. Save the model again with save_pretrained."
            )
        stored[canonical] = original
    for alias, own in (architecture.aliases if architecture else {}).items():
        if alias in stored and own not in stored:
            stored[own] = stored[alias]
        stored.pop(alias, None)
    return OpenedModel(name, {n: specs[o] for n, o in stored.items()}, stored, architecture, source)


def _open_module(model: PreTrainedModel, name: str) -> OpenedModel:
    from twinmerge.models.architecture import Architecture

    architecture = Architecture(model.config, type(model))
    return _in_memory(name, architecture, {k: v.detach() for k, v in model.state_dict().items()})


def _in_memory(name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> OpenedModel:
    """The tensors of a module, as a checkpoint of it would have them."""
    from twinmerge.models.conversion import as_stored

    found = as_stored(architecture, tensors)
    for alias in architecture.aliases:
        found.pop(alias, None)
    specs = {n: Spec(tensor.dtype, tuple(tensor.shape)) for n, (_, tensor) in found.items()}
    stored = {n: key for n, (key, _) in found.items()}
    return OpenedModel(name, specs, stored, architecture, InMemory(dict(found.values())))


def _open_peft(model: Any, name: str) -> OpenedModel:
    from peft import get_peft_model_state_dict

    from twinmerge.models.adapter import adapter_from
    from twinmerge.models.architecture import Architecture

    adapter_name = model.active_adapter
    config = model.peft_config[adapter_name].to_dict()
    tensors = {k: v.detach() for k, v in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}
    adapter = adapter_from(config, tensors, name)
    inner = model.get_base_model()
    plain = {
        key.replace(".base_layer.", ".").replace(".original_module.", "."): value.detach()
        for key, value in inner.state_dict().items()
        if ".lora_" not in key and ".modules_to_save." not in key
    }
    return adapted(_in_memory(name, Architecture(inner.config, type(inner)), plain), adapter)


def adapted(opened: OpenedModel, adapter: Adapter) -> OpenedModel:
    """The model with the adapter on top; its class becomes that of the adapter's task."""
    import torch

    from twinmerge.models.architecture import Architecture, class_of

    config = opened.config
    if config is not None and adapter.task is not None:
        task_class = class_of(config, adapter.task)
        assert opened.architecture is not None
        if task_class is not opened.architecture.model_class:
            config = type(config).from_dict(config.to_dict())
            outputs = [t.shape[0] for n, t in adapter.dense.items() if n.endswith("weight") and t.dim() == 2]
            if outputs and adapter.task in ("SEQ_CLS", "TOKEN_CLS"):
                config.num_labels = outputs[-1]
            opened.architecture = Architecture(config, task_class)
    canonical = opened.architecture.of_module if opened.architecture else str
    factors = {canonical(n): f for n, f in _oriented(adapter, opened.architecture).items()}
    for alias, own in opened.aliases.items():
        if alias in factors and own in factors and not all(map(torch.equal, factors[alias], factors[own])):
            raise TwinmergeError(
                f"The adapter {adapter.name} changes {alias!r} and {own!r} each in its own way, but the base {opened.name} ties them: one "
                "tensor cannot hold both. Untie the base (tie_word_embeddings), or train an adapter of one of them."
            )
    factors = {opened.aliases.get(n, n): f for n, f in factors.items()}
    dense = {canonical(n): t for n, t in adapter.dense.items()}
    for alias, source in opened.aliases.items():  # PEFT saves the base of an adapted output layer that is tied
        if alias in dense and source in opened.specs and torch.equal(dense[alias], opened.read(source)):
            del dense[alias]
    for name in factors:
        if name not in opened.specs:
            raise TwinmergeError(
                f"The adapter {adapter.name} changes {name!r}, which its base {opened.name} does not have."
                f"{nearest(name, opened.specs)} Name the base that the adapter was trained on."
            )
        shape = opened.specs[name].shape
        if factors[name].shape != (shape[0], math.prod(shape[1:])):
            raise TwinmergeError(
                f"The adapter {adapter.name} changes {name!r} as {list(factors[name].shape)}, in its base {opened.name} it is "
                f"{list(shape)}. Name the base that the adapter was trained on."
            )
    for name, tensor in dense.items():
        opened.specs[name] = Spec(tensor.dtype, tuple(tensor.shape))
    opened.factors, opened.dense = factors, dense
    return opened


def _oriented(adapter: Adapter, architecture: Architecture | None) -> dict[str, Factors]:
    """The factors as each module stores its weight: PEFT saves one `fan_in_fan_out`, whatever kinds are adapted."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from twinmerge.maths.lowrank import Factors

    modules = dict(architecture.skeleton.named_modules()) if architecture else {}
    turned = {}
    for name, factors in adapter.factors.items():
        module = modules.get(name.removesuffix(".weight"))
        if isinstance(module, (nn.Linear, Conv1D)) and isinstance(module, Conv1D) != adapter.fan_in_fan_out:
            factors = Factors(factors.a.T.contiguous(), factors.b.T.contiguous())
        turned[name] = factors
    return turned
