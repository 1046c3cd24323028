"""Modules of torch that are no models of transformers: any `nn.Module`, or a function that makes one, and its
weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.arguments import shown
from twinmerge.errors import ModelError, UsageError
from twinmerge.models.architecture import Architecture
from twinmerge.models.held import refuse_computed, refuse_held
from twinmerge.models.settings import differing_settings, settings_of
from twinmerge.results import Shown

WRAPPERS = ("_orig_mod", "module")
"""Where `torch.compile` and the parallel wrappers keep the module that they are around."""


@dataclass(frozen=True, eq=False, repr=False)
class TorchModel(Shown):
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

    def __post_init__(self) -> None:
        if not isinstance(self.weights, (Mapping, str, os.PathLike)):
            raise UsageError(
                f"The weights of a TorchModel are {shown(self.weights)}. Give a state dict, a folder or a safetensors "
                "file."
            )

    def _summary(self) -> str:
        held = isinstance(self.weights, Mapping)
        where = f"{len(self.weights)} tensors" if held else os.fspath(self.weights)  # type: ignore[arg-type]
        return f"{self.name or getattr(self.factory, '__name__', 'a module')}, {where}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return ("what", "value"), [("name", self.name), ("factory", self.factory), ("weights", self._summary())]


class ModuleArchitecture(Architecture):
    """What a module that somebody brings along says of itself.

    Args:
        module: as it is to be run; its parameters' values do not matter.
        new: it was just made and never ran.

    Raises:
        TwinmergeError: its tensors are not its weights (normed, parametrized or pruned ones), or a copy with other
            weights would still hold some of the old ones.

    Example:
        >>> found = ModuleArchitecture(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)))
        >>> sorted(found.tables), found.parameters["1.weight"], found.skeleton[1].weight.device.type
        (['0.weight'], torch.Size([2, 2]), 'meta')
    """

    def __init__(self, module: nn.Module, new: bool = False) -> None:
        _check(module, new)
        super().__init__(_on_meta(module))
        self._module = _on_meta(module)  # to be copied, with buffers that no checkpoint holds

    @classmethod
    def made_by(cls, factory: Callable[[], nn.Module]) -> ModuleArchitecture:
        """Of the module that a function makes.

        Raises:
            UsageError: it needs arguments, fails, or makes no module.
        """
        if isinstance(factory, nn.Module):
            raise UsageError("The factory is a module. Give a function that makes one, such as lambda: Net().")
        try:
            signature(factory).bind()
        except TypeError as error:
            raise UsageError(
                f"The factory needs arguments ({error}). Give one without, such as lambda: Net(8)."
            ) from None
        except ValueError:  # of a function that does not say
            pass
        try:
            made = factory()
        except Exception as error:
            raise UsageError(
                f"The factory fails ({type(error).__name__}: {error}). Give one that makes the module."
            ) from error
        if not isinstance(made, nn.Module):
            raise UsageError(f"The factory gave a {type(made).__name__}. Give a function that makes an nn.Module.")
        return cls(unwrapped(made), new=True)

    def build(self) -> nn.Module:
        """A copy of the module, with its buffers; its parameters have no values yet."""
        return copy.deepcopy(self._module).eval()

    def keep_fixed(self, names: Collection[str], read: Callable[[str], Tensor]) -> None:
        """Take the integers of a checkpoint for those that the module was made with: what computes otherwise is told
        by them.

        Args:
            names: of the tensors of the checkpoint.
            read: gives one of them.
        """
        for path, part in self.skeleton.named_modules():
            for name, buffer in part._buffers.items():
                key = f"{path}.{name}" if path else name
                if buffer is None or buffer.is_floating_point() or key not in self._meta or key not in names:
                    continue
                if (stored := read(key)).shape == buffer.shape:
                    part._buffers[name] = stored

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
        """Path -> what a part is here and in the base, of all that compute otherwise with the same weights.

        Example:
            >>> one, two = (ModuleArchitecture(nn.Sequential(nn.GroupNorm(n, 4))) for n in (1, 2))
            >>> one.differing(two)
            {'0': ('GroupNorm(num_groups=1)', 'GroupNorm(num_groups=2)')}
        """
        found: dict[str, tuple[Any, Any]] = {}
        found |= differing_settings(settings_of(self.skeleton), settings_of(base.skeleton))
        return found


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
        made = copy.deepcopy(module, dict(kept))
    except Exception as error:  # what a module holds besides its parameters may be anything
        raise ModelError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}). Give a module that "
            "copy.deepcopy copies."
        ) from error
    if {id(part) for part in made.modules()} & {id(part) for part in module.modules()}:
        raise ModelError(
            f"A copy of {type(module).__name__} shares parts with it (its __deepcopy__ gives itself). Give a module that "
            "copy.deepcopy copies."
        )
    return made


def _check(module: nn.Module, new: bool) -> None:
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ModelError(
                f"{path or type(module).__name__!r} is a ScriptModule, which takes no other weights. Give the module that "
                "it was scripted or traced from."
            )
        refuse_computed(module, part, path)
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(f"The parameter {name!r} has no shape yet. Run the module once before it is merged.")
    refuse_held(module, new)
