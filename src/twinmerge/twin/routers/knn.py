"""The router that keeps examples: an input goes where the inputs most like it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router

FLOOR = 1e-6  # votes of an expert that no neighbour is of


class KnnRouter(Router):
    """k nearest neighbours in a bank of examples, by cosine.

    logit_k = log(Σ e^(10 cos(z, zᵢ)) / Σ e^(10 cos) + 10⁻⁶), the upper sum over those of the 10 nearest rows zᵢ that
    are expert k's, the lower over all ten; features are centered and divided by their spread first. At most 256 rows
    of each expert are kept, in 16 bits: unlike the others this router holds features of the inputs that it was fitted
    on.

    Source: the feature bank of T-Switch (CVPR 2025) for the choice of experts; Cover and Hart 1967.

    Example:
        >>> z = torch.tensor([[-1.0, 0.0], [-1.2, 0.4], [1.0, 0.1], [1.1, -0.3]])
        >>> KnnRouter().fit(z, torch.tensor([0, 0, 1, 1]), ["a", "b"]).weights(torch.tensor([[0.9, 0.0]]))
        tensor([[0., 1.]])
    """

    neighbours: Annotated[int, Field(ge=1, description="How many rows vote.")] = 10
    bank_rows: Annotated[int, Field(ge=1, description="Rows that are kept of each expert, at most.")] = 256
    sharpness: Annotated[
        float, Field(gt=0, description="Of a neighbour's vote, e to the power of so many times its cosine.")
    ] = 10.0
    center: Tensor
    spread: Tensor
    bank: Tensor
    owners: Tensor
    _experts: int = 0

    def fit(self, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Self:
        z = features.float()
        means = torch.stack([z[owners == k].mean(0) for k in range(len(experts))])
        center, spread = means.mean(0), z.std(0).clamp(min=1e-6)
        generator = torch.Generator().manual_seed(seed)
        shuffled = torch.randperm(len(z), generator=generator)
        kept = torch.cat([shuffled[owners[shuffled] == k][: self.bank_rows] for k in range(len(experts))])
        bank = F.normalize((z[kept] - center) / spread, dim=1)
        self._experts = len(experts)
        self.register_buffer("center", center)
        self.register_buffer("spread", spread)
        self.register_buffer("bank", bank.half())
        self.register_buffer("owners", owners[kept])
        return self

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        self._experts = int(header["experts"])
        if not bool(((tensors["owners"] >= 0) & (tensors["owners"] < self._experts)).all()):
            raise ValueError("owners")
        return super().restore(header, tensors)

    def header(self) -> dict[str, Any]:
        return {"experts": self._experts}

    @property
    def shape(self) -> tuple[int, int]:
        return self._experts, self.bank.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        like = F.normalize((features - self.center) / self.spread, dim=1) @ self.bank.float().T
        nearest, at = like.topk(min(self.neighbours, like.shape[1]), dim=1)
        votes = torch.softmax(self.sharpness * nearest, 1)
        found = votes.new_zeros(len(votes), self._experts).scatter_add(1, self.owners[at], votes)
        return (found + FLOOR).log()
