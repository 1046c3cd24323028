"""What is known of a model's class without its weights: names, shapes, ties, what tensors are for, how it is built.

`Architecture` is what the rest of the library asks. As it stands it is a plain torch module whose tensors are stored
under their own names; `models/transformers_class.py` adds what transformers does to names on loading, and
`models/torch_module.py` has the modules that somebody brings along. A checkpoint of which no class is known has none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

LEAF = ("weight", "bias")
TABLE = ("embed", "bias", "token", "rel_pos", "latent", "probe", "scale", "A_log", "time_")
"""In the names of parameters that a class holds itself, in no module of their own, and multiplies no inputs with
(`pos_embed`, `relative_position_bias_table`, `pos_bias_u`, the biases of experts in one tensor, the decay of a
state-space layer)."""


class Architecture(ABC):
    """One model class, built without memory (on the meta device).

    Canonical names are those of tensors in the bare model, which all models of one family share.

    Args:
        skeleton: the module on the meta device; it is never changed.

    Attributes:
        config: the settings of a transformers model; None for other modules.
        converts: whether the class holds some tensors otherwise than they are stored (see `models/conversion.py`).
        torn: whether a checkpoint has its own values for a tensor that the class ties.
        prefix: of the bare model inside the class, which canonical names are without.
    """

    config: Any = None
    converts: bool = False
    prefix: str = ""

    def __init__(self, skeleton: nn.Module) -> None:
        self.skeleton: Any = skeleton
        self._meta: dict[str, torch.Tensor] = dict(skeleton.state_dict())
        self.torn = False

    # ------------------------------------------------------------------------------- building

    @abstractmethod
    def build(self) -> nn.Module:
        """The module with its buffers; its parameters are replaced by who asks."""

    def with_config(self, config: dict[str, Any]) -> Architecture:
        """The same class with another config, as `to_dict` gives it."""
        raise AssertionError(f"{self.model_class.__name__} has no config")

    def differing(self, base: Architecture) -> dict[str, tuple[Any, Any]]:
        """What this class computes otherwise than the base's with the same weights, where no config says it: (its
        own, the base's)."""
        return {}

    @property
    def model_class(self) -> Any:
        """The module's class."""
        return type(self.skeleton)

    @property
    def labels(self) -> list[str] | None:
        """The label names of a classifier."""
        return None

    # ---------------------------------------------------------------------------------- names

    def of_module(self, name: str) -> str:
        """The canonical name of a parameter by its name in the module."""
        return name.removeprefix(self.prefix) if self.prefix else name

    def canonical(self, stored: str) -> str:
        """The canonical name of a tensor as a checkpoint of this class names it."""
        return self.of_module(stored)

    def filled(self, stored: str) -> list[str]:
        """Canonical names of the parameters that loading fills from a tensor of a checkpoint; none where it does not
        load it."""
        return [self.of_module(stored)] if stored in self._meta else []

    def shape(self, stored: str) -> torch.Size | None:
        """The shape that a tensor of a checkpoint has in the module; None where loading makes something else of it."""
        return self._meta[stored].shape if stored in self._meta else None

    def drops(self, stored: str) -> bool:
        """Whether loading passes over a tensor without a word."""
        return stored not in self._meta and stored in self._buffers

    def fused_into(self, stored: str) -> tuple[str, str] | None:
        """(canonical name of the parameter that a stored tensor becomes a part of, the pattern that says so), if it
        does."""
        return None

    def converter_of(self, pattern: str) -> WeightConverter:
        """How transformers puts a parameter together, by one of the patterns of its parts."""
        raise AssertionError(f"{self.model_class.__name__} holds its tensors as they are stored")

    def converted(self, canonical: str) -> tuple[str, WeightConverter | None, str]:
        """Name in the module of the parameter that a stored tensor is a part of, and the converter and the pattern
        that make it so; None where the class holds the tensor as it is, or does not know it."""
        return canonical, None, ""

    def optional(self, canonical: str) -> bool:
        """Whether loading makes a tensor of the class itself, without a word, where a checkpoint does not hold it."""
        return False

    def lacking(self, filled: set[str]) -> list[str]:
        """Canonical names of the float tensors that loading would make at random, where these are filled."""
        ties = {alias for alias, own in self.aliases.items() if own in filled}
        return [
            canonical
            for name, tensor in self._meta.items()
            if (canonical := self.of_module(name)) not in filled
            and canonical not in ties
            and tensor.is_floating_point()
            and not self.optional(canonical)
        ]

    @cached_property
    def parameters(self) -> dict[str, torch.Size]:
        """Canonical name -> shape of all parameters and persistent buffers that the class has."""
        return {self.of_module(name): tensor.shape for name, tensor in self._meta.items()}

    @cached_property
    def _buffers(self) -> frozenset[str]:
        return frozenset(buffer for buffer, _ in self.skeleton.named_buffers())

    # ----------------------------------------------------------------------------------- ties

    @cached_property
    @abstractmethod
    def aliases(self) -> dict[str, str]:
        """Canonical name of a tied tensor -> the one that it shares its values with.

        What the class says; `settle_ties` says what a checkpoint's values make of it.
        """

    def settle_ties(self, present: Collection[str], equal: Callable[[str, str], bool]) -> dict[str, str]:
        """Tie what transformers ties when it loads a checkpoint, and nothing else; `aliases` is that from then on.

        Two tensors that are both there are tied where their values are equal. Where only one is there, the others
        take its values.

        Args:
            present: canonical names of the tensors that the checkpoint holds.
            equal: whether two of them hold the same values.

        Returns:
            name -> the tensor of the checkpoint that it has its values from, of every tied name; itself where it is
                there.
        """
        ties = list(self.aliases.items())
        there, source_of = set(present), {name: name for pair in ties for name in pair}
        for i, (target, source) in enumerate(ties):
            if target in there and source in there:
                if not equal(source_of[source], source_of[target]):
                    self.torn = True
                    continue
            elif target in there:
                target, source = source, target
            elif source not in there:
                others = (t for t, s in ties[i + 1 :] if s == source and t in there)
                if (source := next(others, "")) == "":
                    continue
            source_of[target] = source_of[source]
            there.add(target)
        own = {
            source_of[name]: name for name in reversed([s for _, s in ties])
        }  # the name that the class ties the others to
        self.aliases = {n: own.get(s, s) for n, s in source_of.items() if n in there and n != own.get(s, s)}
        return {n: s for n, s in source_of.items() if n in there}

    # ------------------------------------------------------------------- what tensors are for

    def is_body(self, canonical: str) -> bool:
        """True for tensors inside the bare model; all of them where the class has no part outside it."""
        return True

    @property
    def is_bare(self) -> bool:
        """True for the bare model's own class, which is all body."""
        return True

    @cached_property
    def transposed(self) -> frozenset[str]:
        """Canonical names of the matrices that are stored (in, out): those of Conv1D."""
        modules = self.skeleton.named_modules()
        return frozenset(self.of_module(f"{path}.weight") for path, module in modules if isinstance(module, Conv1D))

    @cached_property
    def tables(self) -> frozenset[str]:
        """Canonical names of what is looked up by a row's number or added and multiplies no inputs: embeddings of
        tokens and places, tables of relative biases; not the output layer that is tied to one.

        Example:
            >>> from transformers import T5Config, T5Model
            >>> from twinmerge.models.transformers_class import TransformersArchitecture
            >>> tiny = T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
            >>> sorted(TransformersArchitecture(tiny, T5Model).tables)[3:]
            ['encoder.embed_tokens.weight', 'shared.weight']
        """
        found = {
            self.of_module(f"{path}.{name}" if path else name)
            for path, module in self.skeleton.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            or (name not in LEAF and any(t in name for t in TABLE))
        }
        return frozenset(found | {own for alias, own in self.aliases.items() if alias in found})

    @cached_property
    def norms(self) -> frozenset[str]:
        """Canonical names of the gains and shifts of modules that normalise, which are no matrices whatever their shape.

        Example:
            >>> from twinmerge.models.torch_module import ModuleArchitecture
            >>> sorted(ModuleArchitecture(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([2, 3]))).norms)
            ['1.bias', '1.weight']
        """
        kinds = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
        return frozenset(
            self.of_module(f"{path}.{name}" if path else name)
            for path, module in self.skeleton.named_modules()
            if isinstance(module, kinds) or "Norm" in type(module).__name__
            for name, _ in module.named_parameters(recurse=False)
        )

    @cached_property
    def stacks(self) -> dict[str, bool]:
        """Canonical names of parameters (E, m, n) that hold matrices along their leading axis, as the experts of one
        layer in one tensor -> whether those are stored (in, out).

        Example:
            >>> from transformers import MixtralConfig, MixtralForCausalLM
            >>> from twinmerge.models.transformers_class import TransformersArchitecture
            >>> sizes = dict(
            ...     vocab_size=8, hidden_size=4, intermediate_size=6, num_attention_heads=2, num_key_value_heads=2
            ... )
            >>> tiny = MixtralConfig(num_hidden_layers=1, num_local_experts=3, **sizes)
            >>> TransformersArchitecture(tiny, MixtralForCausalLM).stacks
            {'layers.0.mlp.experts.gate_up_proj': False, 'layers.0.mlp.experts.down_proj': False}
        """
        found: dict[str, bool] = {}
        for path, module in self.skeleton.named_modules():
            if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                continue
            own = {
                name: p.shape
                for name, p in module.named_parameters(recurse=False)
                if p.dim() == 3 and min(p.shape) > 1 and name.endswith(("weight", "proj"))
            }
            transposed = _stored_transposed(module, own)
            found |= {self.of_module(f"{path}.{name}" if path else name): transposed for name in own}
        return found

    @cached_property
    def embedding(self) -> str | None:
        """The canonical name of the input embedding, which has a row for each token of the vocabulary."""
        return None


def _stored_transposed(module: nn.Module, experts: dict[str, torch.Size]) -> bool:
    """Whether a module's experts are stored (in, out): by their two matrices, the first of which has gate and up side
    by side, else by what the module says of itself."""
    if {"gate_up_proj", "down_proj"} <= experts.keys():
        (_, a, b), (_, c, d) = experts["gate_up_proj"], experts["down_proj"]
        if (a, b) == (d, 2 * c) != (2 * d, c):
            return True
        if (a, b) == (2 * d, c) != (d, 2 * c):
            return False
    return bool(getattr(module, "is_transposed", False))
