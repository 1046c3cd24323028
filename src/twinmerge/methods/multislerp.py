"""The mean of any number of directions, at the mean length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    on_base,
    per_expert,
    require_divisor,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.dialect import Dialect, Number, Switch
from twinmerge.methods.kit.inner_products import Products, Shares

if TYPE_CHECKING:
    from torch import Tensor

CANCELLED = 1e-6  # of Σ|wi|: a mean direction that is shorter is what rounding left


class Multislerp(Method):
    """θ = (Σ wi ‖xi‖) · m / ‖m‖ with m = Σ wi xi / (‖xi‖ + eps), for each tensor; the weights add up to 1.

    With a base x are the changes to it, and the result is added to it; without one x are the models. With
    `normalize_weights` false the weights are taken as they are. One expert stays as it is, whatever its weight.

    mergekit takes one step more, from m along Σ wi (ui − ⟨ui, m⟩ m) with ui and m of length 1. As m is the mean of
    the ui, that is 0 in exact arithmetic, and only rounding makes it something; here it is left out.

    Where the directions cancel, ‖m‖ < max(eps, 1e-6 Σ|wi|), there is none to take: the result is Σ wi xi. mergekit has
    that for two inputs and stops for more; a tensor that no expert changed, where all xi are zero, stays the base's.

    Source: no paper; the `multislerp` of mergekit 0.1.5, after Buss and Fillmore 2001, "Spherical averages and
    applications to spherical splines and interpolation".

    Example:
        >>> import torch
        >>> tile = Tile(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2), Place("w", (2,)))
        >>> method, known = Multislerp(), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([1.4142, 1.4142])
    """

    space = "either"
    laws = frozenset({"symmetric", "odd"})
    paper = "none; mergekit 0.1.5"
    group = "on the sphere"
    cost = "two reads"
    strong = "any number, with weights"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "multislerp": Dialect(
            {"weight": Number("weights")},
            {"normalize_weights": Switch("normalize_weights", default=True), "eps": Number("eps", 1e-8)},
        )
    }

    weights: PerExpert = weights_field()
    normalize_weights: bool = Field(default=True, description="divide the weights by their sum")
    eps: float = Field(default=1e-8, ge=0.0, description="added to lengths that are divided by")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def check(self, experts: Sequence[str]) -> None:
        if self.normalize_weights and len(experts) > 1:
            require_divisor(per_expert(self.weights, len(experts)), negative=self.compat == "mergekit")

    def passes(self) -> Sequence[Shares[tuple[float, ...]]]:
        return (Shares(self.space, self.shares),)

    def shares(self, products: Products) -> tuple[float, ...]:
        """What the xi are multiplied with."""
        if len(products) == 1:
            return (1.0,)
        weights = np.array(per_expert(self.weights, len(products)))
        if self.normalize_weights:
            weights /= weights.sum()
        lengths = np.sqrt(products.diagonal())
        mean = np.divide(weights, lengths + self.eps, out=np.zeros_like(weights), where=lengths > 0)
        length = np.sqrt(max(0.0, mean @ products @ mean))
        if length < max(self.eps, CANCELLED * np.abs(weights).sum()) or not length:
            return tuple(weights.tolist())
        return tuple((mean * (weights @ lengths / length)).tolist())

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return on_base(tile, weighted_sum(known.of(Shares), tile.x, tile.work))

    def rule(self, at: Place, known: Known) -> Rule:
        return Rule(known.of(Shares), deltas=None)
