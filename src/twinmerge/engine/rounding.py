"""From float32 tiles to the output's dtype: rounded once, checked, and what rounding erased counted."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.maths.keyed_random import draws24
from twinmerge.maths.rounding import stochastic
from twinmerge.methods.base import Method, Tile

HALVES = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}  # the bits of infinity


class Rounding(NamedTuple):
    """dtype: of the output; seed: of stochastic rounding, None for rounding to nearest."""

    dtype: torch.dtype
    seed: int | None = None

    def of(self, merged: Tensor, tile: Tile, method: Method) -> Tensor:
        """The merged tile, flat, as it is written.

        Errors:
            TwinmergeError: NaN or infinity, out of the method or because the value does not fit the dtype.
        """
        flat = merged.reshape(-1).cpu()
        if self.seed is None:
            out = flat.to(self.dtype)
        else:
            draws = draws24(self.seed, "", tile.at.name, tile.at.offset, flat.numel())
            out = stochastic(flat, self.dtype, draws)
        if not _finite(out):
            _refuse(flat, out.dtype, tile.at.name, method)
        return out


def erased(merged: Tensor, out: Tensor, tile: Tile, rounding: Rounding) -> tuple[int, int]:
    """How many entries the method changed, and how many of them rounding put back to the base's value."""
    if tile.base is None:
        return 0, 0
    base = tile.base.reshape(-1).cpu()
    changed = _differing(merged.reshape(-1).cpu(), base)
    return changed, max(0, changed - _differing(out, base.to(rounding.dtype)))


def _differing(a: Tensor, b: Tensor) -> int:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return int(np.count_nonzero(a.view(kind).numpy() != b.view(kind).numpy()))


def _finite(out: Tensor) -> bool:
    if not out.numel():
        return True
    if (infinity := HALVES.get(out.dtype)) is not None:
        return bool((out.view(torch.int16) & 0x7FFF).amax() < infinity)
    return math.isfinite(out.sum().item()) or bool(out.isfinite().all())


def _refuse(merged: Tensor, dtype: torch.dtype, name: str, method: Method) -> None:
    if not bool(merged.isfinite().all()):
        raise TwinmergeError(
            f"{type(method).__name__} gives NaN or infinity in tensor {name!r}. Lower its scale, or leave that tensor out as a head."
        )
    raise TwinmergeError(
        f"Tensor {name!r} does not fit {dtype}: its largest value is {merged.abs().max().item():.4g}. Choose a wider "
        "--dtype, such as bfloat16 or float32."
    )
