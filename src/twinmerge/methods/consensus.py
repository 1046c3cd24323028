"""Consensus Merging: the multi-task vector without the weights that too few tasks need."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Place, Tile, moved, per_expert, scale_field
from twinmerge.methods.kit.masks import Marking, important

if TYPE_CHECKING:
    from torch import Tensor


class Consensus(Marking):
    """θ = θ0 + λ · 1{Σt mt ≥ k} ⊙ τ with mt = 1{|τt| > λt |τ − τt|}, element by element; τ as in `tall_masks`.

    k = 2 leaves out the weights that no task marks ("catastrophic") and that one task marks ("selfish"); k = 1 the
    former only, k = 0 none, and k above the number of experts gives θ0. The paper chooses λ in 0.1, 0.2, …, 1 on
    validation data, after λt; without any, λ = 0.3 is what task arithmetic, which this is at k = 0, takes.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", arXiv
    2405.07813, section 5.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> deltas = torch.tensor([[1.0, 0.25, -0.5, 0.0], [1.0, -1.0, 0.125, 0.0]])
        >>> Consensus(scale=1.0).apply(Tile(deltas, torch.zeros(4), Place("w", (4,))), Known())
        tensor([2., 0., 0., 0.])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Wang et al. 2024, arXiv 2405.07813"
    group = "masks"
    cost = "one read"
    strong = "many tasks: drops what one needs"
    scales_last = True

    scale: float = scale_field(0.3)
    k: int = Field(default=2, ge=0, description="how many tasks must mark a weight that is kept")

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if self.k > len(tile.x):
            return tile.require_base().clone()
        vector = self.one_vector(tile, known)
        if self.k:
            votes = vector.new_zeros(vector.shape)
            for row, threshold in zip(tile.x, per_expert(self.threshold, len(tile.x)), strict=True):
                votes += important(row, vector, threshold)
            vector = vector.masked_fill_(votes < self.k, 0.0)
        return moved(tile, vector, self.scale)

    def rule(self, at: Place, known: Known) -> Rule | None:
        rule = self.vector_rule(at, known)
        return None if rule is None else rule._replace(scale=self.scale, mark=self.mark(at, self.k) if self.k else None)
