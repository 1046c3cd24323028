"""MagMax: of every entry, the task vector that changed it most."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    moved,
    per_expert,
    scale_field,
    weights_field,
)
from twinmerge.methods.kit.fold import Fold, Seen, State

if TYPE_CHECKING:
    from torch import Tensor


class Magmax(Method, Fold):
    """θ = θ0 + λ · wt τt with t the expert of largest |wt τt|, element by element; of equal ones the later expert.

    Made for experts that were tuned one after the other, each from the one before; on independent experts it is weak.
    The order of the experts has a meaning only where magnitudes are equal.

    Source: Marczak et al. 2024, "MagMax: Leveraging Model Merging for Seamless Continual Learning", ECCV, arXiv
    2407.06322.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> deltas = torch.tensor([[1.0, -2.0, 0.0], [-1.0, 1.0, 0.0]])
        >>> Magmax(scale=1.0).apply(Tile(deltas, torch.zeros(3), Place("w", (3,))), Known())
        tensor([-1., -2.,  0.])
    """

    laws = frozenset({"odd", "homogeneous"})
    paper = "Marczak et al. 2024, ECCV, arXiv 2407.06322"
    group = "over time"
    cost = "one read"
    strong = "fine-tunes one after another"
    scales_last = True
    unremovable: ClassVar[str] = "what it covered of the others is gone"

    weights: PerExpert = weights_field()
    scale: float = scale_field(0.5)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        weights = per_expert(self.weights, len(tile.x))
        most = tile.x[0].to(tile.work) * weights[0]
        for weight, row in zip(weights[1:], tile.x[1:], strict=True):
            change = row.to(tile.work) * weight
            most = change.where(change.abs() >= most.abs(), most)
        return moved(tile, most, self.scale)

    def rule(self, at: Place, known: Known) -> Rule:
        return Rule(per_expert(self.weights, len(at.experts)), deltas=True, scale=self.scale, combine="furthest")

    def absorbs_whole(self, at: Place) -> bool:
        return False

    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        before = state.get("accumulated", delta)
        return {"accumulated": delta.where(delta.abs() >= before.abs(), before)}

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        return state["accumulated"] * self.scale
