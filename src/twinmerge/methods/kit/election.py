"""The election of TIES: a sign for each entry, and the merge of what agrees with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from twinmerge.maths.rule import Elect, Rule
from twinmerge.methods.kit.base import (
    CANCELLED,
    Known,
    Partial,
    Pass,
    PerExpert,
    Place,
    Tile,
    decided,
    moved,
    per_expert,
    rounded_sum,
    scale_field,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Switch
from twinmerge.methods.kit.sparse import Sparse, times

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tie = Literal["zero", "majority", "positive"]
Compat = Literal["paper", "official", "mergekit"]
MEAN_OR_SUM = Switch("merge", "mean", "sum")


class Majority(Pass[int]):
    """The sign that most of the mass that is left of the whole model has; used where an entry's votes cancel."""

    name = "ties_majority"
    scope = "model"

    def __init__(self, method: Elects) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"votes": self.method.votes(self.method.voters(tile, known), tile).sign_().long().sum()}

    def finish(self, total: Partial, known: Known) -> int:
        return int(total["votes"].sign())


class Elects(Sparse):
    """θ = θ0 + λ · what agrees with the elected sign, of what is left of each task vector."""

    decided: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "mergekit": {"tie": "positive"},
        "official": {"tie": "majority"},
    }
    """What somebody's semantics leave no choice in."""

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)
    merge: Literal["mean", "sum", "max"] = Field(default="mean", description="how agreeing entries combine")
    tie: Tie = Field(default="zero", description="the elected sign where the votes cancel")
    compat: Compat = Field(default="paper", description="whose semantics")

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, values: Any) -> Any:
        return decided(values, cls.decided)

    def passes(self) -> Sequence[Pass[Any]]:
        return [Majority(self)] if self.tie == "majority" else []

    @property
    def vote_weights(self) -> PerExpert:
        return self.weights if self.compat == "mergekit" else 1.0

    def tie_sign(self, known: Known) -> int:
        """The sign of an entry whose votes cancel."""
        if self.tie == "majority":
            negative = (
                self.compat == "official" and self.merge != "max"
            )  # whose maximum is multiplied with the sign itself
            return known.of(Majority) or -int(negative)
        return int(self.tie == "positive")

    def flips(self, weight: float) -> bool:
        """mergekit's votes are those of w · τ, so an expert of negative weight agrees from the other side."""
        return self.compat == "mergekit" and weight < 0

    def voters(self, tile: Tile, known: Known) -> Tensor:
        """What is elected, (experts, *tile)."""
        left = self.left(tile, known)
        return times(left, self.factors(len(left), known), tile.work)

    def votes(self, x: Tensor, tile: Tile) -> Tensor:
        """The sum over the experts whose sign is elected, 0 where they cancel."""
        if self.compat == "mergekit":
            return rounded_sum(self.vote_weights, x)
        return weighted_sum(self.vote_weights, x, tile.work)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, self.change(tile, known), self.scale)

    def change(self, tile: Tile, known: Known) -> Tensor:
        """The merged change before it is scaled, (*tile) in `tile.work`."""
        x = self.voters(tile, known)
        sign = signs(self.votes(x, tile), self.tie_sign(known)).to(x.dtype)
        weights = per_expert(self.weights, len(x))
        flips = tuple(self.flips(weight) for weight in weights)
        return agreeing(x, sign, tile.work, weights, self.merge, flips, undivided=self.compat == "mergekit")

    def rule(self, at: Place, known: Known) -> Rule | None:
        count = len(at.experts)
        weights = per_expert(self.weights, count)
        if self.compat == "mergekit" and self.merge == "mean" and min(weights) < 0 < max(weights):
            return None  # the compiled mean knows no sum that stays undivided
        votes, flips = per_expert(self.vote_weights, count), tuple(self.flips(weight) for weight in weights)
        rounds = self.compat == "mergekit"
        elect, by = Elect(self.merge, votes, self.tie_sign(known), flips, rounds), self.factors(count, known)
        factors = None if all(factor == 1 for factor in by) else by
        return self.staged(Rule(weights, deltas=True, scale=self.scale, elect=elect, factors=factors), at, known)


def signs(votes: Tensor, tie: int) -> Tensor:
    """The sign of each vote, `tie` where it is 0; of 0 · infinity, which is no number, none.

    Example:
        >>> import torch
        >>> signs(torch.tensor([-2.0, 0.0, torch.nan]), 1).tolist()
        [-1.0, 1.0, nan]
    """
    found = votes.sign()
    found.masked_fill_(votes == 0, tie)
    none = votes.isnan()
    return found.masked_fill_(none, math.nan) if bool(none.any()) else found


def agreeing(
    x: Tensor,
    sign: Tensor,
    work: torch.dtype,
    weights: Sequence[float],
    merge: Literal["mean", "sum", "max"],
    flips: Sequence[bool] = (),
    least: float = 0.0,
    undivided: bool = False,
) -> Tensor:
    """Over the entries that have the elected sign, zeros never among them: Σ wt xt ("max": the largest wt |xt|, with
    that sign), and for "mean" divided by the sum of their weights.

    Args:
        x: (experts, *tile).
        sign: (*tile), -1, 0 or 1.
        work: the dtype that sums are taken in.
        weights: of each expert.
        merge: how they combine.
        flips: the experts whose entries agree when they have the other sign; none where empty.
        least: what a mean is divided by at least; 0 for the least weight.
        undivided: a sum stays as it is where weights of both signs cancel; else it becomes 0.

    Returns:
        (*tile) in `work`.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.5], [0.4], [-0.6]])
        >>> agreeing(x, torch.ones(1), torch.float64, (1.0, 1.0, 1.0), "mean").item()
        0.45000000298023224
    """
    total, mass = sign.new_zeros(sign.shape, dtype=work), sign.new_zeros(sign.shape, dtype=work)
    for weight, row, flip in zip(weights, x, flips or (False,) * len(x), strict=True):
        size = (row * sign).mul_(-1.0).relu_() if flip else (row * sign).relu_()
        if merge == "max":
            total = total.maximum(size.to(work) * abs(weight))
        else:
            total.add_(size.to(work), alpha=-weight if flip else weight)
        if merge == "mean":
            mass.add_(size.sign_(), alpha=weight)
    if merge == "mean":
        bound = least or min(weights)
        if bound > 0:  # no entry agrees: 0 / its bound is the 0 that is wanted
            total /= mass.clamp_min_(bound)
        else:
            some = mass.abs() >= CANCELLED if min(weights) < 0 < max(weights) else mass != 0
            mean = total / mass.where(some, 1.0)
            total = mean if undivided else mean.where(some, 0.0)
    return total.mul_(sign)
