"""What the Gaussian and the logistic router share: logits that are linear in the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.routers.kit.base import Router


class LinearRouter(Router):
    """logits = W z + b, weight (experts, width) and bias (experts,)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    @classmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        return cls(torch.zeros_like(tensors["weight"]), torch.zeros_like(tensors["bias"]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)
