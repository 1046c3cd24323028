"""EMR-Merging: elect one vector of the largest agreeing changes, mask it, and rescale it for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.maths.sums import block_sums, total
from twinmerge.methods.kit.base import Known, Place, Tile, weighted_sum
from twinmerge.methods.kit.masks import MaskMethod

if TYPE_CHECKING:
    from torch import Tensor


class Emr(MaskMethod):
    """θt ≈ θ0 + st · mt ⊙ τ.

    1. Elect: the sign σ of Σt τt, entry by entry, −1 where the sum is 0; τ = σ · the largest |τt| of that sign.
    2. Mask: mt marks the entries of τt that have the elected sign.
    3. Rescale: st = Σ |τt| / Σ |mt ⊙ τ| over all entries of the model, so that the mean change of each expert stays.

    There is nothing to choose and no data. An expert that changes nothing has st = 0. What is merged into one model
    is θ0 + τ. compat="official" adds up the means of each tensor, as the authors' code for transformers does, so that
    every tensor weighs the same; the paper, and their code for flat vectors, add entries.

    Source: Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", arXiv 2405.17461, section 4.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> deltas = torch.tensor([[2.0, -1.0, 0.0], [-1.0, -3.0, 4.0]])
        >>> vector, masks = Emr().vector_and_masks(Tile(deltas, torch.zeros(3), Place("w", (3,))), Known())
        >>> vector.tolist(), masks.int().tolist()
        ([2.0, -3.0, 4.0], [[1, 1, 0], [0, 1, 1]])
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Huang et al. 2024, arXiv 2405.17461"
    group = "masks"
    cost = "one read"
    strong = "each expert back, untuned"

    compat: Literal["paper", "official"] = Field(
        default="paper", description="rescale by sums of entries, or as the official code by sums of tensors' means"
    )

    def one_vector(self, tile: Tile, known: Known) -> Tensor:
        up = weighted_sum(1.0, tile.x, tile.work) > 0
        highest, lowest = tile.x.amax(0).clamp_min_(0.0), tile.x.amin(0).clamp_max_(0.0)
        vector = highest.mul_(up).add_(lowest.mul_(~up))
        return vector.add_(0.0).to(tile.work)  # −0.0 + 0.0 is 0.0

    def masks(self, tile: Tile, vector: Tensor) -> Tensor:
        return (tile.x * vector.sign().to(tile.x.dtype)) > 0  # τ has the elected sign wherever an entry agrees

    def masses(self, tile: Tile, vector: Tensor, masks: Tensor) -> Tensor:
        """Sums over blocks of |τt| and of |mt ⊙ τ|, (2, experts, blocks) float64."""
        import torch

        size = vector.abs()
        rows = [block_sums(row.abs()) for row in tile.x]
        kept = [block_sums(size * mask) for mask in masks]
        return torch.stack([torch.stack(rows), torch.stack(kept)])

    def mask_rule(self, at: Place, known: Known) -> Rule:
        return Rule((1.0,) * len(at.experts), deltas=True, combine="united")

    def scales(
        self, masses: Mapping[str, Sequence[Sequence[float]]], sizes: Mapping[str, int], count: int
    ) -> list[float]:
        by = {name: max(sizes[name], 1) if self.compat == "official" else 1 for name in masses}
        found = []
        for e in range(count):
            whole, kept = (total(rows[part][e] / by[name] for name, rows in masses.items()) for part in (0, 1))
            found.append(whole / kept if kept else 0.0)
        return found
