"""Which modules compute a plain product, and the matrices that they do it with."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


def multiplies(module: nn.Module) -> bool:
    """True for nn.Linear and Conv1D, which stores its matrix transposed, and for subclasses that compute the same by
    other means (Falcon's), which is checked on numbers once, to what the dtype rounds."""
    if runs(module, nn.Linear) or isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    if module not in _multiplies:
        if module.weight.is_meta:
            return False
        _multiplies[module] = _is_linear(module)
    return _multiplies[module]


_multiplies: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _is_linear(module: nn.Linear) -> bool:
    weight = module.weight
    x = torch.linspace(-1.0, 2.0, 4 * weight.shape[1], device=weight.device).reshape(2, 2, -1).to(weight)
    x[1] *= 100
    with torch.no_grad():
        try:
            got, expected = type(module).forward(module, x), F.linear(x, weight, module.bias)
        except Exception:  # whatever it takes, it takes no x alone
            return False
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return False
    bias = 0.0 if module.bias is None else module.bias.double().abs()
    size = x.double().abs() @ weight.double().abs().T + bias  # what a sum in any order is rounded beside
    return bool(((got.double() - expected.double()).abs() <= 8 * torch.finfo(weight.dtype).eps * size).all())


def takes_factors(module: nn.Module) -> bool:
    """True where a weight of any shape is used as factors."""
    plain = runs(module, nn.Conv2d) and getattr(module, "groups", 1) == 1
    return multiplies(module) or isinstance(module, nn.Embedding) or plain


def runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """The module computes what `kind` computes, also where it is a subclass."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def channels_last(vectors: Tensor, y: Tensor) -> Tensor:
    """(n, channels) shaped to join an activation (n, ..., channels)."""
    return vectors.to(y).reshape(len(vectors), *[1] * (y.dim() - 2), -1)


def rows_with_biases(module: Any, x: Tensor, biases: Tensor | None) -> Tensor:
    """What the rows' products of a Linear or Conv1D are added to: the bias of each row in the answer's shape, or zeros.

    Args:
        x: the module's input (rows, ..., in).
        biases: w · db (rows or 1, out).
    """
    own: Tensor | None = module.bias
    if own is None:
        return x.new_zeros(*x.shape[:-1], matrix_of(module).shape[1])
    if biases is None:
        return own.repeat(*x.shape[:-1], 1)
    rows = own + channels_last(biases, x)
    return rows.expand(*x.shape[:-1], rows.shape[-1]).contiguous()


def matrix_of(module: Any, weight: Tensor | None = None) -> Tensor:
    """The matrix (in, out) that a Linear or Conv1D multiplies its input by; that of another weight where one is
    given."""
    found: Tensor = module.weight if weight is None else weight
    return found if isinstance(module, Conv1D) else found.T
