"""The router that keeps examples: an input goes where the inputs most like it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router

NEIGHBOURS = 10
BANK = 256  # rows that are kept of each expert
SHARPNESS = 10.0  # of a neighbour's vote, e to the power of so many times its cosine
FLOOR = 1e-6  # votes of an expert that no neighbour is of


class KnnRouter(Router):
    """k nearest neighbours in a bank of examples, by cosine.

    logit_k = log(Σ e^(10 cos(z, zᵢ)) / Σ e^(10 cos) + 10⁻⁶), the upper sum over those of the 10 nearest rows zᵢ that are expert
    k's, the lower over all ten; features are centered and divided by their spread first. At most 256 rows of each expert are
    kept, in 16 bits: unlike the others this router holds features of the inputs that it was fitted on.

    Source: the feature bank of T-Switch (CVPR 2025) for the choice of experts; Cover and Hart 1967.

    Example:
        >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
        >>> KnnRouter.fit(z, torch.tensor([0, 0, 1, 1]), ["a", "b"]).weights(torch.tensor([[0.9, 0.0]]))
        tensor([[0., 1.]])
    """

    kind = "knn"

    def __init__(self, center: Tensor, spread: Tensor, bank: Tensor, owners: Tensor, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.center: Tensor
        self.spread: Tensor
        self.bank: Tensor
        self.owners: Tensor
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        self.register_buffer("bank", bank)
        self.register_buffer("owners", owners)

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> KnnRouter:
        z = features.float()
        means = torch.stack([z[owners == k].mean(0) for k in range(len(experts))])
        center, spread = means.mean(0), z.std(0).clamp(min=1e-6)
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(z), generator=generator)
        kept = torch.cat([shuffled[owners[shuffled] == k][:BANK] for k in range(len(experts))])
        bank = F.normalize((z[kept] - center) / spread, dim=1)
        return cls(center, spread, bank.half(), owners[kept], len(experts))

    @classmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> KnnRouter:
        experts = int(header["experts"])
        if not bool(((tensors["owners"] >= 0) & (tensors["owners"] < experts)).all()):
            raise ValueError("owners")
        center, spread, bank, owners = (torch.zeros_like(tensors[n]) for n in ("center", "spread", "bank", "owners"))
        return cls(center, spread, bank, owners, experts)

    def header(self) -> dict[str, Any]:
        return {"experts": self.experts}

    @property
    def shape(self) -> tuple[int, int]:
        return self.experts, self.bank.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        like = F.normalize((features - self.center) / self.spread, dim=1) @ self.bank.float().T
        nearest, at = like.topk(min(NEIGHBOURS, like.shape[1]), dim=1)
        votes = torch.softmax(SHARPNESS * nearest, 1)
        found = votes.new_zeros(len(votes), self.experts).scatter_add(1, self.owners[at], votes)
        return (found + FLOOR).log()
