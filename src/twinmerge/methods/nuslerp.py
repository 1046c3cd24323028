"""Spherical interpolation of two models or of their changes, by tensor, row or column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import (
    Grain,
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Place,
    Tile,
    on_base,
    per_expert,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.inner_products import Products, Shares, products_along, whole_rows
from twinmerge.methods.kit.sphere import arc

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

STRAIGHT_ABOVE = 1 - 5e-11  # |cos φ|: parallel ones are the same on a line; between opposite ones only noise is left
LEAST_NORM = 1e-7  # in mergekit
LEAST_SUM = 1e-6  # of the two weights, in size


class ColumnProducts(Pass[Products]):
    """⟨xi, xj⟩ along the first axis, added up over blocks of rows in their order."""

    name = "column_products"
    scope = "tensor"
    grain = "rows"

    def observe(self, tile: Tile, known: Known) -> Partial:
        return {"products": products_along(tile.x, 0)}

    def finish(self, total: Partial, known: Known) -> Products:
        products: Products = total["products"]
        return products


def unless_two(count: int, based: bool) -> str | None:
    """mergekit takes its base_model for none of the two."""
    return None if count == 2 else f"nuslerp is between two models besides base_model, got {count}. List two."


class Nuslerp(Method):
    """θ = sin((1−t)φ)/sin φ · x1 + sin(tφ)/sin φ · x2 with t = w2 / (w1 + w2), φ the angle between x1 and x2.

    With a base x are the changes to it, and the result is added to it; without one x are the models. t = 0.5 where
    |w1 + w2| < 1e-6. φ is that of whole tensors; with flatten=false each row (along the last axis) has its own, and
    with row_wise=true besides each column (along the first axis), as mergekit calls it. Rows are then read whole.

    Where |cos φ| > 1 − 5e-11 it is the straight line (1−t)x1 + tx2. Between parallel ones that is the same; opposite
    ones have no shortest way. It is the line, too, where x1 or x2 is zero; compat="mergekit" has such at a right angle
    to all others, and takes norms for no less than 1e-7.

    Source: no paper; the `nuslerp` of mergekit 0.1.5, after Shoemake 1985, "Animating rotation with quaternion curves".

    Example:
        >>> import torch
        >>> tile = Tile(torch.eye(2), torch.ones(2), Place("w", (2,)))
        >>> method, known = Nuslerp(), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([1.7071, 1.7071])
    """

    space = "either"
    experts_min = experts_max = 2
    laws = frozenset({"odd", "homogeneous"})
    paper = "none; mergekit 0.1.5"
    group = "on the sphere"
    cost = "two reads"
    strong = "two models, also row by row"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "nuslerp": Dialect(
            {"weight": Number("weights")},
            {"nuslerp_flatten": Switch("flatten", default=True), "nuslerp_row_wise": Switch("row_wise")},
            refuse=unless_two,
        )
    }

    weights: PerExpert = weights_field()
    flatten: bool = Field(default=True, description="one angle for the whole tensor")
    row_wise: bool = Field(default=False, description="without flatten: an angle for each column, and not for each row")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    @property
    def t(self) -> float:
        """Where on the way from the first expert to the second."""
        first, second = per_expert(self.weights, 2)
        return second / (first + second) if abs(first + second) >= LEAST_SUM else 0.5

    def passes(self) -> Sequence[Pass[Products]]:
        if self.flatten:
            return (Shares(self.space, self.shares),)
        return (ColumnProducts(),) if self.row_wise else ()

    def grain_of(self, at: Place) -> Grain:
        return "element" if self.flatten else whole_rows(at)

    def shares(self, products: Products) -> NDArray[np.float64]:
        """What x1 and x2 are multiplied with, (2, *shape of the rows or columns that the products are of)."""
        a, b = np.sqrt(products[0, 0]), np.sqrt(products[1, 1])
        if self.compat == "mergekit":
            cosine = products[0, 1] / (np.maximum(a, LEAST_NORM) * np.maximum(b, LEAST_NORM))
        else:
            cosine = np.divide(products[0, 1], a * b, out=np.ones_like(a), where=(a > 0) & (b > 0))
        return arc(self.t, cosine, STRAIGHT_ABOVE)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if self.flatten:
            return on_base(tile, weighted_sum(tuple(known.of(Shares).tolist()), tile.x, tile.work))
        import torch

        axis = 0 if self.row_wise else -1
        found = known.maybe(ColumnProducts)
        shares = self.shares(products_along(tile.x, axis) if found is None else found)
        first, second = (torch.as_tensor(share).to(tile.x.device, tile.work).unsqueeze(axis) for share in shares)
        x, y = tile.x.to(tile.work)
        return on_base(tile, torch.addcmul(x * first, y, second))

    def rule(self, at: Place, known: Known) -> Rule | None:
        return Rule(tuple(known.of(Shares).tolist()), deltas=None) if self.flatten else None
