"""The arguments and answers of a module as rows of a batch, and the module with other parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from twinmerge.errors import UsageError
from twinmerge.models.rows import joined


class CacheError(UsageError):
    """A module whose rows are to be answered apart is given a cache of all rows."""


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every argument by its number or name."""
    yield from ((str(i), v) for i, v in enumerate(args))
    yield from kwargs.items()


def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The arguments that are tensors with an axis."""
    return ((name, v) for name, v in arguments(args, kwargs) if isinstance(v, Tensor) and v.dim())


def tensors_of(name: str, value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in an argument, tuples included.

    Raises:
        CacheError: it is something else than tensors and plain values (a cache).
    """
    if isinstance(value, Tensor):
        if value.dim():
            yield name, value
    elif isinstance(value, (tuple, list)):
        for i, one in enumerate(value):
            yield from tensors_of(f"{name}.{i}", one, path)
    elif value is not None and not isinstance(value, (bool, int, float, str, torch.dtype, torch.device, torch.Size)):
        raise CacheError(
            f"The module {path!r} is given a {type(value).__name__}, which cannot be told apart by rows. Say "
            "use_cache=False, give "
            'one mixture for the whole batch, or say strategy="rebuild".'
        )


def rows_of_value(value: Any, rows: slice, times: Mapping[str, int | None], name: str | None = None) -> Any:
    """Some rows of an argument; times: entries of a row of each tensor in it, None where it is one for all."""
    if name is None:
        name = next((n.partition(".")[0] for n in times), "")
    if isinstance(value, Tensor):
        each = times.get(name)
        return value if each is None else value[rows.start * each : rows.stop * each]
    if isinstance(value, (tuple, list)):
        return type(value)(rows_of_value(v, rows, times, f"{name}.{i}") for i, v in enumerate(value))
    return value


def together(found: Sequence[Any]) -> Any:
    """The rows of several answers, one after the other."""
    first = found[0]
    if isinstance(first, (tuple, list)):
        return type(first)(together(parts) for parts in zip(*found, strict=True))
    if isinstance(first, Tensor):
        return torch.cat(list(found)) if first.dim() else first
    return joined(found) if hasattr(first, "keys") else first


def alike(a: Any, b: Any) -> bool:
    """The same numbers, up to rounding."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        size = float(torch.nan_to_num(b, posinf=0.0, neginf=0.0).abs().max()) if b.numel() else 0.0
        error = torch.finfo(b.dtype).eps ** 0.5 * max(size, 1e-6)
        return torch.allclose(a, b, rtol=torch.finfo(b.dtype).eps ** 0.5, atol=error, equal_nan=True)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "keys") and hasattr(b, "keys"):
        return all(alike(a.get(k), b[k]) for k in b if b[k] is not None)
    return a is None or b is None or type(a) is type(b)


@contextmanager
def hiding(values: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """Within the context the modules' parameters are these; the parameters themselves are not touched."""
    with ExitStack() as stack:
        for (module, attribute), value in values.items():
            if isinstance(module, nn.RNNBase):  # it reads a list of its weights, unless they are others than it knows
                names, flat, known = module._flat_weights_names, module._flat_weights, module._flat_weight_refs
                module._flat_weights = [value if n == attribute else w for n, w in zip(names, flat, strict=True)]
                module._flat_weight_refs = [None] * len(flat)
                stack.callback(setattr, module, "_flat_weights", flat)
                stack.callback(setattr, module, "_flat_weight_refs", known)
            else:
                before = module.__dict__.get(attribute)
                module.__dict__[attribute] = value
                stack.callback(_restore, module, attribute, before)
        yield


def _restore(module: nn.Module, attribute: str, before: Tensor | None) -> None:
    if before is None:
        module.__dict__.pop(attribute, None)
    else:
        module.__dict__[attribute] = before
