"""Singular value calibration of the sum of the task vectors."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.spectral import Spectral, Weights, total_of


class Svc(Spectral):
    """Matrices: θ = θ0 + λ U diag(s') Vᵀ, Σt wt τt with its singular values calibrated; all other tensors: mean.

    Task arithmetic in which directions that several experts share count once. `calibration` is α, the least number of
    times that an expert is taken to be in a direction. The other methods on singular values take the same parameter.

    Source: Li et al. 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", ICML, arXiv
    2602.05536; `twinmerge.methods.kit.spectral.calibrate` has the formula.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Known, Tile
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 1.0]))] * 2)
        >>> Svc().apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2., 0.],
                [0., 1.]])
    """

    sided = True
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Li et al. 2026, ICML, arXiv 2602.05536"
    group = "spectral"
    cost = "SVD of the sum"
    strong = "directions that experts share"

    calibration: float = Field(default=0.1, gt=0, description="α, the least projection of an expert on a direction")

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        return total_of(deltas, weights)
