"""Localize-and-Stitch without data: each expert's largest changes, averaged where several experts have one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.maths.select import Counts, keep_count
from twinmerge.methods.kit.base import (
    Known,
    Pass,
    PerExpert,
    Place,
    Scope,
    Tile,
    moved,
    per_expert,
    scale_field,
    weighted_sum,
)
from twinmerge.methods.kit.sparse import TrimsDeltas
from twinmerge.methods.kit.trim import trim_passes, trim_rule, trimmed

if TYPE_CHECKING:
    from torch import Tensor


class LocalizeAndStitch(TrimsDeltas):
    """θ = θ0 + λ Σt mt τt / Σt mt, element by element, mt being expert t's mask.

    Localize: mt marks the k = ⌊density · d⌋ largest |τt|, of equal ones the first in the order of tensor name and
    index; d counts the whole model (scope "model") or each tensor ("tensor"). Stitch: where masks overlap, their task
    vectors are averaged; what one expert alone has is taken whole. An entry that the expert left as it was is in no
    mask, also where it changed fewer than k. This is the paper's variant that sees no data; the masks that it trains
    are not here.

    Cost: one pass for the thresholds, one to merge, both compiled. Strong where each expert needs little of what it
    changed: language models of 2 to 9 billion weights (MergeBench), and experts that are to be taken out again.
    The density of 5 % is that of the authors' script for language models; the one for vision has 10 %. Their code keeps
    k − 1 entries, all but those that equal the threshold.

    Source: He et al. 2025, "Localize-and-Stitch: Efficient Model Merging via Sparse Task Arithmetic", TMLR, arXiv
    2408.13656, section 4 (the dataless version).

    Example:
        >>> import torch
        >>> method, known = LocalizeAndStitch(density=0.67, scope="tensor"), Known()
        >>> deltas, at = torch.tensor([[4.0, 6.0, 2.0], [1.0, 2.0, 3.0]]), Place("w", (3,), 0, ("a", "b"))
        >>> tile = Tile(deltas, torch.zeros(3), at)
        >>> for step in method.passes()[2:4]:
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known).tolist()
        [4.0, 4.0, 3.0]
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "He et al. 2025, TMLR, arXiv 2408.13656"
    group = "trim, drop, elect"
    cost = "two reads"
    strong = "LLMs of 2 to 9 B (MergeBench)"
    scales_last = True

    density: PerExpert = Field(default=0.05, description="share of the entries in a mask, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    scale: float = scale_field(1.0)

    @property
    def trims(self) -> bool:
        return any(share < 1 for share in per_expert(self.density, 1))

    def passes(self) -> list[Pass[Any]]:
        return trim_passes(self, self.scope) if self.trims else []

    def keep_counts(self, totals: Counts) -> Counts:
        shares = zip(per_expert(self.density, len(totals)), totals.tolist(), strict=True)
        return np.array([keep_count(share, size) for share, size in shares], np.int64)

    def left(self, tile: Tile, known: Known) -> Tensor:
        return trimmed(tile.x, tile, known) if self.trims else tile.x

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule:
        return rule._replace(trim=trim_rule(at, known)) if self.trims else rule

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x = self.left(tile, known)
        masks = (x != 0).sum(0).to(tile.work)
        return moved(tile, weighted_sum(1.0, x, tile.work) / masks.clamp_min(1), self.scale)

    def rule(self, at: Place, known: Known) -> Rule:
        rule = Rule((1.0,) * len(at.experts), deltas=True, scale=self.scale, combine="overlap")
        return self.staged(rule, at, known)
