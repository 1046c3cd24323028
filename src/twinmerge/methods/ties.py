"""TIES-Merging: trim, elect a sign, average what agrees with it."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths import select
from twinmerge.methods.base import (
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Tile,
    column,
    moved,
    scale_field,
    weighted_sum,
    weights_field,
)

Scope = Literal["model", "tensor"]
Tie = Literal["zero", "majority", "positive"]
Compat = Literal["paper", "official", "mergekit"]


class _TiesPass(Pass):
    """A reduction over the trimmed quantity of one `Ties` method."""

    def __init__(self, method: "Ties", scope: Scope) -> None:
        self.method, self.scope = method, scope


class Coarse(_TiesPass):
    """Histogram of the high 16 bits of |τ|: the bin that holds the threshold."""

    name = "ties_coarse"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"counts": select.coarse(self.method.trimmed_quantity(tile, known))}

    def finish(self, total: Partial, known: Known) -> object:
        counts = total["counts"]
        return select.locate(counts, self.method.keep_counts(counts.sum(1)))


class Fine(_TiesPass):
    """Histogram of the low 16 bits inside that bin: the threshold, and how many entries equal to it are kept."""

    name = "ties_fine"

    def observe(self, tile: Tile, known: Known) -> Partial:
        bins, _ = known[Coarse.name]
        return {"counts": select.fine(self.method.trimmed_quantity(tile, known), bins)}

    def finish(self, total: Partial, known: Known) -> object:
        bins, rest = known[Coarse.name]
        return select.pin(bins, total["counts"], rest)


class Equal(_TiesPass):
    """Where the entries equal to the threshold lie, so that the first of them, in name order, are kept."""

    name = "ties_equal"

    def observe(self, tile: Tile, known: Known) -> Partial:
        thresholds, _ = known[Fine.name]
        return {place(tile): select.ties(self.method.trimmed_quantity(tile, known), thresholds)}

    def finish(self, total: Partial, known: Known) -> object:
        """(tensor, offset) -> how many equal entries come before that tile, for each expert."""
        seen: dict[str, Tensor] = {}
        before = torch.zeros(())
        for key in sorted(total):
            seen[key] = torch.zeros_like(total[key]) if not seen else before
            before = seen[key] + total[key]
        return seen


class Majority(_TiesPass):
    """The sign that most of the trimmed mass of the whole model has; used where an entry's votes cancel."""

    name = "ties_majority"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"votes": self.method.votes(self.method.trim(tile, known)).long().sum()}

    def finish(self, total: Partial, known: Known) -> object:
        return int(total["votes"].sign())


def place(tile: Tile) -> str:
    """A key that sorts by tensor name, then by offset."""
    return f"{tile.at.name}\0{tile.at.offset:020d}"


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
    threshold; cancelled votes go to the majority, and to the negative entries where there is none);
    compat="mergekit" trims per tensor, weighs before the election and sends ties to +1.

    Source: Yadav et al. 2023, "TIES-Merging", arXiv 2306.01708, algorithm 1.

    Example:
        >>> from twinmerge.methods.base import Place
        >>> deltas, base = torch.tensor([[0.5], [0.4], [-0.6]]), torch.zeros(1)
        >>> Ties(density=1.0, scope="tensor").apply(Tile(deltas, base, Place("w", (1,))), {})
        tensor([0.4500])
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Yadav et al. 2023, arXiv 2306.01708"

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)
    density: PerExpert = Field(default=0.2, description="share of the entries kept by the trim, 0 to 1")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    merge: Literal["mean", "sum", "max"] = Field(default="mean", description="how agreeing entries combine")
    tie: Tie = Field(default="zero", description="the elected sign where the votes cancel")
    compat: Compat = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Pass]:
        found: list[Pass] = []
        scope: Scope = "tensor" if self.compat == "mergekit" else self.scope
        if self.trims:
            found += [Coarse(self, scope), Fine(self, scope), Equal(self, scope)]
        if self.tie == "majority" or self.compat == "official":
            found.append(Majority(self, "model"))
        return found

    @property
    def share_kept(self) -> PerExpert:
        """The density of the trim."""
        return self.density

    @property
    def trims(self) -> bool:
        share = self.share_kept
        return any(number < 1 for number in (share if isinstance(share, tuple) else (share,)))

    def keep_counts(self, totals: Tensor) -> Tensor:
        """k for each expert out of its number of entries."""
        share = self.share_kept
        densities = share if isinstance(share, tuple) else (share,) * len(totals)
        counts = [select.keep_count(p, d) for p, d in zip(densities, totals.tolist(), strict=True)]
        if self.compat == "official":  # its (d − k)-th smallest value is the (k + 1)-th largest
            counts = [min(k + 1, d) for k, d in zip(counts, totals.tolist(), strict=True)]
        return torch.tensor(counts, device=totals.device)

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """What is trimmed and elected, (experts, *tile)."""
        return tile.x

    def trim(self, tile: Tile, known: Known) -> Tensor:
        """The stack with all but the kept entries at zero."""
        x = self.trimmed_quantity(tile, known)
        if not self.trims:
            return x
        if Fine.name not in known:
            raise AssertionError("the engine runs the passes before apply")
        thresholds, take = known[Fine.name]
        if self.compat == "official":
            take = torch.full_like(take, torch.iinfo(take.dtype).max // 2)
        mask = select.threshold_mask(x, thresholds, take, known[Equal.name][place(tile)])
        return torch.where(mask, x, torch.zeros_like(x))

    def votes(self, x: Tensor) -> Tensor:
        """The sign of the sum over the experts, 0 where they cancel; the sum is exact to float64."""
        return torch.sign(weighted_sum(self.weights if self.compat == "mergekit" else 1.0, x)).to(x.dtype)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x = self.trim(tile, known)
        sign = self.votes(x)
        cancelled = sign == 0
        if self.compat == "official" or self.tie == "majority":
            majority = known[Majority.name] or (-1 if self.compat == "official" else 0)
            sign = torch.where(cancelled, torch.full_like(sign, majority), sign)
        elif self.tie == "positive" or self.compat == "mergekit":
            sign = torch.where(cancelled, torch.ones_like(sign), sign)
        side = torch.sign(x)
        if self.compat == "mergekit":
            side *= torch.sign(column(self.weights, x))
        agree = (side == sign) & (side != 0)
        chosen = torch.where(agree, x, torch.zeros_like(x))
        if self.merge == "max":
            merged = (column(self.weights, x.double()) * chosen).abs().amax(0) * sign
        else:
            merged = weighted_sum(self.weights, chosen)
        if self.merge == "mean":
            mass = weighted_sum(self.weights, agree)
            merged = torch.where(mass != 0, merged / torch.where(mass != 0, mass, 1.0), torch.zeros_like(mass))
        return moved(tile, merged, self.scale)
