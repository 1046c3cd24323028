"""TALL-masks: one multi-task vector, and for each task a mask of the weights that it needs."""

from __future__ import annotations

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Place
from twinmerge.methods.kit.masks import Marking, MaskMethod


class TallMasks(Marking, MaskMethod):
    """θt ≈ θ0 + mt ⊙ τ with mt = 1{|τt| > λt |τ − τt|}, element by element; τ = Σt τt, or TIES with its entries added.

    One vector and one bit for each weight and task give every expert back nearly as it was; the task must be named. λ
    = 1 gives the mask with the least ‖mt ⊙ τ − τt‖₁; a smaller λt keeps more. The paper chooses λt of each task out
    of 0.2, 0.3, 0.4, 0.5, 0.6 on validation data; the default is the middle. What is merged into one model is θ0 + τ.

    The paper writes ≥ and its code >, which is used: they differ where nothing is changed, and there in the counts
    only. TIES trims with the exact count of `ties`; entries whose votes cancel are 0.

    Source: Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression", arXiv
    2405.07813, section 4.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Known, Place, Tile
        >>> deltas = torch.tensor([[1.0, 0.25, -0.5, 0.0], [1.0, -1.0, 0.125, 0.0]])
        >>> vector, masks = TallMasks().vector_and_masks(Tile(deltas, torch.zeros(4), Place("w", (4,))), Known())
        >>> vector.tolist(), masks.int().tolist()
        ([2.0, -0.75, -0.375, 0.0], [[1, 0, 1, 0], [1, 1, 0, 0]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Wang et al. 2024, arXiv 2405.07813"
    group = "masks"
    cost = "one read"
    strong = "each expert back, to about 99 %"

    def mask_rule(self, at: Place, known: Known) -> Rule | None:
        rule = self.vector_rule(at, known)
        return None if rule is None else rule._replace(mark=self.mark(at))
