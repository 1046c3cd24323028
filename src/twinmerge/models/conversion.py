"""Tensors that a class holds otherwise than they are stored: experts one by one on the disk, all in one tensor in the module.

What is merged, split and saved are the stored tensors, a matrix for each expert; what runs are the module's parameters.
transformers' own conversions lead from one to the other, both ways. They stack, join, cut and turn, and compute nothing, so
what holds of values holds of changes to them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

from twinmerge.errors import TwinmergeError
from twinmerge.models.architecture import Architecture

Shape = tuple[int, ...]


class Conversion(NamedTuple):
    """Stored tensors that together make one parameter of a module, or some of them.

    architecture: whose; converter: transformers' own; first: the parameter's name in the module, the first of several;
    parts: canonical name of a stored tensor -> the pattern of the converter that it is of, in the order of the experts.
    """

    architecture: Architecture
    converter: WeightConverter
    first: str
    parts: dict[str, str]

    def __call__(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Canonical name of each parameter -> its tensor.

        Args:
            read: gives the stored tensor of a canonical name.

        Errors:
            TwinmergeError: some of the parts are missing, or do not fit together.
        """
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.parts.items():
            converter.add_tensor(self.first, name, pattern, read(name))  # type: ignore[arg-type]
        skeleton = self.architecture.skeleton
        try:
            made = converter.convert(self.first, model=skeleton, config=skeleton.config)
        except Exception as error:  # whatever an operation makes of parts that are not all there
            raise TwinmergeError(
                f"The {len(self.parts)} tensors of {self.architecture.of_module(self.first)!r}, the first is {next(iter(self.parts))!r}, do not "
                "fit together. Take a checkpoint that has all of them in one size."
            ) from error
        found = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return {self.architecture.of_module(name): value for name, value in found.items()}

    def parameters(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Canonical names of the parameters that it makes of parts of these shapes."""
        return list(self(lambda name: torch.empty(shapes[name], device="meta")))


def conversions(architecture: Architecture, names: Iterable[str]) -> list[Conversion]:
    """What the class makes of stored tensors that it does not hold as they are; nothing for most classes.

    Args:
        names: canonical ones.

    Example:
        >>> import transformers
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1)
        >>> config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)
        >>> mixtral = Architecture(config, transformers.MixtralForCausalLM)
        >>> names = [f"layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(2)]
        >>> [found] = conversions(mixtral, ["norm.weight", *names])
        >>> found({name: torch.ones(4, 6) for name in names}.__getitem__)["layers.0.mlp.experts.down_proj"].shape
        torch.Size([2, 4, 6])
    """
    found: dict[str, Conversion] = {}
    if not architecture.converts:
        return []
    for name in sorted(names, key=dot_natural_key):
        if name in architecture.parameters:
            continue
        target, converter, pattern = architecture.converted(name)
        if converter is not None:
            each = found.setdefault(target, Conversion(architecture, converter, target, {}))
            each.parts[name] = pattern
    return list(found.values())


def as_module(state: Mapping[str, Tensor], found: Iterable[Conversion]) -> dict[str, Tensor]:
    """Canonical name -> tensor, as the class holds them.

    Args:
        state: canonical name -> tensor, as they are stored or as the class holds them.
        found: the conversions of these names.
    """
    whole = dict(state)
    for each in found:
        made = each(state.__getitem__)
        for part in each.parts:
            del whole[part]
        whole |= made
    return whole


def as_stored(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Canonical name -> name in a checkpoint and tensor, as `save_pretrained` writes them.

    Args:
        tensors: name of a parameter in the module -> tensor; all of them, or some.

    Example:
        >>> import transformers
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1)
        >>> config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)
        >>> mixtral = Architecture(config, transformers.MixtralForCausalLM)
        >>> found = as_stored(mixtral, {"model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 6)})
        >>> {name: stored for name, (stored, _) in found.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'layers.0.block_sparse_moe.experts.0.w2.weight': 'model.layers.0.block_sparse_moe.experts.0.w2.weight',
         'layers.0.block_sparse_moe.experts.1.w2.weight': 'model.layers.0.block_sparse_moe.experts.1.w2.weight'}
    """
    if architecture.renames:
        reverted: dict[str, Tensor] = revert_weight_conversion(architecture.skeleton, dict(tensors))
        found = {architecture.canonical(key): (key, tensor) for key, tensor in reverted.items()}
        known = all(n in architecture.parameters or architecture.converted(n)[1] is not None for n in found)
        if known and len(found) == len(reverted):
            return found
    return {architecture.of_module(key): (key, tensor) for key, tensor in tensors.items()}


def stored_names(architecture: Architecture) -> dict[str, str]:
    """Name in a checkpoint, as `save_pretrained` writes it -> canonical name, of every tensor of the class."""
    found = as_stored(architecture, architecture.skeleton.state_dict())
    return {stored: name for name, (stored, _) in found.items()}
