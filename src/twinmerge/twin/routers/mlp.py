"""The paper's router, a small network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router


class MlpRouter(Router):
    """The paper's router: Linear(d, 2d), Linear(2d, 2d), Linear(2d, T), with BatchNorm, LeakyReLU and dropout between.

    Adam, cross-entropy on the expert's number.

    Source: Lu et al. 2024, arXiv 2406.15479, section 3.3 and appendix; sizes from the authors' code.

    Example:
        >>> sum(p.numel() for p in MlpRouter().sized(768, 8).parameters())
        3560456
    """

    epochs: Annotated[int, Field(ge=1, description="How often it sees every row.")] = 10
    batch: Annotated[int, Field(ge=2, description="Rows of a step.")] = 64
    rate: Annotated[float, Field(gt=0, description="Of Adam.")] = 5e-4

    def sized(self, width: int, experts: int) -> Self:
        """The network of so many features and experts."""
        blocks: list[nn.Module] = []
        for size in (width, 2 * width):
            blocks += [nn.Linear(size, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(0.5)]
        self.net = nn.Sequential(*blocks, nn.Linear(2 * width, experts))
        self._shape = experts, width
        return self.eval()

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            self.sized(features.shape[1], len(experts)).train()
            optimizer = torch.optim.Adam(self.parameters(), lr=self.rate)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(features)).split(self.batch):
                    if len(rows) < 2:  # BatchNorm has no spread of one row
                        continue
                    optimizer.zero_grad()
                    F.cross_entropy(self.net(features[rows].float()), owners[rows]).backward()
                    optimizer.step()
        return self.eval().requires_grad_(False)

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return self.sized(header["width"], header["experts"])

    def header(self) -> dict[str, Any]:
        return {"width": self._shape[1], "experts": self._shape[0]}

    def default_layers(self, count: int, deepest: int | None = None) -> tuple[int, ...]:
        return (count,) if deepest is None else super().default_layers(count, deepest)

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.net(features)
        return logits
