"""Spherical linear interpolation of two models, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from twinmerge.maths import fused
from twinmerge.maths.fused import Rule
from twinmerge.maths.sums import blocked_gram, total
from twinmerge.methods.kit.base import Known, Method, Partial, Pass, Place, Tile, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Number

if TYPE_CHECKING:
    from torch import Tensor

LERP_ABOVE = 0.9995  # beyond this |cosine| the sphere is flat to float32 and sin(angle) loses its digits


class InnerProducts(Pass[list[float]]):
    """⟨a,a⟩, ⟨a,b⟩ and ⟨b,b⟩ of the two experts' whole tensor, in float64 over fixed blocks."""

    name = "inner_products"
    scope = "tensor"

    def observe(self, tile: Tile, known: Known) -> Partial:
        if tile.stored is not None:
            blocks = fused.gram(*tile.stored.experts).tolist()
        else:
            gram = blocked_gram(tile.x.reshape(2, -1))
            blocks = [gram[0, 0].tolist(), gram[0, 1].tolist(), gram[1, 1].tolist()]
        return {f"{product} {tile.at.offset}": of for product, of in zip(("aa", "ab", "bb"), blocks, strict=True)}

    def finish(self, total_: Partial, known: Known) -> list[float]:
        return [
            total(*(blocks for key, blocks in total_.items() if key.startswith(product)))
            for product in ("aa", "ab", "bb")
        ]


def unless_two(count: int, based: bool) -> str | None:
    """mergekit's slerp starts from its base_model."""
    if count == 2 and based:
        return None
    return (
        f"slerp is between base_model (t = 0) and one other model, got {count} models and {'a' if based else 'no'} "
        "base_model. "
        "Name the first of two models as base_model."
    )


class Slerp(Method):
    """θ = sin((1−t)φ)/sin φ · θa + sin(tφ)/sin φ · θb for each tensor, φ the angle between θa and θb.

    Works on parameters, not deltas. Where |cos φ| > 0.9995 (two light fine-tunes of one base, mostly), or where a
    tensor is zero, it is the straight line (1−t)θa + tθb; with compat="mergekit" a zero tensor is at a right angle to
    all others. The first expert given is θa (t = 0).

    Source: Shoemake 1985, "Animating rotation with quaternion curves"; for weights as in the tools of the field.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> slerp, tile = Slerp(t=0.5), Tile(torch.eye(2), None, Place("w", (2,)))
        >>> products, known = InnerProducts(), Known()
        >>> known[products.name] = products.finish(products.observe(tile, known), known)
        >>> slerp.apply(tile, known)
        tensor([0.7071, 0.7071])
    """

    space = "parameters"
    experts_min = experts_max = 2
    laws = frozenset({"idempotent", "odd", "homogeneous"})
    paper = "Shoemake 1985"
    mergekit: ClassVar[Mapping[str, Dialect]] = {"slerp": Dialect(shared={"t": Number("t")}, refuse=unless_two)}

    t: float = Field(default=0.5, ge=0.0, le=1.0, description="where on the way from the first expert to the second")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[InnerProducts]:
        return (InnerProducts(),)

    def shares(self, known: Known) -> tuple[float, float]:
        """What θa and θb are multiplied with."""
        aa, ab, bb = known.of(InnerProducts)
        flat = 0.0 if self.compat == "mergekit" else 1.0
        cosine = ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else flat
        if abs(cosine) > LERP_ABOVE or self.t in (0.0, 1.0):
            return 1.0 - self.t, self.t
        angle = math.acos(cosine)
        return math.sin((1.0 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        of_a, of_b = self.shares(known)
        if of_b in (0.0, 1.0):
            return tile.x[int(of_b)].clone()
        return weighted_sum((of_a, of_b), tile.x, tile.work).to(tile.x.dtype)

    def rule(self, at: Place, known: Known) -> Rule | None:
        of_a, of_b = self.shares(known)
        return None if of_b in (0.0, 1.0) else Rule((of_a, of_b), deltas=False)
