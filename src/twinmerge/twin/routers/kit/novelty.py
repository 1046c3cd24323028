"""The null expert: inputs that are far from what every expert was tuned on get the shared model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from twinmerge.errors import UsageError
from twinmerge.twin.routers.kit.aggregates import REFUSE, Statistics


class Novelty(nn.Module):
    """How far a row is from the nearest expert: min over k of (z − μk)ᵀ P (z − μk), in the last layer that the router
    reads.

    P is the inverse of the shrunk covariance inside the experts, kept as its Cholesky factor in 16 bits. A row is
    nobody's where this distance is beyond the limit of the expert that it is nearest to: the `limit_of` the distances
    of the held-out rows that are nearest to that expert. So of rows like those, at most the share `refuse` is refused
    in expectation, and of those nearest to any one expert too.

    Source: the Mahalanobis score of Lee et al. 2018, arXiv 1807.03888, equation 2, with one layer; limits by split
    conformal prediction, group by group: Vovk, Gammerman and Shafer 2005, "Algorithmic learning in a random world",
    section 4.5 (Mondrian).

    Example:
        >>> z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([[4.0, 0.0]])
        >>> found = Novelty.of(Statistics.of(z[:300], torch.zeros(300, dtype=torch.int64), ["a"]), 2)
        >>> found.set_limits(z[300:])
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

    def set_limits(self, features: Tensor, refuse: float = REFUSE) -> None:
        """Limits by rows (rows, width) of all experts that nothing was made from.

        Args:
            features: of those rows.
            refuse: the share of such rows that may be refused.
        """
        nearest, expert = self.distances(features).min(1)
        for k in range(len(self.limits)):
            self.limits[k] = limit_of(nearest[expert == k], refuse)

    def p_values(self, features: Tensor) -> Tensor:
        """(rows,): of each row, the least `refuse` that would refuse it, had the limits been set by the others.

        That is the share of the rows nearest to the same expert that are as far away, itself among them.
        """
        nearest, expert = self.distances(features).min(1)
        found = torch.ones(len(features), dtype=torch.float64)
        for k in expert.unique().tolist():
            own = nearest[expert == k].contiguous()
            nearer = torch.searchsorted(own.sort().values, own)  # how many are nearer than each
            found[expert == k] = (len(own) - nearer).double() / len(own)
        return found

    def far(self, features: Tensor) -> Tensor:
        """(rows,): True for a row beyond the limit of the expert that it is nearest to."""
        nearest, expert = self.distances(features).min(1)
        return nearest > self.limits[expert]


def limit_of(distances: Tensor, refuse: float) -> float:
    """The distance beyond which at most the share `refuse` of rows lies, if they are like the n rows that are given.

    It is the ⌈(n + 1)(1 − refuse)⌉-th smallest of the n distances, infinite where that is more than n. A new row is as
    likely to take any of the n + 1 places among them, so it is beyond the limit with probability at most `refuse`.

    Args:
        distances: (n,), of rows that nothing was made from.
        refuse: the share, above 0 and below 1.

    Source: Lei et al. 2018, "Distribution-free predictive inference for regression", algorithm 2.

    Example:
        >>> nine = torch.arange(1.0, 10.0)
        >>> limit_of(nine, 0.2), limit_of(nine, 0.1), limit_of(nine, 0.05)  # the 8th, the 9th, and there is no 10th
        (8.0, 9.0, inf)
    """
    place = math.ceil((len(distances) + 1) * (1 - _exact(refuse)))
    return math.inf if place > len(distances) else float(distances.sort().values[place - 1])


def rows_for(refuse: float) -> int:
    """How many held-out rows of an expert a finite limit takes: the least n with (n + 1)(1 − refuse) ≤ n.

    Example:
        >>> rows_for(0.02), rows_for(0.05), rows_for(0.005)
        (49, 19, 199)
    """
    return math.ceil((1 - _exact(refuse)) / _exact(refuse))


def check_refuse(refuse: float) -> float:
    """The share of known rows that may be refused.

    Raises:
        UsageError: none from 0 on and below 1.
    """
    if not 0 <= refuse < 1:
        raise UsageError(
            f"refuse is {refuse}: the share of known inputs that may be refused. Give a number from 0 (never) to below "
            "1, such as 0.02."
        )
    return float(refuse)


def _exact(share: float) -> Fraction:
    """A share as it is written: 0.02 is 2 of 100, which no binary number is."""
    return Fraction(repr(float(share)))


def limits_of(novelty: Novelty, experts: Sequence[str]) -> dict[str, float]:
    """Expert -> its limit over the mean distance of its group, of those that have one: what stays when others come or
    go."""
    found = (novelty.limits / novelty.usual).tolist()
    return {e: v for e, v in zip(experts, found, strict=True) if math.isfinite(v)}
