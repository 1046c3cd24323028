"""Model Stock: the mean of a few fine-tuned models, drawn towards the base the more, the wider their angle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field

from twinmerge.maths.rule import Rule
from twinmerge.methods.kit.base import Grain, Known, Method, Place, Tile, moved, weighted_sum
from twinmerge.methods.kit.dialect import Dialect, Switch
from twinmerge.methods.kit.inner_products import Products, Shares, products_along, whole_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LEAST_NORMS = 1e-6  # of ‖τi‖ ‖τj‖ in mergekit
LEAST_DIVISOR = 1e-6  # of 1 + (n − 1) cos φ, in size


def unless_two(count: int, based: bool) -> str | None:
    """mergekit counts the base."""
    if count >= 2:
        return None
    return f"model_stock takes at least three models, base_model counted, got {count + 1}. List one more."


class ModelStock(Method):
    """θ = t · mean θi + (1 − t) · θ0 for each tensor, with t = n cos φ / (1 + (n − 1) cos φ).

    φ is the angle between the task vectors of two experts. It is that of experts tuned on one task from one base, and
    between more than two of them cos φ is the mean over all pairs. Experts of different tasks are at nearly right
    angles, so that little more than the base is left.

    The paper's angles are below 90°. Where cos φ is negative, t is 0, which is the base. A task vector that is zero
    is at a right angle to all others. With `filter_wise` every row (of the last axis; a vector is one row) has a t of
    its own, and rows are read whole. compat="mergekit" lets t go below 0, away from the experts; it takes ‖τi‖ ‖τj‖ for
    no less than 1e-6, and t = 0 where |1 + (n − 1) cos φ| < 1e-6.

    Source: Jang et al. 2024, "Model Stock: All we need is just a few fine-tuned models", arXiv 2403.19522, section 4.

    Example:
        >>> import torch
        >>> tile = Tile(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.zeros(2), Place("w", (2,)))
        >>> method, known = ModelStock(), Known()
        >>> for step in method.passes():
        ...     known[step.name] = step.finish(step.observe(tile, known), known)
        >>> method.apply(tile, known)
        tensor([0.8284, 0.4142])
    """

    experts_min = 2
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Jang et al. 2024, arXiv 2403.19522"
    group = "averages"
    cost = "two reads"
    strong = "a few runs of one task"
    mergekit: ClassVar[Mapping[str, Dialect]] = {
        "model_stock": Dialect(shared={"filter_wise": Switch("filter_wise")}, refuse=unless_two)
    }

    filter_wise: bool = Field(default=False, description="a t for each row, and not for each tensor")
    compat: Literal["paper", "mergekit"] = Field(default="paper", description="whose semantics")

    def passes(self) -> Sequence[Shares[NDArray[np.float64]]]:
        return () if self.filter_wise else (Shares(self.space, self.shares),)

    def grain_of(self, at: Place) -> Grain:
        return whole_rows(at) if self.filter_wise else "element"

    def shares(self, products: Products) -> NDArray[np.float64]:
        """t, of each row where the products are of rows."""
        count = len(products)
        first, second = np.triu_indices(count, 1)
        lengths = np.sqrt(np.einsum("ii...->i...", products))
        norms = lengths[first] * lengths[second]
        dots = products[first, second]
        if self.compat == "mergekit":
            cosines = dots / np.maximum(norms, LEAST_NORMS)
        else:
            cosines = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
        cosine = cosines.clip(-1.0, 1.0).mean(0)
        if self.compat == "paper":
            cosine = cosine.clip(0.0)
        divisor = 1 + (count - 1) * cosine
        some = np.abs(divisor) >= LEAST_DIVISOR
        return np.where(some, count * cosine / np.where(some, divisor, 1.0), 0.0)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        count, change = len(tile.x), weighted_sum(1.0, tile.x, tile.work)
        if not self.filter_wise:
            return moved(tile, change, known.of(Shares).item() / count)
        import torch

        by = torch.as_tensor(self.shares(products_along(tile.x, -1)) / count).to(change)
        return moved(tile, change.mul_(by.unsqueeze(-1)), 1.0)

    def rule(self, at: Place, known: Known) -> Rule | None:
        if self.filter_wise:
            return None
        count = len(at.experts)
        return Rule((1.0,) * count, deltas=True, scale=known.of(Shares).item() / count)
