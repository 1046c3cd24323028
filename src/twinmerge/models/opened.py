"""An opened model: canonical tensor names, specs and values, wherever it comes from."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twinmerge.models.source import Source
from twinmerge.store.artefact import fingerprint
from twinmerge.store.checkpoint import Spec
from twinmerge.store.foreign import find
from twinmerge.store.header import SIZES

if TYPE_CHECKING:  # torch and transformers take seconds and 200 MB to import, which a plain merge does without
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from twinmerge.maths.lowrank import Factors
    from twinmerge.models.architecture import Architecture
    from twinmerge.models.tokens import Sides
    from twinmerge.store.ranges import Flat

ModelLike = str | os.PathLike[str] | Any
"""A path, a hub id, `base+adapter`, a transformers PreTrainedModel, a PeftModel, any nn.Module or a `TorchModel`."""

USUAL_TABLES = (
    *("embeddings.weight", "embedding.weight", "embed_tokens.weight", "embed_positions.weight", "embed_in.weight"),
    *(".wte.weight", ".wpe.weight", ".shared.weight", "relative_attention_bias.weight", "relative_position_bias_table"),
)
"""Ends of the names that embeddings have in most families."""


class Changed(Protocol):
    """What is read in the place of a tensor that a model's files hold: what an adapter makes of it, or rows of it in
    another order.

    low: the product of low rank that it adds, where that is all; elsewhere: nothing of the stored tensor's place or
    beginning holds of it; read_of: the tensors that it is made of, by model and name, where those are others than the
    model's own of this name.
    """

    @property
    def low(self) -> Factors | None: ...

    @property
    def elsewhere(self) -> bool: ...

    @property
    def read_of(self) -> Sequence[tuple[OpenedModel, str]]: ...

    def range_code(self, stored: str) -> str:
        """The dtype that is read, of a stored one."""

    def read_range(self, stored: Callable[[int, Flat], None], spec: Spec, start: int, out: Flat) -> None:
        """Fill `out` with elements from `start` on, flat.

        Args:
            stored: reads the stored tensor.
            spec: of the tensor.
            start: the first element.
            out: bytes, or numbers of the dtype of `range_code`.
        """


class Openable(ABC):
    """What makes an opened model of itself."""

    @abstractmethod
    def opened(self, name: str | None) -> OpenedModel:
        """The opened model.

        Args:
            name: how messages call it.
        """


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
    architecture: None for bare checkpoints; folder: where its side files are; commit: hub commit; labels: label names
    of a classifier; files: what is read, empty for models in memory; changes: canonical name -> what is read in the
    place of the stored tensor; tables: its embeddings, where they are known without an architecture; by_token: the
    same of what has a row for each token; adapter: the folder of the adapter that is on it; config_changes: what its
    config says otherwise than the config.json in its folder; sides: what lies beside it otherwise than in its folder.
    """

    name: str
    specs: dict[str, Spec]
    stored: dict[str, str]
    architecture: Architecture | None
    source: Source
    folder: Path | None = None
    commit: str | None = None
    files: tuple[Path, ...] = ()
    changes: Mapping[str, Changed] = field(default_factory=dict)
    tables: frozenset[str] | None = None
    by_token: frozenset[str] | None = None
    adapter: Path | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    sides: Sides | None = None

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

    @property
    def why_no_class(self) -> str:
        """Why no class says what its tensors are for, in messages."""
        named = self.folder is not None and find(self.folder, "config.json") is not None
        return "is merged by its tensors' names alone" if named else "has no config.json"

    @property
    def is_file(self) -> bool:
        """Whether it is a single file, beside which nothing is known of it."""
        return self.folder is None and len(self.files) == 1 and self.architecture is None

    def transposed(self, name: str) -> bool:
        """Whether a matrix is known to be stored (in, out)."""
        name = self.own(name)
        known = self.architecture
        return known is not None and (name in known.transposed or known.stacks.get(name, False))

    def stacked(self, name: str) -> bool:
        """Whether a tensor (E, m, n) holds matrices along its leading axis, as the experts of one layer in one tensor.

        Its class says so; of a bare checkpoint, which names none, the module's usual name does.
        """
        name = self.own(name)
        if self.architecture is not None:
            return name in self.architecture.stacks
        return self.tables is None and len(self.specs[name].shape) == 3 and ".experts." in f".{name}"

    def table(self, name: str) -> bool:
        """Whether a tensor is looked up by a row's number and multiplies nothing: an embedding, a table of relative
        biases.

        Its class says so; of a bare checkpoint, which names none, the usual names do.
        """
        name = self.own(name)
        known = self.architecture.tables if self.architecture is not None else self.tables
        return name in known if known is not None else f".{name}".endswith(USUAL_TABLES)

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor is a float buffer (running statistics), of which there is no exact mixture, as its class says."""
        known = self.architecture
        return known is not None and any(known.of_module(each) == name for each, _ in known.skeleton.named_buffers())

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
        """The dtype that `read_range` gives, as safetensors calls it: the stored one, or a wider one where values are
        computed, as an adapter's are."""
        name = self.own(name)
        change = self.changes.get(name)
        return self.specs[name].code if change is None else change.range_code(self.specs[name].code)

    def read_range(self, name: str, start: int, out: Flat) -> None:
        """Fill `out` (bytes, or numbers of the dtype of `range_code`) with elements from `start` on of the tensor,
        flat."""
        name = self.own(name)
        change = self.changes.get(name)
        if change is None:
            self.source.read_into(self.stored[name], start, out)
        else:
            change.read_range(partial(self.source.read_into, self.stored.get(name, name)), self.specs[name], start, out)

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

    def read_of(self, name: str) -> Sequence[tuple[OpenedModel, str]]:
        """The tensors of models that a tensor is made of, where they are others than its own in these files."""
        change = self.changes.get(self.own(name))
        return () if change is None else change.read_of

    def place(self, name: str) -> tuple[int, int]:
        """Where the tensor lies: file number and offset."""
        name = self.own(name)
        change = self.changes.get(name)
        return (-1, 0) if change is not None and change.elsewhere else self.source.place(self.stored[name])

    def own(self, name: str) -> str:
        """The canonical name that a tensor's values are kept under: another one where it is tied."""
        return self.aliases[name] if name not in self.specs and name in self.aliases else name

    def stored_name(self, name: str) -> str:
        """How its files call a tensor; a tied one is called as what it is tied to."""
        return self.stored[self.own(name)]

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
        if change is None or change.elsewhere:
            return self.beginning(name, count), self.range_code(name)
        spec = self.spec(name)
        out = np.empty(count * SIZES[spec.code], np.uint8)
        self.source.read_into(self.stored[self.own(name)], 0, out)
        return out, spec.code


def as_bytes(flat: Flat) -> NDArray[np.uint8]:
    """The memory of a 1-D tensor as bytes, without a copy."""
    import torch

    return flat if isinstance(flat, np.ndarray) else flat.view(torch.uint8).numpy()


def as_tensor(flat: Flat, dtype: torch.dtype) -> Tensor:
    """Bytes seen as a 1-D tensor, without a copy; a tensor is what it is."""
    import torch

    if not isinstance(flat, np.ndarray):
        return flat
    return torch.from_numpy(flat).view(dtype) if flat.size else torch.empty(0, dtype=dtype)
