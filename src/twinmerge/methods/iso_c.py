"""Iso-C: the sum of the task vectors with a flat spectrum."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import coefficients, gram_svd, with_values
from twinmerge.maths.svd import SVD
from twinmerge.methods.kit.base import Known, Partial, Place
from twinmerge.methods.kit.fold import Seen, State, SumFold
from twinmerge.methods.kit.spectral import Spectral, Weights, share_of, short_side, total_of
from twinmerge.methods.kit.tall import Coefficients, gram_of

Over = Literal["size", "rank"]


class IsoC(Spectral, SumFold):
    """Matrices: θ = θ0 + λ s̄ U Vᵀ of Σt wt τt = U diag(s) Vᵀ; all other tensors: θ = θ0 + λ mean(wt τt).

    s̄ is the mean of the singular values: over min(m, n) as in the paper (`mean_over` size), or over those that are
    not 0 (rank), which low-rank experts may want. U Vᵀ has the numerical rank of the sum, so nothing depends on the
    basis that LAPACK picks for a null space. λ = 1 suits few experts; choose it on validation rows.

    Source: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ICML, arXiv 2502.04959.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Tile
        >>> deltas = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> IsoC().apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2., 0.],
                [0., 2.]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Marczak et al. 2025, ICML, arXiv 2502.04959"
    group = "spectral"
    cost = "SVD of the sum"
    strong = "vision experts, also in turn"

    mean_over: Over = Field(default="size", description="what the singular values are averaged over")

    def passes(self) -> tuple[Flat, ...]:
        return () if self.calibration else (Flat(self, self.mean_over),)

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        return isotropic(total_of(deltas, weights), self.mean_over, at)

    def directions(self, merged: Tensor, deltas: Tensor, weights: Weights, at: Place) -> SVD:
        """Those of the sum: equal singular values leave the merged matrix's own to chance."""
        return flattened(total_of(deltas, weights), self.mean_over, at)

    def settles_whole(self, at: Place) -> bool:
        return self.decomposes(at)

    def settle(self, state: State, at: Place, seen: Seen) -> Tensor:
        total = state["sum"]
        if not self.decomposes(at):
            return total * (self.scale * share_of(self.rest, seen.experts))
        if at.stack:
            parts = zip(total, at.parts, strict=True)
            return torch.stack([self.settle({"sum": one}, part, seen) for one, part in parts])
        return isotropic(total.flatten(1).to(at.rounded), self.mean_over, at).double().reshape(total.shape) * self.scale


class Flat(Coefficients):
    """s̄ U Vᵀ = (Σt wt τt) V diag(s̄/s) Vᵀ, and V diag(s²) Vᵀ is the sum's Gram matrix: the same coefficients for
    every expert."""

    def __init__(self, method: Spectral, mean_over: Over) -> None:
        super().__init__(method)
        self.mean_over = mean_over

    def sums(self, deltas: Tensor, known: Known) -> Partial:
        return gram_of(total_of(deltas, self.weights(len(deltas))).double())

    def finish(self, total: Partial, known: Known) -> Tensor:
        n = len(total["gram"])
        return coefficients(total["gram"], int(total["rows"]), partial(flat, mean_over=self.mean_over, short=n))


def isotropic(total: Tensor, mean_over: Over, at: Place) -> Tensor:
    """s̄ U Vᵀ of the sum (m, n), in its dtype; zero for a zero matrix.

    Example:
        >>> import torch
        >>> isotropic(torch.diag(torch.tensor([4.0, 0.0])), "size", Place("w", (2, 2))).tolist()
        [[2.0, 0.0], [0.0, 0.0]]
    """
    values = partial(flat, mean_over=mean_over, short=short_side(at))
    return with_values(total, values, at.name, at.rounded).to(total.dtype)


def flattened(total: Tensor, mean_over: Over, at: Place) -> SVD:
    """The singular vectors of the sum, and s̄ for each of them."""
    u, s, vh = gram_svd(total, at.name, at.rounded)
    return u, flat(s, mean_over, short_side(at)), vh


def flat(s: Tensor, mean_over: Over, short: int) -> Tensor:
    """s̄ for each of the singular values.

    Args:
        s: those that are not 0.
        short: min(m, n) of the whole matrix.
    """
    return (s.sum() / max(1, short if mean_over == "size" else len(s))).expand(len(s))
