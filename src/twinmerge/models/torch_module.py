"""Modules of torch that are no models of transformers: any `nn.Module`, or a function that makes one, and its
weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import ModelError, UsageError
from twinmerge.models.architecture import Architecture

WRAPPERS = ("_orig_mod", "module")
"""Where `torch.compile` and the parallel wrappers keep the module that they are around."""


@dataclass(frozen=True, eq=False)
class TorchModel:
    """A function that makes a module, and the weights to put into it.

    Attributes:
        factory: gives the module, with any weights.
        weights: a state dict, a folder with safetensors files, or one such file.
        name: how messages call it.

    Example:
        >>> import twinmerge as tm
        >>> def factory():
        ...     return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> one, two = factory().state_dict(), factory().state_dict()
        >>> merged = tm.merge("average", experts={"a": TorchModel(factory, one), "b": TorchModel(factory, two)})
        >>> bool(torch.allclose(merged.state_dict()["0.bias"], (one["0.bias"] + two["0.bias"]) / 2))
        True
    """

    factory: Callable[[], nn.Module]
    weights: Mapping[str, Tensor] | str | os.PathLike[str]
    name: str | None = None


class ModuleArchitecture(Architecture):
    """What a module that somebody brings along says of itself.

    Args:
        module: as it is to be run; its parameters' values do not matter.

    Raises:
        TwinmergeError: its tensors are not its weights: normed or parametrized ones, or state that is no tensor.

    Example:
        >>> found = ModuleArchitecture(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))
        >>> sorted(found.tables), found.parameters["1.weight"], found.skeleton[1].weight.device.type
        (['0.weight'], torch.Size([2, 2]), 'meta')
    """

    def __init__(self, module: nn.Module) -> None:
        _check(module)
        super().__init__(_on_meta(module))
        self._module = _on_meta(module)  # to be copied, with buffers that no checkpoint holds

    @classmethod
    def made_by(cls, factory: Callable[[], nn.Module]) -> ModuleArchitecture:
        """Of the module that a function makes.

        Raises:
            UsageError: it makes none.
        """
        made = factory()
        if not isinstance(made, nn.Module):
            raise UsageError(f"The factory gave a {type(made).__name__}. Give a function that makes an nn.Module.")
        return cls(unwrapped(made))

    def build(self) -> nn.Module:
        """A copy of the module, with its buffers; its parameters have no values yet."""
        return copy.deepcopy(self._module).eval()

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Name of a parameter that the module holds twice -> the first name of it."""
        first: dict[int, str] = {}
        found = {}
        for name, parameter in self._named():
            own = first.setdefault(id(parameter), name)
            if own != name:
                found[name] = own
        return found

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.skeleton.named_parameters(remove_duplicate=False)
        persistent = self._meta
        yield from ((n, b) for n, b in self.skeleton.named_buffers(remove_duplicate=False) if n in persistent)

    def differing(self, base: Architecture) -> dict[str, tuple[Any, Any]]:
        """Path -> what the module is here and in the base, of all that compute otherwise with the same weights.

        Example:
            >>> one, two = (ModuleArchitecture(nn.Sequential(nn.Linear(1, 1), act)) for act in (nn.ReLU(), nn.GELU()))
            >>> one.differing(two)
            {'1': ('ReLU()', "GELU(approximate='none')")}
        """
        here, there = _leaves(self.skeleton), _leaves(base.skeleton)
        return {
            path: (here.get(path, "nothing"), there.get(path, "nothing"))
            for path in [*here, *(there.keys() - here.keys())]
            if here.get(path) != there.get(path)
        }


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside what compiles it or spreads it over devices.

    Example:
        >>> inner = nn.Linear(1, 1)
        >>> unwrapped(nn.DataParallel(inner)) is inner
        True
    """
    while type(module).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        module = next(getattr(module, name) for name in WRAPPERS if hasattr(module, name))
    return module


def tensors_of(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Raises:
        ModelError: it holds something else.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"The state of {name} holds {key!r}, a {type(value).__name__}, which cannot be merged. Leave it out of "
                "the state."
            )
        if value.is_sparse or value.is_quantized or value.is_complex():
            raise ModelError(
                f"Tensor {key!r} of {name} is sparse, quantised or complex, which is not merged. Give it dense and "
                "real."
            )
    return {key: value.detach() for key, value in state.items()}


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without the parameters' memory."""
    kept = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.is_floating_point() and p.requires_grad)
        for p in module.parameters()
    }
    try:
        return copy.deepcopy(module, dict(kept))
    except Exception as error:  # what a module holds besides its parameters may be anything
        raise ModelError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}). Give a module that "
            "copy.deepcopy copies."
        ) from error


def _check(module: nn.Module) -> None:
    for path, part in module.named_modules():
        hooks = [type(hook).__name__ for hook in part._forward_pre_hooks.values()]
        normed = {"WeightNorm", "SpectralNorm"} & set(hooks)
        if normed or (hasattr(part, "parametrizations") and len(part.parametrizations)):
            raise ModelError(
                f"The weights of {path or type(module).__name__!r} are computed from other tensors "
                f"({', '.join(sorted(normed)) or 'a parametrization'}), which do not merge as they do. Take that off "
                "first (torch.nn.utils.parametrize.remove_parametrizations)."
            )
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"The parameter {name!r} has no shape yet. Run the module once before it is merged.")


def _leaves(module: nn.Module) -> dict[str, str]:
    """Path -> what a module without parts says of itself; of those with weights not their sizes, which shapes tell."""
    found = {}
    for path, part in module.named_modules():
        if any(True for _ in part.children()):
            found[path] = type(part).__name__
        elif any(True for _ in part.parameters(recurse=False)):
            found[path] = f"{type(part).__name__}({_settings(part)})"
        else:
            found[path] = repr(part)
    return found


def _settings(part: nn.Module) -> str:
    """What of a layer's settings its weights do not show."""
    hidden = (
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "eps",
        "momentum",
        "num_heads",
        "bidirectional",
        "batch_first",
    )
    return ", ".join(f"{name}={getattr(part, name)!r}" for name in hidden if hasattr(part, name))
