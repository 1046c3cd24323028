"""Modules that normalise their input over the last axis: which they are, and by what numbers, found by trying."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.twin.mixing.kinds import runs

SIZES = (1.0, 1e-2, 1e-3, 1e-4)
"""Of the inputs that a norm is tried on: ε shows where it is not small beside their squares."""
ROUNDINGS = 8  # of the dtype, that two ways to compute the same may differ by


class Norm(NamedTuple):
    """x̂ · (offset + g) + b.

    layer: x̂ is of LayerNorm, mean and all, else x / √(mean(x²) + ε); eps: ε, None for that of torch's RMSNorm, which
    is the dtype's; width: of the last axis, which is normalised; single: it computes in float32 though it is given
    float64.
    """

    layer: bool
    eps: float | None
    width: int
    offset: float = 0.0
    single: bool = False

    def scaled(self, x: Tensor) -> Tensor:
        """x̂."""
        if self.layer:
            return F.layer_norm(x, [self.width], eps=self.eps or 0.0)
        if self.eps is None:
            return F.rms_norm(x, [self.width])
        wide = x.to(torch.float32 if self.single else torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def norm_of(module: nn.Module) -> Norm | None:
    """What a module normalises by, over its last axis; None where it is no such norm.

    A class of its own is tried: o is 0 or 1 and ε one of its numbers, if its own forward says so at inputs of several
    sizes.

    Example:
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight, self.tiny = nn.Parameter(torch.rand(4)), 1e-3
        ...     def forward(self, x):
        ...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.tiny) * (1 + self.weight)
        >>> class MineNorm(Mine):
        ...     pass
        >>> norm_of(MineNorm()), norm_of(nn.LayerNorm([2, 3])), norm_of(Mine())
        (Norm(layer=False, eps=0.001, width=4, offset=1.0, single=False), None, None)
    """
    if isinstance(module, nn.LayerNorm):
        one = runs(module, nn.LayerNorm) and len(module.normalized_shape) == 1
        return Norm(True, module.eps, module.normalized_shape[0]) if one else None
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or "Norm" not in type(module).__name__ or weight.is_meta:
        return None
    if getattr(module, "bias", None) is not None or weight.numel() == 0:
        return None
    inner = (False, True) if weight.dtype == torch.float64 else (False,)
    found = (
        Norm(False, eps, len(weight), o, single) for eps in _epsilons(module) for o in (0.0, 1.0) for single in inner
    )
    return next((norm for norm in found if _computes(module, norm)), None)


def _epsilons(module: nn.Module) -> Iterator[float | None]:
    """What may be added to the mean of the squares: the numbers that the module holds; the dtype's own of torch's
    RMSNorm."""
    if runs(module, nn.RMSNorm) and module.eps is None:
        yield None
    held = (value for value in vars(module).values() if type(value) is float and value >= 0)
    yield from dict.fromkeys(held)


def _computes(module: nn.Module, norm: Norm) -> bool:
    """Whether the module's own forward gives what the norm does, at inputs of several sizes, ε's among them."""
    weight: Any = module.weight
    row = torch.linspace(-1.0, 2.0, 3 * norm.width, dtype=torch.float64, device=weight.device).reshape(1, 3, -1)
    for times in (*SIZES, (norm.eps or 1.0) ** 0.5):
        x = (times * row).to(weight.dtype)
        with torch.no_grad():
            try:
                got, want = type(module).forward(module, x), norm.scaled(x) * (norm.offset + weight)
            except Exception:  # whatever it takes, it takes no x alone
                return False
        if not isinstance(got, Tensor) or got.shape != want.shape or not got.is_floating_point():
            return False
        dtype = torch.finfo(torch.float32 if norm.single else weight.dtype)
        size = norm.scaled(x).double().abs() * (norm.offset + weight.double().abs())  # 1 + g may cancel
        if not bool(((got.double() - want.double()).abs() <= ROUNDINGS * dtype.eps * (size + dtype.tiny)).all()):
            return False
    return True
