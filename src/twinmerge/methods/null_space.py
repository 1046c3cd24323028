"""The null-space filter: an arriving expert only writes on inputs that the merged change does not use."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import gram_svd
from twinmerge.methods.kit.base import TABLES, Grain, Known, Method, Place, Tile, moved, scale_field
from twinmerge.methods.kit.fold import Fold, Seen, State, absorbed_by_matrix, folded
from twinmerge.methods.kit.spectral import elementwise_field, is_listed, names_tables


class NullSpace(Method, Fold):
    """Weights of linear layers: A ← A + τt (I − V_r V_rᵀ), V_r being the `rank` leading right singular vectors of A;
    all other tensors: A ← A + τt, divided by the number of experts; matrices that are stored (in, out) the other way
    round. θ = θ0 + λ A. Experts are taken in their order, which has a meaning.

    The closed form in the ablation of NUFILT, which then trains a low-rank correction on top; nothing is trained here.

    Source: NUFILT, ICLR 2026, its ablation "null space only".

    Example:
        >>> import torch
        >>> method, at = NullSpace(rank=1), Place("w", (2, 2))
        >>> state = method.absorb({}, torch.tensor([[2.0, 0.0], [0.0, 0.0]]).double(), at)
        >>> method.absorb(state, torch.tensor([[5.0, 6.0], [7.0, 8.0]]).double(), at)["accumulated"].tolist()
        [[2.0, 6.0], [0.0, 8.0]]
    """

    grain = "matrix"
    paper = "NUFILT, ICLR 2026, ablation"
    group = "over time"
    cost = "SVD per expert"
    strong = "one by one: above OPCM on CLIP"
    scales_last = True
    unremovable: ClassVar[str] = "every later expert was filtered by what it had changed"

    rank: int = Field(default=128, ge=1, description="leading input directions of the merged change that are protected")
    scale: float = scale_field(1.0)
    elementwise: str = elementwise_field(TABLES)

    @property
    def asks_for_tables(self) -> bool:
        return names_tables(self.elementwise)

    def filters(self, at: Place) -> bool:
        """Whether the tensor is the weight of a linear layer; kernels and tables are none."""
        return (len(at.shape) == 2 or at.stack) and at.is_matrix and not is_listed(at, self.elementwise)

    def grain_of(self, at: Place) -> Grain:
        return "matrix" if self.filters(at) else "element"

    def absorbs_whole(self, at: Place) -> bool:
        return self.filters(at)

    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        if not state:
            return {"accumulated": delta}
        before = state["accumulated"]
        if at.stack and self.filters(at):
            return absorbed_by_matrix(self, state, delta, at)
        if self.filters(at):
            u, _, vh = gram_svd(before, at.name, at.rounded)
            if at.transposed:
                u = u[:, : self.rank]
                delta = delta - u @ (u.mT @ delta)
            else:
                vh = vh[: self.rank]
                delta = delta - (delta @ vh.mT) @ vh
        return {"accumulated": before + delta}

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        change = state["accumulated"] if self.filters(at) else state["accumulated"] / max(seen.experts, 1)
        return change * self.scale

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, self.settle(folded(self, tile), tile.at, Seen(len(tile.x), 0.0, 0.0)), 1.0)
