"""Fisher-weighted averaging around the base: of the task vectors, and not of the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from twinmerge.maths.rule import Importance, Rule
from twinmerge.methods.fisher import FisherSquares, by_name, factor_of, require_sound
from twinmerge.methods.kit.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    moved,
    per_expert,
    require_divisor,
    scale_field,
    weights_field,
)

if TYPE_CHECKING:
    from torch import Tensor


class FisherDeltas(Method):
    """θ = θ0 + λ Σt ct Ft τt / Σt ct Ft, element by element, with ct = wt / ‖Ft‖.

    The weights are those of `fisher`: Ft is the diagonal of expert t's Fisher information, ‖Ft‖ its Euclidean norm over
    all merged tensors (normalize=False leaves it out: ct = wt). Around the base nothing must stand where nobody
    measured anything: the base's own value does, so there is no floor and no target. And λ is free: a mean gives every
    change the weight of one expert among all, which for several tasks is less than the best sum has. λ = 1 without a
    floor is `fisher` wherever something was measured.

    Cost: that of `fisher`, compiled: one pass over weights and statistics, and the base. Needs Fisher information of
    every expert (`twinmerge measure fisher`). Strong for experts of different tasks, where λ is chosen on validation
    rows.

    Source: Matena & Raffel 2022, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832, equation 3, on task
    vectors as the code of arXiv 2604.01329 has it, whose least sum of Ft is 1e-8 where ours is 0; λ is Ilharco et al.
    2023, arXiv 2212.04089.

    Example:
        >>> import torch
        >>> from twinmerge.methods.fisher import Squares
        >>> tau, f = torch.tensor([[1.0, 2.0, 5.0], [3.0, 6.0, 5.0]]), torch.tensor([[1.0, 4.0, 0.0], [3.0, 1.0, 0.0]])
        >>> tile = Tile(tau, torch.zeros(3), Place("w", (3,), 0, ("a", "b")), fisher=f)
        >>> known = Known(fisher_squares=[Squares(5, 17, 3), Squares(4, 10, 3)])
        >>> FisherDeltas(normalize=False, scale=2.0).apply(tile, known)
        tensor([5.0000, 5.6000, 0.0000])
    """

    needs = ("fisher",)
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Matena & Raffel 2022, arXiv 2111.09832"
    group = "by statistics of data"
    cost = "one read"
    strong = "different tasks, λ on validation"
    scales_last = True

    weights: PerExpert = weights_field()
    normalize: bool = Field(default=True, description="divide each Fisher by its norm over the whole model")
    scale: float = scale_field(1.0)

    def passes(self) -> Sequence[FisherSquares]:
        return (FisherSquares(),)

    def check(self, experts: Sequence[str]) -> None:
        require_divisor(per_expert(self.weights, len(experts)))

    def importance(self, experts: Sequence[str], known: Known) -> Importance:
        """ct of each expert.

        Raises:
            TwinmergeError: a negative weight, or Fisher information that is 0 everywhere.
        """
        each = zip(experts, per_expert(self.weights, len(experts)), known.of(FisherSquares), strict=True)
        factors = tuple(factor_of(name, weight, size, self.normalize) for name, weight, size in each)
        return Importance(factors, (0.0,) * len(factors), by_name(experts))

    def apply(self, tile: Tile, known: Known) -> Tensor:
        import torch

        found = self.importance(tile.at.experts, known)
        total = tile.x.new_zeros(tile.x.shape[1:], dtype=torch.float64)
        mass = torch.zeros_like(total)
        for e in found.order:
            require_sound(tile.fisher[e], tile.at, tile.at.experts[e])
            share = tile.fisher[e].double().mul_(found.factors[e])
            total += share * tile.x[e].double()
            mass += share
        return moved(tile, torch.where(mass > 0, total / mass, 0.0), self.scale)

    def rule(self, at: Place, known: Known) -> Rule:
        weights = per_expert(self.weights, len(at.experts))
        return Rule(weights, deltas=True, scale=self.scale, importance=self.importance(at.experts, known))
