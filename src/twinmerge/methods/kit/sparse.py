"""What methods share that leave something out of each task vector before they combine them: what is left, what it is
multiplied with to restore its norm, and its sum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.fused import norms, staged
from twinmerge.maths.rule import Rule, Values
from twinmerge.maths.sums import block_sums, total
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Place,
    Stored,
    Tile,
    column,
    moved,
    over_weights,
    per_expert,
    scale_field,
    weighted_sum,
    weights_field,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Norm = Literal["l1", "none"]
"""What of each tensor and expert is restored."""

LEAST_NORM = 1e-7  # of a tensor whose L1 norm is restored; smaller ones stay as they are, as in mergekit
ALL = (0, 0), 1.0  # of `norms`: no draw drops anything


class Sparse(Method):
    """A method that first leaves something out of each task vector."""

    @abstractmethod
    def left(self, tile: Tile, known: Known) -> Tensor:
        """What is left of each task vector, (experts, *tile) float32: all else is zero."""

    @abstractmethod
    def staged(self, rule: Rule, at: Place, known: Known) -> Rule | None:
        """The same as data: the rule with what is left out; None where the compiled library cannot."""

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        """What is left of each expert is multiplied with."""
        return (1.0,) * count


class TrimsDeltas(Sparse):
    """One whose trim, by `kit/trim.py`, is of the task vectors as they are, zeros among them."""

    @property
    def trims_stored(self) -> bool:
        """Whether what is trimmed is θt − θ0 itself."""
        return type(self).trimmed_quantity is TrimsDeltas.trimmed_quantity

    @property
    def counts_zeros(self) -> bool:
        return True

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """What is trimmed, (experts, *tile)."""
        return tile.x


class SparseSum(Sparse):
    """θ = θ0 + λ Σt wt ft τ′t, τ′t what is left of τt and ft its factor."""

    weights: PerExpert = weights_field()
    scale: float = scale_field(0.3)
    normalize: bool = Field(default=False, description="divide by the sum of the weights")

    def by(self, experts: int) -> float:
        """What the weighted sum is multiplied with."""
        return over_weights(self.scale, per_expert(self.weights, experts), self.normalize)

    def times_factors(self, count: int, known: Known) -> tuple[float, ...]:
        """wt ft of each expert."""
        both = zip(per_expert(self.weights, count), self.factors(count, known), strict=True)
        return tuple(weight * factor for weight, factor in both)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        count = len(tile.x)
        total = weighted_sum(self.times_factors(count, known), self.left(tile, known), tile.work)
        return moved(tile, total, self.by(count))

    def rule(self, at: Place, known: Known) -> Rule | None:
        count = len(at.experts)
        return self.staged(Rule(self.times_factors(count, known), deltas=True, scale=self.by(count)), at, known)


Sums = list[tuple[list[float], list[float]]]
"""Of every expert: Σ|τ| and Σ|what is left of τ|, block by block."""


class L1Norms(Pass[list[tuple[float, float]]]):
    """Σ|τ| and Σ|what is left of τ| of every expert over the whole tensor.

    Args:
        method: that says what is left.
    """

    name = "l1_norms"
    scope = "tensor"

    def __init__(self, method: Sparse) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        found = None if tile.stored is None else self.compiled(tile.stored, tile.at, known)
        if found is None:
            pairs = zip(tile.x, self.left(tile, known), strict=True)
            found = [(block_sums(x.abs()).tolist(), block_sums(rest.abs()).tolist()) for x, rest in pairs]
        return {f"{tile.at.offset}": found}

    def left(self, tile: Tile, known: Known) -> Tensor:
        """What is left, (experts, *tile)."""
        return self.method.left(tile, known)

    def compiled(self, stored: Stored, at: Place, known: Known) -> Sums | None:
        """The sums of a tile by the compiled library; None where it cannot, or a number is NaN or infinite."""
        rule = self.method.staged(Rule((1.0,) * len(stored.experts), deltas=True), at, known)
        if rule is None:
            return None
        left, sound = staged(rule, stored.base, stored.experts, at.offset)
        if not sound:  # then the tile says whose numbers are none
            return None
        rest = [norms(Values(row.view(np.uint8), "F32"), None, *ALL)[0] for row in left]
        return [(norms(x, stored.base, *ALL)[0], own) for x, own in zip(stored.experts, rest, strict=True)]

    def finish(self, total_: Partial, known: Known) -> list[tuple[float, float]]:
        """(Σ|τ|, Σ|what is left|) of each expert."""
        tiles = list(total_.values())
        experts = range(len(tiles[0]))
        return [(total(*(tile[e][0] for tile in tiles)), total(*(tile[e][1] for tile in tiles))) for e in experts]


def l1_factors(known: Known) -> tuple[float, ...]:
    """What restores each expert's L1 norm; 1 where there is none to restore.

    Example:
        >>> l1_factors(Known(l1_norms=[(6.0, 2.0), (0.0, 0.0)]))
        (3.0, 1.0)
    """
    return tuple(whole / rest if min(whole, rest) >= LEAST_NORM else 1.0 for whole, rest in known.of(L1Norms))


def times(x: Tensor, by: Sequence[float], work: torch.dtype) -> Tensor:
    """Each expert's row times its factor, in `work`, rounded to float32."""
    if all(factor == 1 for factor in by):
        return x
    return (x.to(work) * column(tuple(by), x.to(work))).to(x.dtype)


def norm_field() -> Any:
    return Field(default="none", description="what of each tensor is restored after that: its L1 norm, or nothing")
