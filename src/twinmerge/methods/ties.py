"""TIES-Merging: trim, elect a sign, average what agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from twinmerge.maths.fused import Elect, Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Place,
    Scope,
    Tile,
    moved,
    per_expert,
    rounded_sum,
    scale_field,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Dialect, Number, Switch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tie = Literal["zero", "majority", "positive"]
Compat = Literal["paper", "official", "mergekit"]
DECIDED = {"mergekit": {"scope": "tensor", "tie": "positive"}, "official": {"tie": "majority"}}
"""What somebody's semantics leave no choice in."""
MEAN_OR_SUM = Switch("merge", "mean", "sum")


class Majority(Pass[int]):
    """The sign that most of the trimmed mass of the whole model has; used where an entry's votes cancel."""

    name = "ties_majority"
    scope = "model"

    def __init__(self, method: Ties) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"votes": self.method.votes(self.method.trim(tile, known), tile).long().sum()}

    def finish(self, total: Partial, known: Known) -> int:
        return int(total["votes"].sign())


class Ties(Method):
    """θ = θ0 + λ · disjoint_mean(trim(τ1), …, trim(τn)).

    1. Trim: of each task vector keep exactly k = ⌊density · d⌋ entries of largest |τ|; d counts the whole model
       (scope "model", the paper) or each tensor (scope "tensor"). Equal magnitudes are kept in the order of tensor
       name and index, so a density is a count also for bfloat16 checkpoints.
    2. Elect: the sign of Σt τ̂t, entry by entry. Where the votes cancel: "zero" (no change), "majority" (the sign of
       most entries of the model) or "positive".
    3. Disjoint merge: the mean ("sum", "max") of the entries that have the elected sign; zeros never count.
       `weights` act here, after the election.

    compat="official" keeps what the authors' code keeps (one entry more than k and every entry equal to the
    threshold; cancelled votes go to the majority, and to the negative entries where there is none); compat="mergekit"
    trims per tensor to k = max(1, ⌊density · d⌋) in floating point, weighs before the election, which it sums in float32
    in the order of the models, and sends ties to +1; `weights` of both signs that cancel among those that agree leave the sum undivided.

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
    scales_last = True
    spellings: ClassVar[Mapping[str, Number | Switch]] = {"normalize": MEAN_OR_SUM}
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "ties": Dialect(
            {"weight": Number("weights"), "density": Number("density", 1.0)},
            {
                "normalize": replace(MEAN_OR_SUM, default=True),
                "rescale": Switch(
                    None,
                    refused="ties with rescale: true is not read yet. Leave it out, or raise lambda, which is the nearest.",
                ),
                "lambda": Number("scale", 1.0),
            },
        )
    }

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)
    density: PerExpert = Field(default=0.2, description="share of the entries kept by the trim, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    merge: Literal["mean", "sum", "max"] = Field(default="mean", description="how agreeing entries combine")
    tie: Tie = Field(default="zero", description="the elected sign where the votes cancel")
    compat: Compat = Field(default="paper", description="whose semantics")

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, values: Any) -> Any:
        """Fields that the semantics decide have that value, and no other is taken and then ignored."""
        if not isinstance(values, dict) or not isinstance(values.get("compat"), str):
            return values
        decided = DECIDED.get(values["compat"], {})
        for field, own in decided.items():
            if values.get(field, own) != own:
                raise ValueError(
                    f"compat={values['compat']} goes with {field}={own}, got {field}={values[field]!r:.80}. Leave one "
                    "of them out."
                )
        return {**values, **decided}

    def passes(self) -> Sequence[Pass[Any]]:
        passes: list[Pass[Any]] = []
        if self.trims:
            from twinmerge.methods.kit.trim import (
                trim_passes,  # with torch, which is not needed where nothing is trimmed
            )

            passes += trim_passes(self, self.scope)
        if self.tie == "majority":
            passes.append(Majority(self))
        return passes

    @property
    def share_kept(self) -> PerExpert:
        """The density of the trim."""
        return self.density

    @property
    def trims(self) -> bool:
        return any(share < 1 for share in per_expert(self.share_kept, 1))

    def keep_counts(self, totals: Tensor) -> Tensor:
        """k for each expert out of its number of entries."""
        import torch

        from twinmerge.maths import select

        shares = list(zip(per_expert(self.share_kept, len(totals)), totals.tolist(), strict=True))
        if self.compat == "mergekit":  # floating point: int(0.29 * 100) is 28
            counts = [min(size, max(1, int(share * size))) if share > 0 else 0 for share, size in shares]
        elif self.compat == "official":  # k = int(d · share); its (d − k)-th smallest value is the (k + 1)-th largest
            counts = [min(int(size * share) + 1, size) for share, size in shares]
        else:
            counts = [select.keep_count(share, size) for share, size in shares]
        return torch.tensor(counts, device=totals.device)

    @property
    def trims_stored(self) -> bool:
        """Whether what is trimmed is θt − θ0 itself."""
        return type(self).trimmed_quantity is Ties.trimmed_quantity

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """What is trimmed and elected, (experts, *tile)."""
        return tile.x

    def trim(self, tile: Tile, known: Known) -> Tensor:
        """The stack with all but the kept entries at zero."""
        x = self.trimmed_quantity(tile, known)
        if not self.trims:
            return x
        from twinmerge.methods.kit.trim import trimmed

        return trimmed(x, tile, known, keep_all_equal=self.compat == "official")

    @property
    def vote_weights(self) -> PerExpert:
        return self.weights if self.compat == "mergekit" else 1.0

    def tie_sign(self, known: Known) -> int:
        """The sign of an entry whose votes cancel."""
        if self.tie == "majority":
            negative = (
                self.compat == "official" and self.merge != "max"
            )  # whose maximum is multiplied with the sign itself
            return known.of(Majority) or -int(negative)
        return int(self.tie == "positive")

    def flips(self, weight: float) -> bool:
        """mergekit's votes are those of w · τ, so an expert of negative weight agrees from the other side."""
        return self.compat == "mergekit" and weight < 0

    def votes(self, x: Tensor, tile: Tile) -> Tensor:
        """The sign of the sum over the experts, 0 where they cancel."""
        if self.compat == "mergekit":
            return rounded_sum(self.vote_weights, x).sign_()
        return weighted_sum(self.vote_weights, x, tile.work).sign_().to(x.dtype)

    def elect(self, x: Tensor, tile: Tile, known: Known) -> Tensor:
        """The sign that every entry goes to."""
        sign = self.votes(x, tile)
        return sign.masked_fill_(sign == 0, self.tie_sign(known))

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x = self.trim(tile, known)
        sign = self.elect(x, tile, known)
        total, mass = self.agreeing(x, sign, tile.work)
        if self.merge == "mean":
            weights = per_expert(self.weights, len(x))
            if min(weights) > 0:  # no entry agrees: 0 / its bound is the 0 that is wanted
                total /= mass.clamp_min_(min(weights))
            else:
                some = mass != 0
                mean = total / mass.where(some, 1.0)
                total = mean if self.compat == "mergekit" else mean.where(some, 0.0)
        return moved(tile, total.mul_(sign), self.scale)

    def agreeing(self, x: Tensor, sign: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
        """Over the entries of the elected sign, zeros never among them: Σ wt |xt| ("max": the largest wt |xt|), and Σ
        wt."""
        total, mass = sign.new_zeros(sign.shape, dtype=work), sign.new_zeros(sign.shape, dtype=work)
        for weight, row in zip(per_expert(self.weights, len(x)), x, strict=True):
            side = -1.0 if self.flips(weight) else 1.0
            size = (row * sign).mul_(side).relu_() if side < 0 else (row * sign).relu_()
            if self.merge == "max":
                total = total.maximum(size.to(work) * abs(weight))
            else:
                total.add_(size.to(work), alpha=weight * side)
            if self.merge == "mean":
                mass.add_(size.sign_(), alpha=weight)
        return total, mass

    def rule(self, at: Place, known: Known) -> Rule | None:
        count = len(at.experts)
        weights = per_expert(self.weights, count)
        if self.compat == "mergekit" and self.merge == "mean" and min(weights) < 0 < max(weights):
            return None  # the compiled mean knows no sum that stays undivided
        votes, flips = per_expert(self.vote_weights, count), tuple(self.flips(weight) for weight in weights)
        trim = None
        if self.trims:
            from twinmerge.methods.kit.trim import trim_rule

            trim = trim_rule(at, known, keep_all_equal=self.compat == "official")
        elect = Elect(self.merge, votes, self.tie_sign(known), flips, rounds=self.compat == "mergekit")
        return Rule(weights, deltas=True, scale=self.scale, trim=trim, elect=elect)
