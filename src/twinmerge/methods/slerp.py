"""Spherical linear interpolation of two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Known, Method, Place, Tile, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Number, base_and_one
from twinmerge.methods.kit.inner_products import Products, Shares
from twinmerge.methods.kit.sphere import arc

if TYPE_CHECKING:
    from torch import Tensor

LERP_ABOVE = 0.9995  # beyond this |cosine| the sphere is flat to float32 and sin(angle) loses its digits


class Slerp(Method):
    """θ = sin((1−t)φ)/sin φ · θa + sin(tφ)/sin φ · θb for each tensor, φ the angle between θa and θb.

    Works on parameters, not deltas. Where |cos φ| > 0.9995 (two light fine-tunes of one base, mostly), or where a
    tensor is zero, it is the straight line (1−t)θa + tθb; with compat="mergekit" a zero tensor is at a right angle to
    all others. The first expert given is θa (t = 0).

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; for weights as in the tools of the field.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> tile = Tile(torch.eye(2), None, Place("w", (2,)))
        >>> method, known = Slerp(t=0.5), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([0.7071, 0.7071])
    """

    space = "parameters"
    experts_min = experts_max = 2
    laws = frozenset({"idempotent", "odd", "homogeneous"})
    paper = "Shoemake 1985"
    group = "on the sphere"
    cost = "two reads"
    strong = "two models, along the arc"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "slerp": Dialect(shared={"t": Number("t", usual=(0.0, 1.0))}, refuse=base_and_one("slerp"))
    }

    t: float = Field(default=0.5, description="where on the way from the first expert to the second, 0 to 1")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def check(self, experts: Sequence[str]) -> None:
        if self.compat == "paper" and not 0 <= self.t <= 1:
            raise ValueError(
                f"t = {self.t:g} lies past the models. Take one from 0 to 1; with compat=mergekit it may go on."
            )

    @property
    def end(self) -> int | None:
        """The expert that the result is, bit by bit, at either end of the way."""
        return int(self.t) if self.t in (0.0, 1.0) else None

    def amounts(self, experts: int) -> tuple[float, ...]:
        return 1 - self.t, self.t

    def passes(self) -> Sequence[Shares[tuple[float, float]]]:
        return (Shares(self.space, self.shares),) if self.end is None else ()

    def shares(self, products: Products) -> tuple[float, float]:
        """What θa and θb are multiplied with."""
        aa, ab, bb = (float(products[pair]) for pair in ((0, 0), (0, 1), (1, 1)))
        none = 0.0 if self.compat == "mergekit" else 1.0
        cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else none
        of_a, of_b = arc(self.t, cosine, LERP_ABOVE).tolist()
        return of_a, of_b

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if self.end is not None:
            return tile.x[self.end].clone()
        return weighted_sum(known.of(Shares), tile.x, tile.work).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule:
        if self.end is not None:
            return Rule(self.amounts(2), deltas=False, only=self.end)
        return Rule(known.of(Shares), deltas=False)
