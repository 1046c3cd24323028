"""What the methods on singular values share: which tensors are matrices, what happens to the others, and the core space."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.gram_svd import gram_svd
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.svd import SVD
from twinmerge.methods.base import (
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    column,
    moved,
    per_expert,
    scale_field,
    weighted_sum,
    weights_field,
)

Rest = Literal["mean", "sum", "base"]
EMBEDDINGS = "*embed* *wte* *wpe*"
"""Names of tables, which are looked up and not multiplied with."""


def elementwise_field(default: str = "") -> Any:
    return Field(
        default=default, description="matrices to treat like vectors: name patterns with *, separated by spaces"
    )


def is_named(name: str, patterns: str) -> bool:
    """Whether one of the patterns, which spaces separate, fits the whole name.

    Example:
        >>> is_named("h.0.wte.weight", EMBEDDINGS), is_named("h.0.attn.weight", EMBEDDINGS)
        (True, False)
    """
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


class Spectral(Method):
    """Matrices: θ = θ0 + λ f(w1 τ1, …, wT τT), f being the subclass's `combine`; all other tensors by `rest`.

    Convolution kernels are matrices (out, in·kh·kw). `combine` must not depend on the orthonormal bases that its matrices
    are written in, so that low-rank experts are merged in their core space (`maths/core_space.py`), exactly and without
    a decomposition of a matrix of the model's size. Numerical ranks there are float32's too, to which factors are
    rounded as deltas are: experts that share a direction but for rounding must not be given one each.
    """

    grain = "matrix"

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)
    rest: Rest = Field(
        default="mean", description="vectors, and what elementwise names: mean or sum of τt, or the base's own"
    )
    elementwise: str = elementwise_field()
    calibration: float = Field(
        default=0.0, ge=0, description="least projection α of singular value calibration; 0: none"
    )

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if not self.decomposes(tile.at):
            return moved(
                tile, rest_of(self.rest, weighted_sum(self.weights, tile.x, tile.work), len(tile.x)), self.scale
            )
        if tile.factors is not None:
            change = self.merge_factors(tile.factors, tile.at).dense()
            return moved(tile, change.reshape(tile.require_base().shape), 1.0)
        plain = all(w == 1 for w in per_expert(self.weights, len(tile.x)))  # no copy of all experts then
        deltas = (tile.x if plain else column(self.weights, tile.x) * tile.x).flatten(2)
        merged = self.calibrated(self.combine(deltas, tile.at), deltas, tile.at)
        return moved(tile, merged.reshape(tile.x[0].shape), self.scale)

    def merge_factors(self, parts: Sequence[Factors], at: Place) -> Factors:
        """λ f(w1 B1 A1, …) of low-rank experts, as a low-rank product again.

        Args:
            parts: of every expert, rank 0 where it has none; at: of the matrix that they change.
        """
        space = CoreSpace.of(parts, per_expert(self.weights, len(parts)))
        merged = self.calibrated(self.combine(space.cores, at), space.cores, at)
        return space.factors(merged.double() * self.scale)

    @abstractmethod
    def combine(self, deltas: Tensor, at: Place) -> Tensor:
        """f of the weighted deltas.

        Args:
            deltas: (experts, m, n) in float32, or in float64 in the core space, where m and n are the core's; at: of the whole
                matrix, whose shape the formula's sizes are to be taken from.
        """

    def decomposes(self, at: Place) -> bool:
        """Whether the tensor is treated as a matrix."""
        return at.is_matrix and not is_named(at.name, self.elementwise)

    def calibrated(self, merged: Tensor, deltas: Tensor, at: Place) -> Tensor:
        """`calibrate`, where it is asked for."""
        if not self.calibration:
            return merged
        return calibrate(self.directions(merged, deltas, at), deltas, self.calibration).to(merged.dtype)

    def directions(self, merged: Tensor, deltas: Tensor, at: Place) -> SVD:
        """The singular value decomposition of the merged matrix that calibration works on."""
        return gram_svd(merged, at.name, torch.float32)


def rest_of(rest: Rest, total: Tensor, experts: int) -> Tensor:
    """What is done to tensors that are not decomposed, from the sum of their deltas."""
    if rest == "base":
        return torch.zeros_like(total)
    return total / experts if rest == "mean" else total


def total_of(deltas: Tensor) -> Tensor:
    """Σt of the stack (experts, m, n), summed in float64 one expert after the other, in the stack's dtype."""
    return weighted_sum(1.0, deltas, torch.float64).to(deltas.dtype)


def short_side(at: Place) -> int:
    """min(m, n) of the matrix."""
    return min(at.shape[0], math.prod(at.shape[1:]))


def calibrate(svd: SVD, deltas: Tensor, least: float) -> Tensor:
    """Singular value calibration: directions that several experts share are counted once, not once for each.

    With M = U diag(s) Vᵀ, direction r answers u_rᵀ M = s_r v_rᵀ; of it p_rt = ⟨u_rᵀ M, u_rᵀ τt⟩ / ‖u_rᵀ τt‖² is how many times
    expert t's own answer is in it, and

        s_r ← s_r · T / Σt max(α, p_rt).

    Args:
        svd: U (m, k), s (k,), Vᵀ (k, n) of M; deltas: τt (experts, m, n); least: α > 0, which also bounds what is made larger.

    Returns:
        (m, n) in float64, of the same singular vectors; an expert that has no part in a direction, but for rounding, counts as p = 0.

    Source: Li et al. 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", ICML, arXiv 2602.05536.

    Example:
        >>> same = torch.diag(torch.tensor([2.0, 1.0]))
        >>> calibrate(gram_svd(2 * same), torch.stack([same, same]), 0.1).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    u, s, vh = svd
    answer = s[:, None] * vh
    total = torch.zeros_like(s)
    for delta in deltas:
        own = u.mT @ delta.double()
        norm = own.square().sum(1)
        rounding = torch.finfo(torch.float32).eps * max(delta.shape) * delta.double().norm()
        part = norm > rounding.square()  # divided by less, p would be any number
        total += torch.where(part, (answer * own).sum(1) / torch.where(part, norm, 1), 0).clamp_min(least)
    return (u * (s * len(deltas) / total)) @ vh
