"""An opened model: canonical tensor names, specs and values, wherever it comes from."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.errors import ModelError, UsageError
from twinmerge.models.source import Source
from twinmerge.store.artefact import fingerprint
from twinmerge.store.checkpoint import Checkpoint, Spec
from twinmerge.store.foreign import find
from twinmerge.store.header import SIZES
from twinmerge.store.locate import locate
from twinmerge.store.values import decoded

if TYPE_CHECKING:  # torch and transformers take seconds and 200 MB to import, which a plain merge does without
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from twinmerge.maths.lowrank import Factors
    from twinmerge.models.adapter import Adapter
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.change import Change
    from twinmerge.models.torch_module import TorchModel
    from twinmerge.store.ranges import Flat

ModelLike = str | os.PathLike[str] | Any
"""A path, a hub id, `base+adapter`, a transformers PreTrainedModel, a PeftModel, any nn.Module or a `TorchModel`."""

USUAL_TABLES = (
    *("embeddings.weight", "embedding.weight", "embed_tokens.weight", "embed_positions.weight", "embed_in.weight"),
    *(".wte.weight", ".wpe.weight", ".shared.weight", "relative_attention_bias.weight", "relative_position_bias_table"),
)
"""Ends of the names that embeddings have in most families."""

PIECE = 1 << 22  # elements of two tensors that are compared at once
NUMBERS = frozenset({"BF16", "F16", "F32", "F64"})


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
    labels: label names of a classifier; files: what is read, empty for models in memory; changes: canonical name -> what an
    adapter makes of the tensor; tables: its embeddings, where they are known without an architecture.
    """

    name: str
    specs: dict[str, Spec]
    stored: dict[str, str]
    architecture: Architecture | None
    source: Source
    folder: Path | None = None
    commit: str | None = None
    files: tuple[Path, ...] = ()
    changes: Mapping[str, Change] = field(default_factory=dict)
    tables: frozenset[str] | None = None

    @property
    def config(self) -> PretrainedConfig | None:
        return self.architecture.config if self.architecture else None

    @property
    def labels(self) -> list[str] | None:
        return self.architecture.labels if self.architecture else None

    @property
    def aliases(self) -> dict[str, str]:
        return self.architecture.aliases if self.architecture else {}

    @property
    def names(self) -> list[str]:
        """Canonical names of all tensors, tied ones too."""
        return sorted({*self.specs, *(alias for alias, own in self.aliases.items() if own in self.specs)})

    @property
    def filled(self) -> set[str]:
        """Canonical names of what loading fills from these tensors; their own where there is no class."""
        if self.architecture is None:
            return set(self.names)
        return {*self.names}.union(*(self.architecture.filled(self.stored.get(n, n)) for n in self.specs))

    @property
    def knows_class(self) -> bool:
        """Whether its class says what each of its tensors is for."""
        return self.architecture is not None or self.tables is not None

    def turned(self, name: str) -> bool:
        """Whether a matrix is known to be stored (in, out)."""
        name = self.own(name)
        known = self.architecture
        return known is not None and (name in known.turned or known.stacks.get(name, False))

    def stacked(self, name: str) -> bool:
        """Whether a tensor (E, m, n) holds matrices along its leading axis, as the experts of one layer in one tensor.

        Its class says so; of a bare checkpoint, which names none, the module's usual name does.
        """
        name = self.own(name)
        if self.architecture is not None:
            return name in self.architecture.stacks
        return self.tables is None and len(self.specs[name].shape) == 3 and ".experts." in f".{name}"

    def table(self, name: str) -> bool:
        """Whether a tensor is looked up by a row's number and multiplies nothing: an embedding, a table of relative biases.

        Its class says so; of a bare checkpoint, which names none, the usual names do.
        """
        name = self.own(name)
        known = self.architecture.tables if self.architecture is not None else self.tables
        return name in known if known is not None else f".{name}".endswith(USUAL_TABLES)

    def has(self, name: str) -> bool:
        return name in self.specs or self.aliases.get(name) in self.specs

    def spec(self, name: str) -> Spec:
        return self.specs[name] if name in self.specs else self.specs[self.aliases[name]]

    @cached_property
    def factors(self) -> dict[str, Factors]:
        """Canonical name -> what an adapter adds to the base's tensor, where that is a product of low rank."""
        return {name: change.low for name, change in self.changes.items() if change.low is not None}

    def read(self, name: str) -> Tensor:
        """The whole tensor, as `read_range` gives it."""
        name = self.own(name)
        if name not in self.changes:
            return self.source.read(self.stored[name])
        import torch

        from twinmerge.store.header import torch_dtype

        spec = self.specs[name]
        out = torch.empty(spec.numel, dtype=torch_dtype(self.range_code(name)))
        self.read_range(name, 0, out)
        return out.reshape(spec.shape)

    def range_code(self, name: str) -> str:
        """The dtype that `read_range` gives, as safetensors calls it: the stored one, F32 where an adapter adds to it."""
        name = self.own(name)
        change = self.changes.get(name)
        return self.specs[name].code if change is None or change.added is None else "F32"

    def read_range(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` (bytes, or numbers of the dtype of `range_code`) with elements from `start` on of the tensor, flat."""
        name = self.own(name)
        change = self.changes.get(name)
        if change is None:
            self.source.read_into(self.stored[name], start, out)
            return
        import torch

        from twinmerge.store.header import torch_dtype

        to = as_tensor(out, torch_dtype(self.range_code(name)))
        if change.dense is not None:
            stored = change.dense.reshape(-1)[start : start + len(to)].clone()
        else:
            stored = torch.empty(len(to), dtype=self.specs[name].dtype)
            self.source.read_into(self.stored[name], start, stored)
        change.apply(stored, start, to)

    def low_rank(self, name: str) -> bool:
        """Whether an adapter adds a product of low rank to the base's tensor."""
        return self.own(name) in self.factors

    def factors_on(self, base: OpenedModel, name: str) -> Factors | None:
        """What takes the base's tensor to this model's, as a low-rank product; None where it is none.

        Rank 0 where the tensor is the base's own. Tensors of the same file are not read for that.
        """
        import torch

        from twinmerge.maths.lowrank import Factors

        name = self.own(name)
        theirs = base.own(name)
        spec = self.spec(name)
        if (name in self.changes and not self.low_rank(name)) or theirs in base.changes or spec != base.spec(name):
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
        name = self.own(name)
        change = self.changes.get(name)
        return (-1, 0) if change is not None and change.dense is not None else self.source.place(self.stored[name])

    def own(self, name: str) -> str:
        """The canonical name that a tensor's values are kept under: another one where it is tied."""
        return self.aliases[name] if name not in self.specs and name in self.aliases else name

    def fingerprint(self) -> str:
        return fingerprint(self.specs, self.beginning)

    def beginning(self, name: str, count: int) -> NDArray[np.uint8]:
        """The bytes of the first `count` elements of the tensor, flat."""
        out = np.empty(count * SIZES[self.range_code(name)], np.uint8)
        self.read_range(name, 0, out)
        return out

    def stored_beginning(self, name: str, count: int) -> tuple[NDArray[np.uint8], str]:
        """The same, and its dtype, without the low-rank product that an adapter adds: of the base that it is on."""
        change = self.changes.get(self.own(name))
        if change is None or change.dense is not None:
            return self.beginning(name, count), self.range_code(name)
        spec = self.spec(name)
        out = np.empty(count * SIZES[spec.code], np.uint8)
        self.source.read_into(self.stored[self.own(name)], 0, out)
        return out, spec.code


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
    if "torch" in sys.modules:
        from twinmerge.models.torch_module import TorchModel, unwrapped

        if isinstance(model, TorchModel):
            return _open_torch_model(model, model.name or name)
        if isinstance(model, sys.modules["torch"].nn.Module):
            inner = unwrapped(model)
            return open_model(inner, name) if inner is not model else _open_any_module(model, name)
    raise UsageError(
        f"Cannot open a {type(model).__name__} as a model. Give a path, a hub id, a PreTrainedModel, a PeftModel, an nn.Module or a "
        "TorchModel."
    )


def _open_folder(ref: str, name: str | None) -> OpenedModel:
    found = locate(ref)
    checkpoint = Checkpoint.open(found.folder)
    architecture = None
    if find(found.folder, "config.json"):
        from twinmerge.models.bounds import most_parameters
        from twinmerge.models.transformers_class import TransformersArchitecture, class_of, read_config

        config = read_config(found.folder, checkpoint.specs)
        most = most_parameters(len(checkpoint.specs))
        architecture = TransformersArchitecture(config, class_of(config), most) if config is not None else None
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
    """Give canonical names to a checkpoint's tensors.

    Errors:
        TwinmergeError: two tensors of one name; a shape that the config does not give.
    """
    stored: dict[str, str] = {}
    for original in sorted(specs):
        canonical = architecture.canonical(original) if architecture else original
        if canonical in stored:
            raise ModelError(
                f"In {name} the tensors {stored[canonical]!r} and {original!r} are one and the same parameter "
                f"{canonical!r}. Save the model again with save_pretrained."
            )
        stored[canonical] = original
        shape = architecture.shape(original) if architecture else None
        if shape is not None and specs[original].shape != tuple(shape):
            raise ModelError(
                f"In {name} the tensor {original!r} is {list(specs[original].shape)}, by its config it is {list(shape)}. Restore the "
                "config.json that was saved with it."
            )
    return _tied(name, specs, stored, architecture, source)


def _open_module(model: PreTrainedModel, name: str) -> OpenedModel:
    from twinmerge.models.transformers_class import TransformersArchitecture

    tensors = {k: v.detach() for k, v in model.state_dict().items()}
    if any(".lora_" in key or ".base_layer." in key for key in tensors):
        raise ModelError(
            f"{name} holds adapters inside. Give the PeftModel around it, or call merge_and_unload() first."
        )
    architecture = TransformersArchitecture(model.config, type(model))
    return _in_memory(name, architecture, tensors)


def _open_any_module(model: nn.Module, name: str | None) -> OpenedModel:
    from twinmerge.models.torch_module import ModuleArchitecture, tensors_of

    name = name or type(model).__name__
    return _in_memory(name, ModuleArchitecture(model), tensors_of(model.state_dict(), name))


def _open_torch_model(model: TorchModel, name: str | None) -> OpenedModel:
    from twinmerge.models.torch_module import ModuleArchitecture, tensors_of

    architecture = ModuleArchitecture.made_by(model.factory)
    if isinstance(model.weights, Mapping):
        name = name or architecture.model_class.__name__
        return _in_memory(name, architecture, tensors_of(model.weights, name))
    path = Path(model.weights)
    checkpoint = Checkpoint([path]) if path.is_file() else Checkpoint.open(locate(os.fspath(path)).folder)
    opened = _named(name or str(path), checkpoint.specs, architecture, checkpoint)
    opened.folder, opened.files = path if path.is_dir() else None, checkpoint.files
    return opened


def _in_memory(name: str, architecture: Architecture, tensors: Mapping[str, Tensor]) -> OpenedModel:
    """The tensors of a module, as a checkpoint of it would have them."""
    from twinmerge.models.conversion import as_stored

    found = as_stored(architecture, tensors)
    stored = {canonical: key for canonical, (key, _) in found.items()}
    values = dict(found.values())
    specs = {key: Spec(tensor.dtype, tuple(tensor.shape)) for key, tensor in values.items()}
    return _tied(name, specs, stored, architecture, InMemory(values))


def _tied(
    name: str,
    specs: Mapping[str, Spec],
    stored: dict[str, str],
    architecture: Architecture | None,
    source: Source,
) -> OpenedModel:
    """A tied tensor that is stored twice counts once. What a config calls tied and a file gives other values is not tied: loading
    does not tie it either.

    Args:
        specs: of the tensors by their stored names; stored: canonical name -> stored name.
    """
    if architecture is not None and architecture.aliases:

        def equal(a: str, b: str) -> bool:
            a, b = stored[a], stored[b]
            return a == b or same_values(source, (a, specs[a]), (b, specs[b]))

        held = architecture.settle_ties(stored, equal)
        own = {n: stored[root] for n, root in held.items()}
        stored = {n: o for n, o in (stored | own).items() if n not in architecture.aliases}
    return OpenedModel(name, {n: specs[o] for n, o in stored.items()}, stored, architecture, source)


def same_values(source: Source, a: tuple[str, Spec], b: tuple[str, Spec]) -> bool:
    """Whether two stored tensors hold equal numbers, read piece by piece up to the first difference.

    Args:
        a, b: stored name and spec of each.
    """
    if a[1].shape != b[1].shape:
        return False
    for start in range(0, a[1].numel, PIECE):
        one, other = (np.empty(min(PIECE, spec.numel - start) * spec.itemsize, np.uint8) for spec in (a[1], b[1]))
        source.read_into(a[0], start, one)
        source.read_into(b[0], start, other)
        if a[1].code == b[1].code and np.array_equal(one, other):
            continue
        if not NUMBERS.issuperset((a[1].code, b[1].code)):
            return False
        if a[1].code == b[1].code == "F64":
            if not np.array_equal(one.view(np.float64), other.view(np.float64)):
                return False
        elif not np.array_equal(decoded(one, a[1].code), decoded(other, b[1].code)):
            return False
    return True


def _refuse_strange(inner: Any, name: str) -> None:
    from transformers import PretrainedConfig

    config = getattr(inner, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ModelError(
            f"The base of {name} is a {type(inner).__name__}, not a model of transformers. Give it as a folder of safetensors, merged "
            "(merge_and_unload)."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"The base of {name} is quantised, and quantised weights cannot be merged. Load the base in 16 or 32 bits, and the adapter on it."
        )


def _open_peft(model: Any, name: str) -> OpenedModel:
    from twinmerge.models.in_memory import adapter_of, base_tensors
    from twinmerge.models.transformers_class import TransformersArchitecture

    inner = model.get_base_model()
    _refuse_strange(inner, name)
    adapter = adapter_of(model, name)
    return adapted(_in_memory(name, TransformersArchitecture(inner.config, type(inner)), base_tensors(inner)), adapter)


def adapted(opened: OpenedModel, adapter: Adapter) -> OpenedModel:
    """The model with the adapter on top; its class becomes that of the adapter's task.

    Errors:
        TwinmergeError: as `placed` says.
    """
    from twinmerge.models.placing import Base, class_for, placed

    if opened.changes:
        raise ModelError(
            f"{opened.name} has an adapter already, so {adapter.name} cannot be put on it. Merge the first one into its base (merge_and_unload)."
        )
    opened.architecture = class_for(adapter, opened.architecture)
    base = Base(opened.name, opened.architecture, opened.specs, opened.stored, opened.aliases, opened.read)
    opened.changes = placed(adapter, base)
    dense = {name: change.dense for name, change in opened.changes.items() if change.dense is not None}
    opened.specs = {**opened.specs, **{n: Spec(t.dtype, tuple(t.shape)) for n, t in dense.items()}}
    return opened
