"""The router that needs no data: an expert changes matrices along the directions that its own inputs have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from twinmerge.errors import UsageError
from twinmerge.twin.routers.kit.base import Router

UNFITTED = 0.05  # temperature of residuals where no inputs are there to fit it


class ProjectionRouter(Router):
    """Data-free: the expert whose own input directions explain an input best.

    logit_k = −‖z − Vk Vkᵀ z‖ / ‖z‖, Vk an orthonormal basis of the right singular vectors of expert k's exclusive
    part in the matrices that read z. An expert changes a matrix along the directions that its own inputs have.

    Source: the projection residual of MASS (ICLR 2026).

    Example:
        >>> router = ProjectionRouter().from_bases([torch.eye(4)[:, :2], torch.eye(4)[:, 2:]])
        >>> router.logits(torch.tensor([[1.0, 1.0, 0.0, 0.1]])).argmax().item()
        0
    """

    needs_inputs = False

    energy: Annotated[float, Field(gt=0, le=1, description="Share of each expert's directions that is kept.")] = 0.95
    bases: Tensor

    def from_bases(self, vectors: Sequence[Tensor]) -> Self:
        """Of each expert's directions (width, any number), as long as they matter: those that hold most of the
        energy."""
        found = []
        for v in vectors:
            u, s, _ = torch.linalg.svd(v.double(), full_matrices=False)
            kept = s.square().cumsum(0) - s.square() < self.energy * s.square().sum()
            found.append(u[:, kept].float())
        most = max(v.shape[1] for v in found)
        self.register_buffer("bases", torch.stack([F.pad(v, (0, most - v.shape[1])) for v in found]))
        self.temperature.fill_(UNFITTED)
        return self

    def of_experts(
        self, experts: Sequence[str], layers: Sequence[int], directions: Callable[[int], list[Tensor]]
    ) -> Self:
        if len(layers) != 1:
            raise UsageError("The projection router reads one layer. Give one, or leave layers out.")
        return self.from_bases(directions(layers[0]))

    def default_layers(self, count: int, deepest: int | None = None) -> tuple[int, ...]:
        """The input of a layer at three quarters; none beyond the deepest."""
        return (min(count - 1, round(0.75 * count)) if deepest is None else deepest,)

    @property
    def shape(self) -> tuple[int, int]:
        return self.bases.shape[0], self.bases.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        z = F.normalize(features, dim=-1)
        explained = torch.einsum("nd,kdr->nkr", z, self.bases).square().sum(-1)
        return -(1 - explained).clamp(min=0).sqrt()
