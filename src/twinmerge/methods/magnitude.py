"""Magnitude pruning: the sum of the task vectors' largest entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Pass, PerExpert, Place, Scope, Tile, per_expert
from twinmerge.methods.kit.sparse import L1Norms, Norm, SparseSum, TrimsDeltas, l1_factors, norm_field

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.maths.select import Counts


class Magnitude(TrimsDeltas, SparseSum):
    """θ = θ0 + λ Σt wt trim(τt): task arithmetic on task vectors of which the largest entries are left.

    Of each task vector exactly k = ⌊density · d⌋ entries of largest |τ| are left, of equal ones the first in the order
    of tensor name and index; d counts the whole model (scope "model") or each tensor ("tensor"). `rescale` "l1" then
    multiplies what is left of each tensor and expert so that its L1 norm is the old one. With `normalize` the sum is
    divided by Σt wt, unless that is below 1e-8. This is TIES-Merging without its election, and what DARE is compared
    with.

    Source: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708, section 3 (the trim); Yu et al. 2024, arXiv 2311.03099,
    section 4.4 (magnitude-based pruning of delta parameters).

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.trim import trim_passes
        >>> method, known = Magnitude(density=0.5, scope="tensor", scale=1.0), Known()
        >>> tile = Tile(torch.tensor([[1.0, -4.0, 3.0, 2.0]]), torch.zeros(4), Place("w", (4,), 0, ("a",)))
        >>> for step in method.passes()[2:4]:
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known).tolist()
        [0.0, -4.0, 3.0, 0.0]
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Yadav et al. 2023, arXiv 2306.01708; Yu et al. 2024, arXiv 2311.03099"
    group = "trim, drop, elect"
    cost = "two reads"
    strong = "a baseline: trims and adds up"
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"scope": "tensor", "scale": 1.0} for name in ("magnitude_prune", "magnitude_prune_svd")
    }
    scales_last = True

    density: PerExpert = Field(default=0.2, description="share of the entries kept, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    rescale: Norm = norm_field()

    @property
    def trims(self) -> bool:
        return any(share < 1 for share in per_expert(self.density, 1))

    def passes(self) -> list[Pass[Any]]:
        if not self.trims:
            return []
        from twinmerge.methods.kit.trim import trim_passes

        return [*trim_passes(self, self.scope), *([L1Norms(self)] if self.rescale == "l1" else [])]

    def keep_counts(self, totals: Counts) -> Counts:
        from twinmerge.maths.select import keep_count

        shares = zip(per_expert(self.density, len(totals)), totals.tolist(), strict=True)
        return np.array([keep_count(share, size) for share, size in shares], np.int64)

    def left(self, tile: Tile, known: Known) -> Tensor:
        if not self.trims:
            return tile.x
        from twinmerge.methods.kit.trim import trimmed

        return trimmed(tile.x, tile, known)

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule:
        if not self.trims:
            return rule
        from twinmerge.methods.kit.trim import trim_rule

        return rule._replace(trim=trim_rule(at, known))

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return l1_factors(known) if self.rescale == "l1" and self.trims else (1.0,) * count
