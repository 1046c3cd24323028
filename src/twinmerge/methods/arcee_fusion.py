"""Arcee Fusion: of a model's changes only those that stand out, by their size and by what becomes of their row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field

from twinmerge.maths.sums import folded_sum
from twinmerge.methods.kit.base import Grain, Known, Method, Partial, Pass, Place, Tile
from twinmerge.methods.kit.dialect import Dialect, base_and_one
from twinmerge.methods.kit.inner_products import whole_rows

if TYPE_CHECKING:
    from torch import Tensor

EPS = 1e-8  # added to every probability
QUARTERS = (0.25, 0.5, 0.75)
BINS = 65_536


class Coarse(NamedTuple):
    """divergence: of every row, (rows,) float32; bins: the high 16 bits of each quarter's order; rest: how many
    entries of that bin come before it."""

    divergence: Tensor
    bins: tuple[int, ...]
    rest: tuple[int, ...]


class Divergences(Pass[Coarse]):
    """The divergence of every row, and between which numbers the quarters of all importances lie."""

    name = "divergences"
    scope = "tensor"

    def __init__(self, compat: str) -> None:
        self.compat = compat

    def observe(self, tile: Tile, known: Known) -> Partial:
        import torch

        divergence = divergences(tile.x, torch.float32 if self.compat == "mergekit" else torch.float64)
        high = order(importances(tile.x, divergence)) >> 16
        return {"counts": torch.bincount(high, minlength=BINS), f"{tile.at.offset:020d}": divergence.flatten()}

    def finish(self, total: Partial, known: Known) -> Coarse:
        import torch

        counts = total["counts"]
        last = max(int(counts.sum()) - 1, 0)
        found = [at_rank(counts, int(quarter * last)) for quarter in QUARTERS]
        rows = torch.cat([total[key] for key in sorted(total) if key != "counts"])
        return Coarse(rows, tuple(bin_ for bin_, _ in found), tuple(rest for _, rest in found))


class Threshold(Pass[float]):
    """The least importance that an entry is taken with: q50 + 1.5 (q75 − q25), in float32."""

    name = "fusion_threshold"
    scope = "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        import torch

        keys = order(importances(tile.x, rows_of_tile(tile, known)))
        bins = known.of(Divergences).bins
        low = [keys[keys >> 16 == each] & 0xFFFF for each in bins]
        return {"counts": torch.stack([torch.bincount(each, minlength=BINS) for each in low])}

    def finish(self, total: Partial, known: Known) -> float:
        coarse = known.of(Divergences)
        each = zip(coarse.bins, total["counts"], coarse.rest, strict=True)
        q25, q50, q75 = (number(bin_ << 16 | at_rank(counts, rest)[0]) for bin_, counts, rest in each)
        return float(q50 + np.float32(1.5) * (q75 - q25))


def divergences(x: Tensor, work: Any) -> Tensor:
    """Σ p log(p / q) of each row, with p = softmax(θb) + 1e-8 and q = softmax(θa) + 1e-8 along the last axis.

    Args:
        x: (2, ..., row), θa and θb.
        work: the dtype that it is computed in.

    Returns:
        (...) float32.

    Example:
        >>> import torch
        >>> divergences(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), torch.float64)
        tensor(0.1109)
    """
    q, p = (each.to(work).softmax(-1).add_(EPS) for each in x)
    return folded_sum((p / q).log_().mul_(p), -1).float()


def importances(x: Tensor, divergence: Tensor) -> Tensor:
    """|θb − θa| times the divergence of the row, flat, as float32: equal numbers of that size count as equal."""
    return (x[1] - x[0]).abs_().mul_(divergence.unsqueeze(-1)).flatten().float()


def rows_of_tile(tile: Tile, known: Known) -> Tensor:
    """The divergences of a tile's rows."""
    row = tile.at.shape[-1] if tile.at.shape else 1
    shape = tile.x.shape[1:-1]
    first = tile.at.offset // max(row, 1)
    return known.of(Divergences).divergence[first : first + math.prod(shape)].reshape(shape)


def order(x: Tensor) -> Tensor:
    """Whole numbers of 32 bits, from 0 on, that sort as the numbers do.

    Example:
        >>> import torch
        >>> [number(key).item() for key in order(torch.tensor([2.0, -1.0, 0.0])).sort().values.tolist()]
        [-1.0, 0.0, 2.0]
    """
    import torch

    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + (1 << 31)


def number(key: int) -> np.float32:
    """The number of a place in that order."""
    bits = key - (1 << 31)
    return np.int32(bits if bits >= 0 else bits ^ 0x7FFFFFFF).view(np.float32)


def at_rank(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the entry of that rank, from 0 on, and how many entries of the bin come before it.

    Example:
        >>> import torch
        >>> at_rank(torch.tensor([2, 0, 3]), 3)
        (2, 1)
    """
    upto = counts.cumsum(0)
    bin_ = int((upto <= rank).sum().clamp(max=len(counts) - 1))
    return bin_, rank - int(upto[bin_] - counts[bin_])


class ArceeFusion(Method):
    """θ = θb where |θb − θa| · K ≥ q50 + 1.5 (q75 − q25), and θa elsewhere, entry by entry; bit for bit.

    K is the Kullback-Leibler divergence of the row that the entry is in: of softmax(θb) from softmax(θa), both plus
    1e-8, along the last axis. q25, q50 and q75 are quarters of the left side over the tensor: of n numbers in their order
    those at ⌊n' / 4⌋, ⌊n' / 2⌋ and ⌊3 n' / 4⌋ with n' = n − 1. The first model given is θa. Rows are read whole.

    K is computed in float64, where it is not below 0 but for rounding. compat="mergekit" computes it in float32, where
    that of nearly equal rows is mostly rounding, and rows whose K comes out negative stay; what it takes is θa + (θb −
    θa). Of more than a million entries mergekit draws the quarters from a random million; here they are exact.

    Source: no paper; the `arcee_fusion` of mergekit 0.1.5.

    Example:
        >>> import torch
        >>> tile = Tile(torch.tensor([[0.0] * 5, [0.0, 0.1, 0.2, 0.1, 9.0]]), None, Place("w", (5,)))
        >>> method, known = ArceeFusion(), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([0., 0., 0., 0., 9.])
    """

    space = "parameters"
    experts_min = experts_max = 2
    laws = frozenset({"idempotent"})
    paper = "none; mergekit 0.1.5"
    group = "picked, layer by layer or entry by entry"
    cost = "three reads"
    strong = "one expert's largest changes"
    mergekit: ClassVar[Mapping[str, Dialect]] = {"arcee_fusion": Dialect(refuse=base_and_one("arcee_fusion"))}

    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass[Any]]:
        return (Divergences(self.compat), Threshold())

    def grain_of(self, at: Place) -> Grain:
        return whole_rows(at)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        import torch

        first, second = tile.x
        importance = importances(tile.x, rows_of_tile(tile, known)).reshape(first.shape)
        taken = first + (second - first) if self.compat == "mergekit" else second
        return torch.where(importance >= known.of(Threshold), taken, first)
