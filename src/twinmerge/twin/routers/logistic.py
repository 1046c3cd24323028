"""The discriminative linear router: logistic regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.routers.kit.linear import LinearRouter


class LogisticRouter(LinearRouter):
    """Multinomial logistic regression on means and spreads of the states, standardised; every expert weighs the same.

    min over W, b of the mean over experts of the mean −log softmax(W z + b) of their rows, plus (ridge / 2) ‖W‖². It
    tells inputs apart better than the Gaussian where features are far from Gaussian, as those of the first layers
    are; but it keeps no statistics, so that experts cannot come and go without a new fit.

    Source: Cox 1966; Liu and Nocedal 1989 for LBFGS.

    Example:
        >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
        >>> LogisticRouter().fit(z, torch.tensor([0, 0, 1, 1]), ["a", "b"]).weights(z)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 1.]])
    """

    spreads = True

    ridge: Annotated[
        float, Field(ge=0, description="Of standardised features; chosen on validation rows of text8.")
    ] = 1e-2
    steps: Annotated[int, Field(ge=1, description="Of LBFGS, at most.")] = 150

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        z = features.float()
        center, spread = z.mean(0), z.std(0).clamp(min=1e-6)
        z = (z - center) / spread
        share = 1 / torch.bincount(owners, minlength=len(experts)).clamp(min=1)[owners] / len(experts)
        weight = torch.zeros(len(experts), z.shape[1], requires_grad=True)
        bias = torch.zeros(len(experts), requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=self.steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            each = F.cross_entropy(F.linear(z, weight, bias), owners, reduction="none")
            found = (share * each).sum() + self.ridge / 2 * weight.square().sum()
            found.backward()
            return found

        with torch.enable_grad():
            optimizer.step(loss)
        scaled = weight.detach() / spread
        return self.of(scaled, bias.detach() - scaled @ center)
