"""The null expert: inputs that are far from what every expert was tuned on get the shared model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinmerge.twin.statistics import Statistics

KNOWN = 0.995  # of an expert's own held-out rows, that the null expert must leave alone
ENOUGH = 50  # held-out rows of an expert; such a quantile cannot be told from fewer
SHRINKAGE = 0.05


class Novelty(nn.Module):
    """How far a row is from the nearest expert: min over k of (z − μk)ᵀ P (z − μk), in the last layer that the router reads.

    P is the inverse of the shrunk covariance inside the experts, kept as its Cholesky factor in 16 bits; an expert's limit is
    the 99.5 % quantile of its own held-out rows, infinite where there were fewer than 50.

    Source: the Mahalanobis score of Lee et al. 2018, arXiv 1807.03888, equation 2, with one layer.

    Example:
        >>> z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([[4.0, 0.0]])
        >>> found = Novelty.of(Statistics.of(z, torch.zeros(400, dtype=torch.int64), ["a"]), 2)
        >>> found.set_limits(z, torch.zeros(400, dtype=torch.int64))
        >>> found.far(torch.tensor([[4.0, 0.5], [40.0, 0.0]])).tolist()
        [False, True]
    """

    def __init__(self, experts: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.root: Tensor
        self.means: Tensor
        self.limits: Tensor
        self.register_buffer("root", torch.zeros(width * (width + 1) // 2, dtype=torch.float16))
        self.register_buffer("means", torch.zeros(experts, width))
        self.register_buffer("limits", torch.full((experts,), torch.inf))

    @classmethod
    def of(cls, statistics: Statistics, width: int) -> Novelty:
        """Of the last `width` features; limits are to be set, or taken from the statistics."""
        covariance = statistics.covariance()[-width:, -width:]
        spread = covariance.diagonal()
        shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * torch.diag(spread)
        shrunk += (spread.max() * 1e-6 + torch.finfo(torch.float64).tiny) * torch.eye(width).double()
        root = torch.linalg.cholesky(torch.linalg.inv(shrunk))
        found = cls(len(statistics.experts), width)
        at = torch.tril_indices(width, width)
        scale = root.abs().max()  # 16 bits hold numbers up to 65504
        found.root = (root / scale)[at[0], at[1]].half()
        found.means = torch.stack([mean[-width:].float() for mean in statistics.means.values()])
        found.limits = torch.tensor([statistics.limits.get(e, math.inf) for e in statistics.experts])
        return found

    def distances(self, features: Tensor) -> Tensor:
        """(rows, experts), up to one common factor."""
        at = torch.tril_indices(self.width, self.width, device=self.root.device)
        root = self.means.new_zeros(self.width, self.width)
        root[at[0], at[1]] = self.root.float()
        return torch.cdist(features[:, -self.width :].float() @ root, self.means @ root).square()

    def set_limits(self, features: Tensor, owners: Tensor) -> None:
        """Limits by rows (rows, width) that nothing was made from, and the number of the expert of each (rows,)."""
        own = self.distances(features)
        for k in owners.unique().tolist():
            rows = own[owners == k, k]
            self.limits[k] = torch.quantile(rows, KNOWN) if len(rows) >= ENOUGH else torch.inf

    def far(self, features: Tensor) -> Tensor:
        """(rows,): True for a row beyond the limit of the expert that it is nearest to."""
        nearest, expert = self.distances(features).min(1)
        return nearest > self.limits[expert]


def limits_of(novelty: Novelty, experts: Sequence[str]) -> dict[str, float]:
    """Expert -> its limit, of those that have one."""
    return {e: v for e, v in zip(experts, novelty.limits.tolist(), strict=True) if math.isfinite(v)}
