"""SCE: select what the experts differ in, calculate each one's weight by its size, erase what is against the majority."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from twinmerge.maths.fused import gram, spread, staged
from twinmerge.maths.rule import Elect, Rule, Select, Values
from twinmerge.maths.sums import blocked_dot, total
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Partial,
    Pass,
    Place,
    Tile,
    decided,
    moved,
    rounded_sum,
    scale_field,
    weighted_sum,
)
from twinmerge.methods.kit.dialect import Dialect, Number
from twinmerge.methods.kit.election import agreeing, signs

if TYPE_CHECKING:
    from torch import Tensor

    from twinmerge.maths.select import Counts

DECIDED = {"mergekit": {"tie": "positive"}}
LEAST_SQUARES = 1e-6  # the sum of the means of τ² below which mergekit weighs all experts alike
LEAST_MASS = 1e-6  # what mergekit divides by at least


def deviations(x: Tensor) -> Tensor:
    """The standard deviation over the experts, entry by entry, as `fused.spread` has it: (*tile) float32 of (experts,
    *tile).

    Example:
        >>> import torch
        >>> deviations(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist()
        [1.0, 0.0]
    """
    import torch

    mean = weighted_sum(1.0, x, torch.float64) / len(x)
    out = torch.zeros_like(mean)
    for row in x:
        away = row.double() - mean
        out += away * away
    return (out / len(x)).sqrt_().to(x.dtype)


class Squares(Pass[tuple[float, ...]]):
    """The weight of every expert in a tensor: its share of Σ τ², of what is selected."""

    name = "sce_weights"
    scope = "tensor"

    def __init__(self, method: Sce) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        if tile.stored is not None:
            rule = Rule((1.0,) * len(tile.stored.experts), deltas=True, select=self.method.selection(tile.at, known))
            x, sound = staged(rule, tile.stored.base, tile.stored.experts, tile.at.offset)
            if sound:  # else the tile says whose numbers are none
                rows = [Values(row.view(np.uint8), "F32") for row in x]
                return {f"{tile.at.offset}": [gram(None, [row])[0, 0].tolist() for row in rows], "size": x.shape[1]}
        left = self.method.selected(tile, known)
        return {f"{tile.at.offset}": [blocked_dot(row, row).tolist() for row in left], "size": left[0].numel()}

    def finish(self, total_: Partial, known: Known) -> tuple[float, ...]:
        """The weights, which add up to 1."""
        size = total_.pop("size")
        tiles = list(total_.values())
        squares = [total(*(tile[e] for tile in tiles)) for e in range(len(tiles[0]))]
        whole = sum(squares)
        least = LEAST_SQUARES * size if self.method.compat == "mergekit" else 0.0
        if whole < least or whole == 0:
            return (1 / len(squares),) * len(squares)
        return tuple(square / whole for square in squares)


class Sce(Method):
    """θ = θ0 + λ Σt ηt τ′t / Σt ηt over the experts whose τ′t has the elected sign, tensor by tensor.

    1. Select: of all entries of a tensor in which the experts differ, the share `select_topk` with the largest variance
       over the experts is kept, of equal ones the first; τ′ is 0 elsewhere. 1 keeps all. One expert alone differs from
       nobody, and is kept whole.
    2. Calculate: ηt = Σ τ′t² / Σs Σ τ′s², one weight for each expert and tensor; all alike where nothing changed.
    3. Erase: the sign of Σt τ′t is elected, entry by entry ("zero": nothing changes where it cancels; or "positive");
       entries of the other sign are left out, and what agrees is divided by the weights that agree, as in the code
       that the authors released.

    compat="mergekit" sends cancelled votes to +1, takes all ηt alike where the sum of the experts' mean squares is below
    1e-6, as it is for most fine-tuned models, divides by 1e-6 at least, and keeps nothing of one expert alone where
    `select_topk` is below 1. It has no weights and no density.

    Source: Wan et al. 2025, "FuseChat: Knowledge Fusion of Chat Models", EMNLP, arXiv 2408.07990, section 3 (SCE).

    Example:
        >>> import torch
        >>> deltas, at = torch.tensor([[3.0, 1.0, 1.0], [1.0, -1.0, 1.0]]), Place("w", (3,), 0, ("a", "b"))
        >>> tile, known = Tile(deltas, torch.zeros(3), at), Known(sce_weights=(0.75, 0.25))
        >>> Sce(select_topk=1.0).apply(tile, known).tolist()
        [2.5, 0.0, 1.0]
    """

    laws = frozenset({"symmetric", "homogeneous"})
    paper = "Wan et al. 2025, EMNLP, arXiv 2408.07990"
    group = "trim, drop, elect"
    cost = "three reads"
    strong = "chat LLMs of one base"
    scales_last = True
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "sce": Dialect({}, {"select_topk": Number("select_topk", 1.0, least=0.0, most=1.0)})
    }

    select_topk: float = Field(default=0.1, ge=0, le=1, description="share kept of the entries that experts differ in")
    scale: float = scale_field(1.0)
    tie: Literal["zero", "positive"] = Field(default="zero", description="the elected sign where the votes cancel")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    @model_validator(mode="before")
    @classmethod
    def _decide(cls, values: Any) -> Any:
        return decided(values, DECIDED)

    def selects(self, experts: int) -> bool:
        """Whether anything is left out by the selection."""
        return self.select_topk < 1 and (experts > 1 or self.compat == "mergekit")

    def passes(self) -> Sequence[Pass[Any]]:
        if self.select_topk >= 1:
            return [Squares(self)]
        from twinmerge.methods.kit.trim import trim_passes

        return [*trim_passes(self, "tensor"), Squares(self)]

    @property
    def trims_stored(self) -> bool:
        return False

    @property
    def counts_zeros(self) -> bool:
        return False

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        """How far the experts are apart, (1, *tile): it is selected by this, whose order is that of the variance."""
        if tile.stored is not None:
            import torch

            rule = Rule((1.0,) * len(tile.stored.experts), deltas=True)
            x, sound = staged(rule, tile.stored.base, tile.stored.experts, tile.at.offset)
            if sound:  # else the tile says whose numbers are none
                return torch.from_numpy(spread(x))[None]
        return deviations(tile.x)[None]

    def keep_counts(self, totals: Counts) -> Counts:
        """k of the entries in which the experts differ."""
        from twinmerge.maths.select import keep_count

        if self.compat == "mergekit":  # floating point: int(0.29 * 100) is 28
            counts = [int(self.select_topk * size) for size in totals.tolist()]
        else:
            counts = [keep_count(self.select_topk, size) for size in totals.tolist()]
        return np.array(counts, np.int64)

    def selected(self, tile: Tile, known: Known) -> Tensor:
        """The stack with all but the selected entries at zero."""
        if not self.selects(len(tile.x)):
            return tile.x
        from twinmerge.methods.kit.trim import trimmed

        apart = trimmed(self.trimmed_quantity(tile, known), tile, known)
        return tile.x.masked_fill(apart == 0, 0.0)

    def selection(self, at: Place, known: Known) -> Select | None:
        """The same as data."""
        if not self.selects(len(at.experts)):
            return None
        from twinmerge.methods.kit.trim import trim_rule

        trim = trim_rule(at, known)
        return Select(trim.thresholds[0], trim.rooms[0])

    @property
    def least(self) -> float:
        """What the weights that agree are divided by at least."""
        return LEAST_MASS if self.compat == "mergekit" else 0.0

    def apply(self, tile: Tile, known: Known) -> Tensor:
        x, weights = self.selected(tile, known), known.of(Squares)
        votes = rounded_sum(1.0, x) if self.compat == "mergekit" else weighted_sum(1.0, x, tile.work)
        sign = signs(votes, int(self.tie == "positive")).to(x.dtype)
        return moved(tile, agreeing(x, sign, tile.work, weights, "mean", least=self.least), self.scale)

    def rule(self, at: Place, known: Known) -> Rule:
        count = len(at.experts)
        elect = Elect(
            "mean", (1.0,) * count, int(self.tie == "positive"), (False,) * count, self.compat == "mergekit", self.least
        )
        select = self.selection(at, known)
        return Rule(known.of(Squares), deltas=True, scale=self.scale, elect=elect, select=select)
