"""The closed-form router: one Gaussian per expert with a common covariance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from twinmerge.twin.routers.kit.aggregates import Statistics
from twinmerge.twin.routers.kit.calibration import fit_temperature
from twinmerge.twin.routers.kit.linear import LinearRouter
from twinmerge.twin.routers.kit.novelty import Novelty

DRAWN = 2000  # rows of each expert, where a temperature is fitted on drawn ones


class GaussianRouter(LinearRouter):
    """One Gaussian per expert with a common covariance, in closed form (linear discriminant analysis).

    logit_k = μkᵀ P z − ½ μkᵀ P μk, P the inverse of (1 − s) Σ + s diag(Σ), s = 0.05, Σ the covariance inside the
    experts. Equal priors. Coefficients and aggregates are kept, no text and no feature of one.

    Source: Fisher 1936; Friedman 1989 for the shrinkage.

    Example:
        >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
        >>> router = GaussianRouter().fit(z, torch.tensor([0, 0, 1, 1]), ["a", "b"])
        >>> router.weights(z)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 1.]])
    """

    keeps_statistics = True

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        return self._of_statistics(Statistics.of(features, owners, experts))

    def _of_statistics(self, statistics: Statistics) -> Self:
        """The router of the aggregates alone."""
        means = torch.stack([mean.double() for mean in statistics.means.values()])
        shrunk = statistics.shrunk_covariance()
        center = means.mean(0)  # logits do not depend on it; small numbers keep their digits
        weight = torch.linalg.solve(shrunk, (means - center).T).T
        bias = -0.5 * ((means - center) * weight).sum(1) - weight @ center
        self.statistics = statistics
        self.novelty = Novelty.of(statistics, statistics.novel) if statistics.novel else None
        return self.of(weight.float(), bias.float())

    def changed(self, statistics: Statistics) -> Self:
        """The router after experts came or went; its temperature is that of rows drawn from the aggregates, or the
        fitted one where the experts are the first ones again.

        Example:
            >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
            >>> two = Statistics.of(z, torch.tensor([0, 0, 1, 1]), ["a", "b"])
            >>> three = two.with_expert("c", torch.tensor([[0.0, 5.0], [0.1, 5.2]]))
            >>> GaussianRouter().changed(three).logits(torch.tensor([[0.0, 5.1]])).argmax().item()
            2
        """
        router = type(self)(self.kind, **self.options())._of_statistics(statistics)
        if tuple(statistics.experts) == statistics.first:
            temperature = statistics.temperature
        else:
            logits, owners = router._drawn(statistics)
            temperature = fit_temperature(logits, owners)
        router.temperature.fill_(temperature)
        return router

    def _drawn(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Logits of rows drawn around each mean with the common covariance: logits are linear, so they are drawn as
        such."""
        weight, bias = self.weight.double(), self.bias.double()
        values, vectors = torch.linalg.eigh(weight @ statistics.covariance() @ weight.T)
        root = vectors * values.clamp(min=0).sqrt()
        count = len(weight)
        noise = torch.randn(count, DRAWN, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        means = torch.stack([mean.double() for mean in statistics.means.values()])
        logits = (means @ weight.T + bias)[:, None] + noise @ root.T
        return logits.flatten(0, 1), torch.arange(count).repeat_interleave(DRAWN)
