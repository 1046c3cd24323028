"""What a module holds besides its parameters, buffers and parts, and would hold wrongly with other weights."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import Optimizer

from twinmerge.errors import ModelError

REGISTERED = ("_parameters", "_buffers", "_modules", "_flat_weights", "_flat_weight_refs")
"""What torch itself sees to (the last two are lists of RNNs, which they renew)."""


def refuse_computed(module: nn.Module, part: nn.Module, path: str) -> None:
    """Refuse a part whose weights are computed from other tensors.

    Raises:
        ModelError: it is normed, parametrized or pruned; it says how that is taken off.
    """
    hooks = list(part._forward_pre_hooks.values())
    off = {
        "a parametrization": ("torch.nn.utils.parametrize.remove_parametrizations", hasattr(part, "parametrizations")),
        "weight norm": ("torch.nn.utils.remove_weight_norm", any(type(h).__name__ == "WeightNorm" for h in hooks)),
        "spectral norm": (
            "torch.nn.utils.remove_spectral_norm",
            any(type(h).__name__ == "SpectralNorm" for h in hooks),
        ),
        "pruning": ("torch.nn.utils.prune.remove", any(isinstance(h, prune.BasePruningMethod) for h in hooks)),
    }
    for what, (remove, there) in off.items():
        if there:
            raise ModelError(
                f"The weights of {path or type(module).__name__!r} are computed from other tensors ({what}), which do "
                f"not merge as they do. Take that off first ({remove})."
            )


def refuse_held(module: nn.Module, new: bool) -> None:
    """Refuse a module that holds tensors in a way in which a copy with other weights would still have the old ones.

    Args:
        module: the whole one.
        new: it was just made and never ran, so that what it holds is no memory of its weights.

    Raises:
        ModelError: it does; it says where.
    """
    parts = {id(part) for part in module.modules()}
    stored = [tensor for tensor in module.state_dict(keep_vars=True).values() if isinstance(tensor, Tensor)]
    weights = {id(tensor) for tensor in stored}
    fixed = {id(buffer) for buffer in module.buffers()} - weights
    memory = {place for tensor in stored if (place := _memory(tensor))}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in REGISTERED:
                continue
            at = f"{f'{path}.{name}' if path else name!r} of {type(module).__name__}"
            for found, shared in _held(value):
                weight = isinstance(found, Tensor) and (id(found) in weights or _memory(found) in memory)
                if shared and (weight or id(found) in parts):
                    raise ModelError(
                        f"{at} is a function or a reference that reads the module's own weights, and a copy with other "
                        "weights would read the old ones. Make it a method."
                    )
                if weight:
                    raise ModelError(
                        f"{at} holds one of its weights a second time, and would keep the old one. Read the weight where "
                        "it is used, or make it a ParameterList."
                    )
                empty = isinstance(found, nn.Module) and not found.state_dict()
                if not (new or empty or id(found) in fixed or id(found) in parts):
                    what = "a module that is no part of it" if isinstance(found, nn.Module) else "a plain tensor"
                    raise ModelError(
                        f"{at} holds {what}, which may be a memory of its old weights. Register it (register_buffer, "
                        "persistent or not; add_module), or give a factory (TorchModel)."
                    )


def _memory(tensor: Tensor) -> int:
    """Where a tensor's numbers begin; 0 where it has none."""
    try:
        return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()
    except (
        NotImplementedError,
        RuntimeError,
    ):  # sparse and other kinds have no storage, which torch says in either way
        return 0


def _held(
    value: Any, shared: bool = False, seen: set[tuple[int, bool]] | None = None, inside: bool = False
) -> Iterator[tuple[Tensor | nn.Module, bool]]:
    """Tensors and modules in a value, and whether copy.deepcopy would share them: those that functions close over or
    that are weakly referred to.

    Args:
        value: its containers, functions and, unless it is `inside` one already, the attributes of an object are
            looked into.
    """
    seen = set() if seen is None else seen
    if (id(value), shared) in seen:
        return
    seen.add((id(value), shared))
    if isinstance(value, weakref.ReferenceType):
        yield from _held(value(), True, seen, inside)
    elif type(value) in weakref.ProxyTypes:
        yield from _held(value.__repr__.__self__, True, seen, inside)
    elif isinstance(value, (Tensor, nn.Module)):
        yield value, shared
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _held(inner, shared, seen, inside)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for inner in value:
            yield from _held(inner, shared, seen, inside)
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        for inner in (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
            yield from _held(inner, True, seen, inside)
    elif isinstance(value, types.MethodType):
        yield from _held(value.__self__, shared, seen, inside)
    elif isinstance(value, functools.partial):
        yield from _held((value.func, value.args, value.keywords), shared, seen, inside)
    elif not inside and hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType, Optimizer)):
        for inner in vars(value).values():
            yield from _held(inner, shared, seen, True)


def _filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # of a name that has no value yet
        return False
