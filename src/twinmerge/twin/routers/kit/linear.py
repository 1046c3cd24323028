"""What the Gaussian and the logistic router share: logits that are linear in the features."""

from __future__ import annotations

from typing import Self

from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router


class LinearRouter(Router):
    """logits = W z + b, weight (experts, width) and bias (experts,)."""

    weight: Tensor
    bias: Tensor

    def of(self, weight: Tensor, bias: Tensor) -> Self:
        """With these coefficients."""
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)
