"""The null expert: inputs that are far from what every expert was tuned on get the shared model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from twinmerge.twin.routers.kit.aggregates import Statistics

KNOWN = 0.995  # of an expert's own held-out rows, that the null expert must leave alone
ENOUGH = 50  # held-out rows of an expert; such a quantile cannot be told from fewer


class Novelty(nn.Module):
    """How far a row is from the nearest expert: min over k of (z − μk)ᵀ P (z − μk), in the last layer that the router
    reads.

    P is the inverse of the shrunk covariance inside the experts, kept as its Cholesky factor in 16 bits; an expert's
    limit is the 99.5 % quantile of its own held-out rows, infinite where there were fewer than 50.

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
        self.scale: Tensor
        self.means: Tensor
        self.limits: Tensor
        self.usual = torch.ones(
            experts
        )  # the mean distance of an expert's group; only while the statistics are at hand
        self.register_buffer("root", torch.zeros(width * (width + 1) // 2, dtype=torch.float16))
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("means", torch.zeros(experts, width))
        self.register_buffer("limits", torch.full((experts,), torch.inf))

    @classmethod
    def of(cls, statistics: Statistics, width: int) -> Novelty:
        """Of the last `width` features; limits are to be set, or taken from the statistics."""
        inverse = torch.linalg.inv(statistics.shrunk_covariance(width))
        root = torch.linalg.cholesky(inverse)
        found = cls(len(statistics.experts), width)
        at = torch.tril_indices(width, width)
        found.scale = root.abs().max().float()  # 16 bits hold numbers up to 65504
        found.root = (root / root.abs().max())[at[0], at[1]].half()
        found.means = torch.stack([mean[-width:].float() for mean in statistics.means.values()])
        own = [statistics.own_covariance(e)[-width:, -width:] for e in statistics.experts]
        found.usual = torch.stack([(inverse * covariance).sum() for covariance in own]).float()
        found.limits = found.usual * torch.tensor([statistics.limits.get(e, math.inf) for e in statistics.experts])
        return found

    def distances(self, features: Tensor) -> Tensor:
        """(rows, experts)."""
        at = torch.tril_indices(self.width, self.width, device=self.root.device)
        root = self.means.new_zeros(self.width, self.width)
        root[at[0], at[1]] = self.scale * self.root.float()
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
    """Expert -> its limit over the mean distance of its group, of those that have one: what stays when others come or
    go."""
    found = (novelty.limits / novelty.usual).tolist()
    return {e: v for e, v in zip(experts, found, strict=True) if math.isfinite(v)}
