"""OPCM: each arriving expert is projected away from what is merged already; the merged change keeps the experts' mean
norm."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.gram_svd import gram_svd
from twinmerge.methods.kit.base import TABLES, Known, Method, Partial, Pass, Place, Tile, moved
from twinmerge.methods.kit.fold import Fold, Seen, State, absorbed_by_matrix, folded
from twinmerge.methods.kit.spectral import elementwise_field, is_listed, names_tables

Form = Literal["fixed", "released", "paper"]


class Opcm(Method, Fold):
    """Weights of linear layers: A ← A + P(τt); all other tensors: A ← A + τt; θ = θ0 + A · n̄ / ‖A‖.

    n̄ is the mean of ‖τ1‖ … ‖τt‖ and ‖A‖ the norm of the whole A, so that the merged model stays as far from the base
    as the experts are. This is the paper's recursion, in which λt = ‖A‖ / n̄, to the last digit: P sees of A only the
    directions and their shares, which no rescaling changes. Nothing but A and n̄ has to be kept between experts.
    Experts are taken in their order, which has a meaning.

    Let A = U diag(s) Vᵀ have the numerical rank k, and r be the number of directions whose cumulative share of Σ s is
    at most `alpha` (all k for alpha = 1). The three forms in circulation take out of Uᵀ τ V

    - released: the leading r × r block (the authors' code; its removal of the diagonal has no effect). ⟨A, P(τ)⟩ is
      not 0.
    - fixed: that block, and the diagonal up to k (FusionBench since 2025-03).
    - paper: all rows and columns below r, and the diagonal up to k (equation 6).

    Singular vectors beyond the numerical rank are never used. While A is 0, P(τ) = τ.

    Source: Tang et al. 2025, "Merging Models on the Fly Without Retraining", NeurIPS, arXiv 2501.09522; the forms as
    the project's specification found them.

    Example:
        >>> from twinmerge.methods.kit.fold import Seen
        >>> method, at = Opcm(), Place("w", (2, 2))
        >>> state = method.absorb({}, torch.diag(torch.tensor([3.0, 1.0])).double(), at)
        >>> state = method.absorb(state, torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double(), at)
        >>> state["accumulated"].round(decimals=6).tolist()
        [[3.0, 2.0], [3.0, 1.0]]
    """

    grain = "matrix"
    paper = "Tang et al. 2025, NeurIPS, arXiv 2501.09522"
    group = "over time"
    cost = "SVD per expert"
    strong = "vision experts, one by one"
    unremovable: ClassVar[str] = "every later expert was projected away from it"

    alpha: float = Field(
        default=0.5, ge=0, le=1, description="share of the singular values' sum that is protected as a block"
    )
    form: Form = Field(default="fixed", description="which of the three operators in circulation")
    elementwise: str = elementwise_field(TABLES)

    @property
    def asks_for_tables(self) -> bool:
        return names_tables(self.elementwise)

    def projects(self, at: Place) -> bool:
        """Whether the tensor is the weight of a linear layer; kernels and tables are none."""
        return (len(at.shape) == 2 or at.stack) and at.is_matrix and not is_listed(at, self.elementwise)

    def absorbs_whole(self, at: Place) -> bool:
        return self.projects(at)

    def absorb(self, state: State, delta: Tensor, at: Place) -> State:
        if not state:
            return {"accumulated": delta}
        before = state["accumulated"]
        if at.stack and self.projects(at):
            return absorbed_by_matrix(self, state, delta, at)
        if self.projects(at):
            delta = project(before, delta, self.alpha, self.form, at.name, at.rounded)
        return {"accumulated": before + delta}

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        factor = seen.mean_norm / seen.state_norm if seen.state_norm > 0 else 1.0
        return state["accumulated"] * factor

    def passes(self) -> tuple[Norms, ...]:
        return (Norms(self),)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        return moved(tile, self.settle(self.fold(tile), tile.at, known.of(Norms)), 1.0).to(tile.x.dtype)

    def fold(self, tile: Tile) -> State:
        """The state after all experts; low-rank ones are folded in their core space."""
        if tile.factors is None or not self.projects(tile.at):
            return folded(self, tile)
        space, at = CoreSpace.of(tile.factors), tile.at._replace(wide=any(part.wide for part in tile.factors))
        state: State = {}
        for core in space.cores:
            state = self.absorb(state, core, at)
        whole = space.left @ state["accumulated"] @ space.right.mT
        return {"accumulated": whole.reshape(tile.require_base().shape)}


class Norms(Pass[Seen]):
    """‖A‖ and the mean ‖τt‖ of the whole model. Every matrix is folded here and once more when it is merged; `twinmerge
    continual` keeps A and folds once."""

    name = "opcm_norms"
    scope = "model"

    def __init__(self, method: Opcm) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        squares = tile.x.double().reshape(len(tile.x), -1).square().sum(1).tolist()
        state = float(self.method.fold(tile)["accumulated"].square().sum())
        return {tile.at.name: (squares, state)}

    def finish(self, total: Partial, known: Known) -> Seen:
        parts = [total[name] for name in sorted(total)]
        experts = [math.sqrt(math.fsum(squares)) for squares in zip(*(squares for squares, _ in parts), strict=True)]
        return Seen(len(experts), math.fsum(experts) / len(experts), math.sqrt(math.fsum(state for _, state in parts)))


def project(
    accumulated: Tensor,
    delta: Tensor,
    alpha: float,
    form: Form = "fixed",
    name: str = "matrix",
    rounded: torch.dtype = torch.float32,
) -> Tensor:
    """P(τ): what an expert may add to A, by one of the three forms.

    Args:
        accumulated: A (m, n).
        delta: τ (m, n).
        alpha: share that is protected.
        name: for errors.
        rounded: what the experts were rounded to, whose eps sets the numerical rank.

    Returns:
        (m, n) in float64; τ itself where A is 0.

    Example:
        >>> a, ones = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.ones(3, 3)
        >>> project(a, ones, 0.5, "released").round(decimals=6).tolist()
        [[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
        >>> project(a, ones, 0.9, "fixed").abs().round(decimals=6).tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    delta = delta.double()
    u, s, vh = gram_svd(accumulated, name, rounded)
    r = protected(s, alpha)
    left, right, top = u[:, :r], vh[:r].mT, vh[:r]
    if form == "paper":
        delta = delta - left @ (left.mT @ delta)
        delta = delta - (delta @ right) @ top
    else:
        delta = delta - left @ (left.mT @ delta @ right) @ top
    if form == "released":
        return delta
    own = ((u[:, r:].mT @ delta) * vh[r:]).sum(1)  # uᵢᵀ τ vᵢ
    return delta - (u[:, r:] * own) @ vh[r:]


def protected(s: Tensor, alpha: float) -> int:
    """r = #{i : (s1 + … + si) / Σ s ≤ alpha}, all of them for alpha = 1.

    Example:
        >>> protected(torch.tensor([3.0, 2.0, 1.0]), 0.8), protected(torch.tensor([3.0, 2.0, 1.0]), 1.0)
        (1, 3)
    """
    if alpha >= 1:
        return len(s)
    return int((s.double().cumsum(0) / s.double().sum() <= alpha).sum()) if len(s) else 0
