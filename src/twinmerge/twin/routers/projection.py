"""The router that needs no data: an expert changes matrices along the directions that its own inputs have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.kit.base import Router

ENERGY = 0.95  # of an expert's directions, kept
UNFITTED = 0.05  # temperature of residuals where no inputs are there to fit it


class ProjectionRouter(Router):
    """Data-free: the expert whose own input directions explain an input best.

    logit_k = −‖z − Vk Vkᵀ z‖ / ‖z‖, Vk an orthonormal basis of the right singular vectors of expert k's exclusive part in the
    matrices that read z. An expert changes a matrix along the directions that its own inputs have.

    Source: the projection residual of MASS (ICLR 2026).

    Example:
        >>> router = ProjectionRouter.from_bases([torch.eye(4)[:, :2], torch.eye(4)[:, 2:]])
        >>> router.logits(torch.tensor([[1.0, 1.0, 0.0, 0.1]])).argmax().item()
        0
    """

    kind = "projection"
    needs_inputs = False

    def __init__(self, bases: Tensor) -> None:
        super().__init__()
        self.bases: Tensor
        self.register_buffer("bases", bases)

    @classmethod
    def from_bases(cls, vectors: Sequence[Tensor]) -> ProjectionRouter:
        """Of each expert's directions (width, any number), as long as they matter: those that hold 95 % of the energy."""
        found = []
        for v in vectors:
            u, s, _ = torch.linalg.svd(v.double(), full_matrices=False)
            kept = s.square().cumsum(0) - s.square() < ENERGY * s.square().sum()
            found.append(u[:, kept].float())
        most = max(v.shape[1] for v in found)
        router = cls(torch.stack([F.pad(v, (0, most - v.shape[1])) for v in found]))
        router.temperature.fill_(UNFITTED)
        return router

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> ProjectionRouter:
        raise TwinmergeError(
            "The projection router is made from the experts, not from inputs: call fit_router of a twin."
        )

    @classmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ProjectionRouter:
        return cls(torch.zeros_like(tensors["bases"]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.bases.shape[0], self.bases.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        z = F.normalize(features, dim=-1)
        explained = torch.einsum("nd,kdr->nkr", z, self.bases).square().sum(-1)
        return -(1 - explained).clamp(min=0).sqrt()
