"""Task arithmetic: the base plus the scaled sum of the task vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    moved,
    over_weights,
    per_expert,
    scale_field,
    summed_factors,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.fold import Seen, State, SumFold

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.maths.lowrank import Factors


class TaskArithmetic(Method, SumFold):
    """θ = θ0 + λ Σt wt τt, element by element.

    The paper chooses λ on validation data. The default 0.3 is what later work compares with on eight tasks
    (AdaMerging); without validation data TIES-Merging takes 0.4 for it. λ = 1/n is the average of n experts. With
    `normalize` the sum is divided by Σt wt, unless that is below 1e-8. mergekit's semantics are this very formula.

    Source: Ilharco et al. 2023, "Editing models with task arithmetic", arXiv 2212.04089, section 2.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> deltas, base = torch.tensor([[0.5], [0.4], [-0.6]]), torch.tensor([1.0])
        >>> TaskArithmetic(scale=0.4).apply(Tile(deltas, base, Place("w", (1,))), Known())
        tensor([1.1200])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Ilharco et al. 2023, arXiv 2212.04089"
    group = "sums of changes"
    cost = "one read"
    strong = "public LLMs: reliable gains"
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cat": {"scale": 1.0}, "svd": {"scale": 1.0}}
    linear = core_space = scales_last = True
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "task_arithmetic": Dialect(
            {"weight": Number("weights")}, {"normalize": Switch("normalize"), "lambda": Number("scale", 1.0)}
        )
    }

    weights: PerExpert = weights_field()
    scale: float = scale_field(0.3)
    normalize: bool = Field(default=False, description="divide by the sum of the weights")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def coefficients(self, experts: int) -> tuple[float, ...]:
        by = self.by(experts)
        return tuple(w * by for w in per_expert(self.weights, experts))

    def merge_factors(self, parts: Sequence[Factors], at: Place, known: Known) -> Factors:
        return summed_factors(self.coefficients(len(parts)), parts)

    def by(self, experts: int) -> float:
        """What the weighted sum is multiplied with."""
        return over_weights(self.scale, per_expert(self.weights, experts), self.normalize)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, weighted_sum(self.weights, tile.x, tile.work), self.by(len(tile.x)))

    def rule(self, at: Place, known: Known) -> Rule:
        count = len(at.experts)
        return Rule(per_expert(self.weights, count), deltas=True, scale=self.by(count))

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        return state["sum"] * self.scale
