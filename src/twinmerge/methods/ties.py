"""TIES-Merging: trim, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Pass, PerExpert, Place, Scope, Tile, per_expert
from twinmerge.methods.kit.dialect import SHARE, Dialect, Number, Switch
from twinmerge.methods.kit.election import MEAN_OR_SUM, Elects
from twinmerge.methods.kit.election import Majority as Majority
from twinmerge.methods.kit.election import Tie as Tie
from twinmerge.methods.kit.sparse import L1Norms, Norm, TrimsDeltas, l1_factors, norm_field

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.maths.select import Counts


class Ties(TrimsDeltas, Elects):
    """θ = θ0 + λ · disjoint_mean(trim(τ1), …, trim(τn)).

    1. Trim: of each task vector keep exactly k = ⌊density · d⌋ entries of largest |τ|; d counts the whole model
       (scope "model", the paper) or each tensor (scope "tensor"). Equal magnitudes are kept in the order of tensor
       name and index, so a density is a count also for bfloat16 checkpoints. `rescale` "l1" then multiplies what is
       left of each tensor so that its L1 norm is the old one.
    2. Elect: the sign of Σt τ̂t, entry by entry. Where the votes cancel: "zero" (no change), "majority" (the sign of
       most entries of the model) or "positive".
    3. Disjoint merge: the mean ("sum", "max") of the entries that have the elected sign; zeros never count.
       `weights` act here, after the election.

    compat="official" follows the authors' code. The trim keeps one entry more than k, and every entry equal to the
    threshold. Where votes cancel, the majority decides; where there is no majority, the negative entries are taken.

    compat="mergekit" follows mergekit. Each tensor is trimmed on its own to k = max(1, ⌊density · d⌋) entries, with
    density · d in floating point. `weights` act before the election. Votes are summed in float32, in the order of the
    models, and where they cancel the positive entries are taken. Where the weights of the entries that agree cancel
    (some are negative), their sum is not divided.

    Source: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708, algorithm 1.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> deltas, base = torch.tensor([[0.5], [0.4], [-0.6]]), torch.zeros(1)
        >>> Ties(density=1.0, scope="tensor").apply(Tile(deltas, base, Place("w", (1,))), Known())
        tensor([0.4500])
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Yadav et al. 2023, arXiv 2306.01708"
    group = "trim, drop, elect"
    cost = "two reads"
    strong = "conflicting signs; tune scale"
    peft: ClassVar[Mapping[str, Mapping[str, Any]]] = {"ties_svd": {"scope": "tensor"}}
    scales_last = True
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"normalize": MEAN_OR_SUM}
    decided: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "mergekit": {"scope": "tensor", **Elects.decided["mergekit"]},
        "official": Elects.decided["official"],
    }
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "ties": Dialect(
            {"weight": Number("weights"), "density": SHARE},
            {
                "normalize": replace(MEAN_OR_SUM, default=True),
                "rescale": Switch("rescale", "l1", "none"),
                "lambda": Number("scale", 1.0),
            },
        )
    }

    density: PerExpert = Field(default=0.2, description="share of the entries kept by the trim, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    rescale: Norm = norm_field()

    def passes(self) -> Sequence[Pass[Any]]:
        return [*self.trim_passes(), *self.norm_passes(), *super().passes()]

    def trim_passes(self) -> list[Pass[Any]]:
        """Those that find the thresholds."""
        if not self.trims:
            return []
        from twinmerge.methods.kit.trim import trim_passes

        return trim_passes(self, self.scope)

    def norm_passes(self) -> list[Pass[Any]]:
        """Those that find what restores the norm."""
        return [L1Norms(self)] if self.rescale == "l1" and self.trims else []

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return l1_factors(known) if self.norm_passes() else (1.0,) * count

    @property
    def share_kept(self) -> PerExpert:
        """The density of the trim."""
        return self.density

    @property
    def trims(self) -> bool:
        return any(share < 1 for share in per_expert(self.share_kept, 1))

    def keep_counts(self, totals: Counts) -> Counts:
        """k for each expert out of its number of entries."""
        from twinmerge.maths import select

        shares = list(zip(per_expert(self.share_kept, len(totals)), totals.tolist(), strict=True))
        if self.compat == "mergekit":  # floating point: int(0.29 * 100) is 28
            counts = [min(size, max(1, int(share * size))) if share > 0 else 0 for share, size in shares]
        elif self.compat == "official":  # k = int(d · share); its (d − k)-th smallest value is the (k + 1)-th largest
            counts = [min(int(size * share) + 1, size) for share, size in shares]
        else:
            counts = [select.keep_count(share, size) for share, size in shares]
        return np.array(counts, np.int64)

    def left(self, tile: Tile, known: Known) -> Tensor:
        """The stack with all but the kept entries at zero."""
        x = self.trimmed_quantity(tile, known)
        if not self.trims:
            return x
        from twinmerge.methods.kit.trim import trimmed

        return trimmed(x, tile, known, keep_all_equal=self.compat == "official")

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule | None:
        if not self.trims:
            return rule
        from twinmerge.methods.kit.trim import trim_rule

        return rule._replace(trim=trim_rule(at, known, keep_all_equal=self.compat == "official"))
