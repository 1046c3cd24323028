"""Continual TIES: TIES of the merged change and the arriving expert, added on top; a baseline."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.select import keep_count, largest
from twinmerge.methods.kit.base import Known, Method, Place, Tile, moved, scale_field
from twinmerge.methods.kit.fold import Fold, Seen, State, folded


class ContinualTies(Method, Fold):
    """A ← λ τ1; then A ← A + λ · ties(A, τt), the sum of the entries that agree with the elected sign; θ = θ0 + A.

    The baseline of the papers on continual merging: the first expert is not trimmed, and what was merged is trimmed
    and added again with every later one, so it compounds. The baseline's code trims the whole model and sends votes
    that cancel to the majority; here, where an expert is taken in tensor by tensor, `density` keeps an exact count of
    each tensor, and such votes add nothing. Experts are taken in their order, which has a meaning.

    Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining", NeurIPS, arXiv 2501.09522 (its baseline);
    Yadav et al. 2023, arXiv 2306.01708 (TIES).

    Example:
        >>> method, at = ContinualTies(density=1.0), Place("w", (2,))
        >>> state = method.absorb({}, torch.tensor([2.0, -2.0]).double(), at)
        >>> method.absorb(state, torch.tensor([4.0, 4.0]).double(), at)["accumulated"].tolist()
        [3.5, 1.0]
    """

    grain = "matrix"
    paper = "Tang et al. 2025, arXiv 2501.09522 (baseline)"
    group = "over time"
    cost = "one read"
    strong = "a baseline: its losses compound"
    unremovable: ClassVar[str] = "later experts were trimmed together with it"

    scale: float = scale_field(0.5)
    density: float = Field(default=0.2, ge=0, le=1, description="share of each tensor's entries that is kept")

    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        if not state:
            return {"accumulated": self.scale * delta}
        before = state["accumulated"]
        stack = torch.stack([before, delta])
        kept = torch.where(largest(stack.to(at.rounded), keep_count(self.density, delta.numel())), stack, 0)
        agree = kept.sign() == kept.sum(0).sign()
        return {"accumulated": before + self.scale * (kept * agree).sum(0)}

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        return state["accumulated"]

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, folded(self, tile)["accumulated"], 1.0)
