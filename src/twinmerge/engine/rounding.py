"""From tiles to the output's dtype: rounded once, checked, and what rounding erased counted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from twinmerge.errors import ModelError
from twinmerge.methods.kit.base import Method, Tile
from twinmerge.store.header import SIZES, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HALVES = {"BF16": 0x7F80, "F16": 0x7C00}  # the bits of infinity


class Rounding(NamedTuple):
    """code: of the output's dtype, as safetensors has it; seed: of stochastic rounding, None for rounding to
    nearest."""

    code: str
    seed: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.code)

    @property
    def itemsize(self) -> int:
        return SIZES[self.code]

    def of(self, merged: Tensor, tile: Tile, method: Method) -> Tensor:
        """The merged tile, flat, as it is written.

        Raises:
            TwinmergeError: NaN or infinity, out of the method or because the value does not fit the dtype.
        """
        flat = merged.reshape(-1).cpu()
        if self.seed is None:
            out = flat.to(self.dtype)
        else:
            from twinmerge.maths.keyed_random import draws24
            from twinmerge.maths.rounding import stochastic

            draws = draws24(self.seed, "", tile.at.name, tile.at.offset, flat.numel())
            out = stochastic(flat, self.dtype, draws)
        if not self._finite(out):
            _refuse(flat, out.dtype, tile.at.name, method)
        return out

    def _finite(self, out: Tensor) -> bool:
        if not out.numel():
            return True
        if (infinity := HALVES.get(self.code)) is not None:
            return bool((_bits(out) & 0x7FFF).amax() < infinity)
        return math.isfinite(out.sum().item()) or bool(out.isfinite().all())


def narrowed(tensor: Tensor, code: str, name: str) -> Tensor:
    """A tensor that is copied, in the output's dtype.

    Raises:
        ModelError: a finite number that does not fit it.
    """
    out = tensor.to(torch_dtype(code))
    if bool((out.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise ModelError(_too_large(name, out.dtype, largest))
    return out


def erased(merged: Tensor, out: Tensor, tile: Tile, rounding: Rounding) -> tuple[int, int]:
    """How many entries the method changed, and how many of them rounding put back to the base's value."""
    if tile.base is None:
        return 0, 0
    base = tile.base.reshape(-1).cpu()
    changed = _differing(merged.reshape(-1).cpu(), base)
    return changed, max(0, changed - _differing(out, base.to(rounding.dtype)))


def _differing(a: Tensor, b: Tensor) -> int:
    return int(np.count_nonzero(_bits(a).numpy() != _bits(b).numpy()))


def _bits(x: Tensor) -> Tensor:
    import torch

    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _refuse(merged: Tensor, dtype: torch.dtype, name: str, method: Method) -> None:
    if not bool(merged.isfinite().all()):
        raise ModelError(
            f"{type(method).__name__} gives NaN or infinity in tensor {name!r}. Lower its scale, or leave that tensor "
            "out as a head."
        )
    raise ModelError(_too_large(name, dtype, merged.abs().max().item()))


def _too_large(name: str, dtype: torch.dtype, largest: float) -> str:
    wider = "bfloat16 or float32" if dtype.itemsize == 2 else "float64"
    return (
        f"Tensor {name!r} does not fit {dtype}: its largest value is {largest:.4g}. Choose a wider --dtype, such as "
        f"{wider}."
    )
