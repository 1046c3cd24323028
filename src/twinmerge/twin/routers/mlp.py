"""The paper's router, a small network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router


class MlpRouter(Router):
    """The paper's router: Linear(d, 2d), Linear(2d, 2d), Linear(2d, T), with BatchNorm, LeakyReLU and dropout between.

    Adam, learning rate 5e-4, 10 epochs, cross-entropy on the expert's number.

    Source: Lu et al. 2024, arXiv 2406.15479, section 3.3 and appendix; sizes from the authors' code.

    Example:
        >>> sum(p.numel() for p in MlpRouter(768, 8).parameters())
        3560456
    """

    kind = "mlp"
    epochs: ClassVar[int] = 10
    batch: ClassVar[int] = 64

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for size in (width, 2 * width):
            blocks += [nn.Linear(size, 2 * width), nn.BatchNorm1d(2 * width), nn.LeakyReLU(), nn.Dropout(0.5)]
        self.net = nn.Sequential(*blocks, nn.Linear(2 * width, experts))
        self._shape = experts, width
        self.eval()

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> MlpRouter:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            router = cls(features.shape[1], len(experts))
            router.train()
            optimizer = torch.optim.Adam(router.parameters(), lr=5e-4)
            for _ in range(cls.epochs):
                for rows in torch.randperm(len(features)).split(cls.batch):
                    if len(rows) < 2:  # BatchNorm has no spread of one row
                        continue
                    optimizer.zero_grad()
                    F.cross_entropy(router.net(features[rows].float()), owners[rows]).backward()
                    optimizer.step()
        return router.eval().requires_grad_(False)

    @classmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> MlpRouter:
        return cls(header["width"], header["experts"])

    def header(self) -> dict[str, Any]:
        return {"width": self._shape[1], "experts": self._shape[0]}

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.net(features)
        return logits
