"""NearSwap: from one model towards another, by a step at most in every entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from twinmerge.maths.rule import Near, Rule
from twinmerge.methods.kit.base import Known, Method, Place, Tile
from twinmerge.methods.kit.dialect import Dialect, Number, base_and_one

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 1e-6  # of |θb − θa|, which t is divided by


class Nearswap(Method):
    """θ = θa + s · (θb − θa), entry by entry, with s = min(1, t / max(|θb − θa|, 1e-6)), and 0 where t is negative.

    Entries that differ by t or less are θb's, bit for bit; the others go t towards θb. At t = 0 the result is θa, the
    first model given. t is a difference of weights: 0.0001 is what the method became known with. compat="mergekit"
    computes s · θb + (1 − s) · θa in float32, step by step, with its base_model as θa.

    Source: no paper; the `nearswap` of mergekit 0.1.5.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place
        >>> x = torch.tensor([[1.0, 1.0, 1.0], [1.25, 3.0, -1.0]])
        >>> Nearswap(t=0.5).apply(Tile(x, None, Place("w", (3,))), Known())
        tensor([1.2500, 1.5000, 0.5000])
    """

    space = "parameters"
    experts_min = experts_max = 2
    laws = frozenset({"idempotent", "odd"})
    paper = "none; mergekit 0.1.5"
    group = "picked, layer by layer or entry by entry"
    cost = "one read"
    strong = "what two models nearly agree on"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "nearswap": Dialect(shared={"t": Number("t")}, refuse=base_and_one("nearswap"))
    }

    t: float = Field(default=1e-4, description="how far an entry goes at most from the first model to the second")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def apply(self, tile: Tile, known: Known) -> Tensor:
        import torch

        first, second = tile.x
        if self.compat == "mergekit":
            share: Tensor = (self.t / (first - second).abs_().clamp_min_(LEAST)).clamp_(0.0, 1.0)
            return share.mul(second).add_((1 - share) * first)
        start = first.to(tile.work)
        way = second.to(tile.work) - start
        size = way.abs().clamp_min_(LEAST)
        step = way.mul_(max(self.t, 0.0)).div_(size)
        there = torch.where(step == 0, first, (start + step).to(tile.x.dtype))
        return torch.where(size <= self.t, second, there)

    def rule(self, at: Place, known: Known) -> Rule:
        return Rule((1.0, 1.0), deltas=False, near=Near(self.t, LEAST, self.compat == "mergekit"))
