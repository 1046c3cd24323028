"""One model as it is, or times a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Method, PerExpert, Place, Tile, per_expert, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Number

if TYPE_CHECKING:
    from torch import Tensor


def unless_one(count: int, based: bool) -> str | None:
    """mergekit counts a base_model among the models."""
    return None if count == 1 else f"passthrough takes one model as it is, got {count}, base_model counted. List one."


class Passthrough(Method):
    """θ = s · θ1, of one model. At s = 1 every value keeps its bits. No base is needed.

    What it is for is layers of several models one after the other, each with its own scale. compat="mergekit" rounds s
    to float32.

    Source: no paper; the `passthrough` of mergekit 0.1.5.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> Passthrough(scale=-0.5).apply(Tile(torch.tensor([[2.0, 3.0]]), None, Place("w", (2,))), Known())
        tensor([-1.0000, -1.5000])
    """

    space = "parameters"
    experts_min = experts_max = 1
    laws = frozenset({"idempotent", "odd", "homogeneous"})
    paper = "none; mergekit 0.1.5"
    group = "picked, layer by layer or entry by entry"
    cost = "one read"
    strong = "layers of models, stacked anew"
    linear = True
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "passthrough": Dialect({"scale": Number("scale", 1.0)}, refuse=unless_one)
    }

    scale: PerExpert = Field(default=1.0, description="multiplies every value")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def coefficients(self, experts: int) -> tuple[float, ...]:
        by = per_expert(self.scale, experts)
        return tuple(np.array(by, np.float32).tolist()) if self.compat == "mergekit" else by

    def amounts(self, experts: int) -> tuple[float, ...]:
        return self.coefficients(experts)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return weighted_sum(self.coefficients(len(tile.x)), tile.x, tile.work).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule:
        by = self.coefficients(len(at.experts))
        return Rule(by, deltas=False, only=0 if by == (1.0,) else None)
