"""Iso-CTS: common and task-specific directions with a flat spectrum."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.errors import RecipeError
from twinmerge.maths.gram_svd import gram_polar, gram_svd
from twinmerge.maths.svd import SVD
from twinmerge.methods.iso_c import Over, flat
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.spectral import Spectral, Weights, short_side, total_of


class IsoCts(Spectral):
    """Matrices: the leading directions of the sum, beside each expert's leading directions outside of them, with one
    strength for all.

    With d = min(m, n), `sizes` gives k common directions and (d − k)/T for each expert: U_k, V_k of Σt wt τt; of each
    expert the leading triplets of (I − U_k U_kᵀ) wt τt. [experts, common] is made orthonormal on both sides (polar
    factors), and every singular value is the mean of those chosen: over all d as in the paper (`mean_over` size), of
    which those beyond the numerical rank are 0, or over those that are not 0 (rank), as in `iso_c`, which common = 1
    is. Where the chosen are more than one side has dimensions for (experts of low rank that share their rows), they
    are not all orthogonal, and singular values are below that mean. All other tensors: mean.

    Source: Marczak et al. 2025, "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    ICML, arXiv 2502.04959, algorithm 2 and its code.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Known, Tile
        >>> deltas = torch.stack([torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> IsoCts(common=0.0).apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2., 0.],
                [0., 2.]])
    """

    sided = True
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Marczak et al. 2025, ICML, arXiv 2502.04959"
    group = "spectral"
    cost = "SVD per change"
    strong = "many vision experts: 14, 20"

    common: float = Field(
        default=0.8, ge=0, le=1, description="share of the directions that the experts have in common"
    )
    mean_over: Over = Field(default="size", description="what the singular values are averaged over")

    def directions(self, merged: Tensor, deltas: Tensor, weights: Weights, at: Place) -> SVD:
        raise RecipeError(
            "iso_cts leaves all singular values equal, so there are no directions to calibrate. Leave calibration out."
        )

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        return common_and_own(deltas, weights, self.common, self.mean_over, at)


def sizes(common: float, short: int, experts: int) -> tuple[int, int]:
    """How many common directions, and how many of each expert; round() is Python's, which rounds halves to even.

    Example:
        >>> sizes(0.8, 768, 8), sizes(0.8, 768, 14), sizes(0.8, 768, 20), sizes(1.0, 768, 8)
        ((616, 19), (614, 11), (608, 8), (768, 0))
    """
    own = min(round((short - int(short * common)) / experts), short // experts)
    return short - own * experts, own


def common_and_own(deltas: Tensor, weights: Weights, common: float, mean_over: Over, at: Place) -> Tensor:
    """s̄ U⊥ V⊥ᵀ of the chosen directions, (m, n)."""
    k, own = sizes(common, short_side(at), len(deltas))
    u, s, vh = gram_svd(total_of(deltas, weights), at.name, at.rounded)
    u, s, vh = u[:, :k], s[:k], vh[:k]
    left, values, right = [u], [s], [vh.mT]
    for weight, delta in zip(weights, deltas, strict=True) if own else ():
        if weight == 0:
            continue
        outside = delta.double() - u @ (u.mT @ delta.double())
        rounding = torch.finfo(at.rounded).eps * max(deltas.shape[1:]) * delta.double().norm()
        own_u, own_s, own_vh = gram_svd(outside.to(deltas.dtype), at.name, at.rounded)
        keep = min(own, int((own_s > rounding).sum()))  # what is left of an expert inside the common space is rounding
        left.append(own_u[:, :keep] * math.copysign(1, weight))
        values.append(own_s[:keep] * abs(weight))
        right.append(own_vh[:keep].mT)
    chosen = torch.cat(values)
    if not len(chosen):
        return torch.zeros_like(deltas[0])
    strength = flat(chosen, mean_over, short_side(at))[0]
    return (strength * (_orthonormal(left, deltas, at) @ _orthonormal(right, deltas, at).mT)).to(deltas.dtype)


def _orthonormal(parts: list[Tensor], deltas: Tensor, at: Place) -> Tensor:
    return gram_polar(torch.cat(parts, 1).to(deltas.dtype), at.name, at.rounded)
