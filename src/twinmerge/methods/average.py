"""Weighted average of the parameters (isotropic merging, "model soups")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    per_expert,
    require_divisor,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.fold import Seen, State, SumFold

if TYPE_CHECKING:
    from torch import Tensor


class Average(Method, SumFold):
    """θ = Σt wt θt / Σt wt, element by element. No base is needed.

    With `normalize` false it is the sum Σt wt θt itself. The weights must add up to more than 0; compat="mergekit" (its
    `linear`) also takes those that add up to less.

    Source: Wortsman et al. 2022, "Model soups", arXiv 2203.05482 (uniform soup); the `linear` of other tools.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> x = torch.tensor([[2.0, 3.0], [4.0, 7.0]])
        >>> Average(weights=(0.25, 0.75)).apply(Tile(x, None, Place("w", (2,))), Known())
        tensor([3.5000, 6.0000])
    """

    space = "parameters"
    laws = frozenset({"idempotent", "symmetric", "odd", "homogeneous"})
    paper = "Wortsman et al. 2022, arXiv 2203.05482"
    group = "averages"
    cost = "one read"
    strong = "many runs of one task: a soup"
    linear = True
    aliases = ("linear",)
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "linear": Dialect({"weight": Number("weights")}, {"normalize": Switch("normalize", default=True)})
    }

    weights: PerExpert = weights_field()
    normalize: bool = Field(default=True, description="divide by the sum of the weights")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def check(self, experts: Sequence[str]) -> None:
        if self.normalize:
            require_divisor(per_expert(self.weights, len(experts)), negative=self.compat == "mergekit")

    def coefficients(self, experts: int) -> tuple[float, ...]:
        by = 1 / self.divisor(experts)
        return tuple(w * by for w in per_expert(self.weights, experts))

    def divisor(self, experts: int) -> float:
        """What the weighted sum is divided by."""
        return sum(per_expert(self.weights, experts)) if self.normalize else 1.0

    def apply(self, tile: Tile, known: Known) -> Tensor:
        total = self.divisor(len(tile.x))
        merged = weighted_sum(self.weights, tile.x, tile.work)
        return (merged if total == 1 else merged.div_(total)).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule:
        weights = per_expert(self.weights, len(at.experts))
        return Rule(weights, deltas=False, divisor=self.divisor(len(weights)))

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        return state["sum"] / max(seen.experts, 1)
