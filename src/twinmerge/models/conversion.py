"""Tensors that a class holds otherwise than they are stored: experts one by one on the disk, all in one tensor in the
module.

What is merged, split and saved are the stored tensors, a matrix for each expert; what runs are the module's
parameters. transformers' own conversions lead from one to the other, both ways. They stack, join, cut and turn, and
compute nothing, so what holds of values holds of changes to them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, dot_natural_key, revert_weight_conversion

from twinmerge.errors import ModelError
from twinmerge.models.architecture import Architecture
from twinmerge.models.source import Source
from twinmerge.store.checkpoint import Spec

if TYPE_CHECKING:
    from twinmerge.store.ranges import Flat

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

        Raises:
            TwinmergeError: some of the parts are missing, or do not fit together.
        """
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.parts.items():
            converter.add_tensor(self.first, name, pattern, read(name))  # type: ignore[arg-type]
        skeleton = self.architecture.skeleton
        try:
            made = converter.convert(self.first, model=skeleton, config=skeleton.config)
        except Exception as error:  # whatever an operation makes of parts that are not all there
            raise ModelError(
                f"The {len(self.parts)} tensors of {self.architecture.of_module(self.first)!r}, the first is "
                f"{next(iter(self.parts))!r}, do not "
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
        >>> from twinmerge.models.transformers_class import TransformersArchitecture
        >>> mixtral = TransformersArchitecture(config, transformers.MixtralForCausalLM)
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
    """Canonical name -> name in a checkpoint and tensor, as `save_pretrained` writes them; as they are for classes
    that convert nothing.

    Args:
        tensors: name of a parameter in the module -> tensor; all of them, or some.

    Example:
        >>> import transformers
        >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1)
        >>> config = transformers.MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=2)
        >>> from twinmerge.models.transformers_class import TransformersArchitecture
        >>> mixtral = TransformersArchitecture(config, transformers.MixtralForCausalLM)
        >>> found = as_stored(mixtral, {"model.layers.0.mlp.experts.down_proj": torch.ones(2, 4, 6)})
        >>> {name: stored for name, (stored, _) in found.items()}  # doctest: +NORMALIZE_WHITESPACE
        {'layers.0.block_sparse_moe.experts.0.w2.weight': 'model.layers.0.block_sparse_moe.experts.0.w2.weight',
         'layers.0.block_sparse_moe.experts.1.w2.weight': 'model.layers.0.block_sparse_moe.experts.1.w2.weight'}
    """
    if architecture.converts:
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


class Taken:
    """A source whose tensors are as the class holds them, read as they would be stored: `save_pretrained` can write
    either.

    One tensor of the source is kept in memory, since the parts of one are read one after the other.
    """

    def __init__(self, architecture: Architecture, source: Source, parts: Mapping[str, tuple[str, str]]) -> None:
        self.architecture, self.source, self.parts = architecture, source, parts
        self._last: tuple[str, dict[str, Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        if name not in self.parts:
            return self.source.read(name)
        whole, key = self.parts[name]
        last = self._last
        if last is None or last[0] != whole:
            made = as_stored(self.architecture, {key: self.source.read(whole)})
            last = self._last = whole, dict(made.values())
        return last[1][name]

    def read_into(self, name: str, start: int, out: Flat) -> None:
        if name not in self.parts:
            self.source.read_into(name, start, out)
            return
        flat = self.read(name).reshape(-1)
        to = out if isinstance(out, Tensor) else torch.from_numpy(out).view(flat.dtype)
        to.copy_(flat[start : start + len(to)])

    def place(self, name: str) -> tuple[int, int]:
        return self.source.place(self.parts[name][0] if name in self.parts else name)


def taken_apart(
    architecture: Architecture, specs: Mapping[str, Spec], source: Source
) -> tuple[dict[str, Spec], Source]:
    """Specs and source of a checkpoint as `save_pretrained` writes it by default, for files that hold experts as the
    class does.

    Args:
        specs: name in the files -> dtype and shape.
    """
    if not architecture.converts:
        return dict(specs), source
    keys = {architecture.of_module(key): key for key in architecture.skeleton.state_dict()}
    whole, parts = dict(specs), dict[str, tuple[str, str]]()
    for name, spec in specs.items():
        key = keys.get(architecture.canonical(name))
        if key is None or architecture.converted(architecture.of_module(key))[1] is not None:
            continue
        made = as_stored(architecture, {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta")})
        shapes = {n: tuple(tensor.shape) for n, (_, tensor) in made.items()}
        back = [each.parameters(shapes) for each in conversions(architecture, made)]
        if back != [[architecture.of_module(key)]]:  # as it is stored, or only together with others
            continue
        del whole[name]
        for stored, tensor in made.values():
            parts[stored] = name, key
            whole[stored] = Spec(spec.dtype, tuple(tensor.shape))
    return (whole, Taken(architecture, source, parts)) if parts else (whole, source)
