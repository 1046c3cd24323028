"""Model Breadcrumbs: the sum of what is neither large nor small in each task vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from twinmerge.maths.ranks import Ranks, band, kept_by_rank
from twinmerge.maths.rule import Ranked, Rule
from twinmerge.methods.kit.base import Grain, Known, Pass, PerExpert, Place, Tile, decided, per_expert, scale_field
from twinmerge.methods.kit.dialect import SHARE, Dialect, Number, Switch
from twinmerge.methods.kit.sparse import L1Norms, Norm, SparseSum, TrimsDeltas, l1_factors, norm_field

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.maths.select import Counts

OWN = {"weight": Number("weights"), "density": SHARE, "gamma": Number("gamma", 0.01, most=1.0)}
"""The parameters of mergekit that each model may have."""
RESCALE = Switch("rescale", "l1", "none")


class Band(TrimsDeltas):
    """What Breadcrumbs leaves of each task vector: a band of magnitudes.

    The ⌊gamma · n⌋ largest entries are left out, and of the rest the ⌊density · n⌋ largest are kept (all of it, if there
    are no more); n counts each tensor (scope "tensor", the paper) or each row of its last axis ("row", the authors'
    code; a vector is one row). Equal magnitudes are taken in the order of their index.
    """

    density: PerExpert = Field(default=0.15, description="share of the entries kept, 0 to 1")
    gamma: PerExpert = Field(default=0.006, description="share of the entries left out above them, 0 to 1")
    scope: Literal["tensor", "row"] = Field(
        default="tensor", description="what the shares count: a tensor, or its rows"
    )
    rescale: Norm = norm_field()

    @model_validator(mode="before")
    @classmethod
    def _decide_scope(cls, values: Any) -> Any:
        return decided(values, {"mergekit": {"scope": "tensor"}})

    @field_validator("gamma")
    @classmethod
    def _within(cls, value: PerExpert) -> PerExpert:
        if not all(0 <= number <= 1 for number in per_expert(value, 1)):
            raise PydanticCustomError("gamma", "gamma is a share from 0 to 1, such as 0.01")
        return value

    def counts(self, size: int, density: float, gamma: float) -> tuple[int, int]:
        """How many of the largest of `size` entries are left out, and how many are then kept."""
        from twinmerge.maths.select import keep_count

        if self.semantics != "mergekit":
            cut = keep_count(gamma, size)
            return cut, min(keep_count(density, size), size - cut)
        if density >= 1:
            return 0, size
        keep = int(density * size)
        return min(int(gamma * size), size - keep), keep

    @property
    def all_kept(self) -> bool:
        """Whether nothing is left out of any task vector."""
        count = max((len(each) for each in (self.density, self.gamma) if isinstance(each, tuple)), default=1)
        return all(
            density >= 1 and gamma * (self.semantics != "mergekit") == 0 for density, gamma in self._shares(count)
        )

    def grain_of(self, at: Place) -> Grain:
        if self.scope == "tensor" or self.all_kept:
            return "element"
        return "rows" if len(at.shape) > 1 else "matrix"

    def band_passes(self) -> list[Pass[Any]]:
        """Those that find the band."""
        if self.all_kept:
            return []
        norm = [L1Norms(self)] if self.rescale == "l1" else []
        if self.scope == "row":
            return [*norm]
        from twinmerge.methods.kit.trim import trim_passes

        return [*trim_passes(self, "tensor"), *norm]

    def keep_counts(self, totals: Counts) -> Counts:
        """Of each expert: how many are left out at the top, and how many come before the small ones."""
        found = [self.counts(size, *own) for size, own in zip(totals.tolist(), self._shares(len(totals)), strict=True)]
        return np.array([[cut, cut + keep] for cut, keep in found], np.int64)

    def left(self, tile: Tile, known: Known) -> Tensor:
        if self.all_kept:
            return tile.x
        import torch

        if self.scope == "row":
            rows = tile.x if tile.x.dim() > 1 else tile.x[:, None]
            bands = zip(rows, self.bands(tile.at, len(rows)), strict=True)
            return torch.stack([kept_by_rank(row, ranks, None) for row, ranks in bands]).reshape(tile.x.shape)
        from twinmerge.methods.kit.trim import trimmed

        cut = trimmed(tile.x, tile, known, threshold=0)
        return trimmed(tile.x, tile, known, threshold=1).masked_fill_(cut != 0, 0.0)

    def staged(self, rule: Rule, at: Place, known: Known) -> Rule:
        if self.all_kept:
            return rule
        if self.scope == "row":
            return rule._replace(ranked=Ranked(self.bands(at, len(at.experts))))
        from twinmerge.methods.kit.trim import trim_rule

        cut, trim = (trim_rule(at, known, threshold=number) for number in (0, 1))
        return rule._replace(trim=trim, cut=cut)

    def bands(self, at: Place, experts: int) -> tuple[Ranks, ...]:
        """What is left of each expert's rows."""
        length = at.shape[-1] if at.shape else 1
        return tuple(band(length, *self.counts(length, *own)) for own in self._shares(experts))

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return l1_factors(known) if self.rescale == "l1" and not self.all_kept else (1.0,) * count

    def _shares(self, experts: int) -> list[tuple[float, float]]:
        """density and gamma of each expert."""
        return list(zip(per_expert(self.density, experts), per_expert(self.gamma, experts), strict=True))


class Breadcrumbs(Band, SparseSum):
    """θ = θ0 + λ Σt wt bt, bt the band of magnitudes of τt that is left.

    The ⌊gamma · n⌋ largest entries of each tensor are left out, and of the rest the ⌊density · n⌋ largest are kept (all
    of it, if there are no more). Equal magnitudes are taken in the order of their index. Nothing is rescaled, unless
    `rescale` "l1" restores the L1 norm of each tensor and expert. scope="row" counts each row of the last axis, as
    the authors' code does (a vector is one row). The paper chooses the three numbers on validation data; the defaults
    are where the search of the authors' code starts. With `normalize` the sum is divided by Σt wt, unless that is
    below 1e-8.

    compat="mergekit" counts in floating point, keeps all where the density is 1, and leaves fewer of the largest
    entries out where the two shares add up to more than 1.

    Source: Davari & Belilovsky 2024, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV,
    arXiv 2312.06795, section 3.

    Example:
        >>> import torch
        >>> method = Breadcrumbs(density=0.4, gamma=0.2, scope="row", scale=1.0)
        >>> tile = Tile(torch.tensor([[[1.0, -5, 3, 2, 4]]]), torch.zeros(1, 5), Place("w", (1, 5), 0, ("a",)))
        >>> method.apply(tile, Known()).tolist()
        [[0.0, 0.0, 3.0, 0.0, 4.0]]
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Davari & Belilovsky 2024, ECCV, arXiv 2312.06795"
    group = "trim, drop, elect"
    cost = "two reads"
    strong = "many tasks: it cuts outliers too"
    scales_last = True
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "breadcrumbs": Dialect(
            OWN, {"normalize": Switch("normalize"), "rescale": RESCALE, "lambda": Number("scale", 1.0)}
        )
    }

    scale: float = scale_field(0.2)
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass[Any]]:
        return self.band_passes()
