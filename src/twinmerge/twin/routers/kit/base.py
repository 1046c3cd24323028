"""What every router is: features -> one logit per expert, a temperature, and the null expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.kit.novelty import Novelty


class Router(nn.Module, ABC):
    """Features (rows, width) -> logits (rows, experts); `temperature` turns them into weights."""

    kind: ClassVar[str]
    needs_inputs: ClassVar[bool] = True
    """False for kinds that are made of the experts; inputs then only calibrate them."""
    reads: ClassVar[str] = "states"
    """"states": means of the shared model's hidden states; "answers": how unsure each expert's own answer is."""
    spreads: ClassVar[bool] = False
    """True for kinds that read standard deviations of the states beside their means."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(1.0))
        self.novelty: Novelty | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """To another device, but never to another dtype: logits are computed in float32."""
        super()._apply(lambda t: fn(t).to(t.dtype), recurse)  # type: ignore[no-untyped-call]
        return self

    @classmethod
    @abstractmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> Router:
        """Fit on features (rows, width) and the number of the expert that each row belongs to (rows,)."""

    @classmethod
    @abstractmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
        """One whose tensors are yet to be loaded, of the sizes that a saved router's header and tensors tell."""

    def header(self) -> dict[str, Any]:
        """What `blank` needs beside the tensors."""
        return {}

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(experts, width): between how many it chooses, and how many features it reads."""

    @abstractmethod
    def _logits(self, features: Tensor) -> Tensor:
        """(rows, experts) of features in float32."""

    def logits(self, features: Tensor) -> Tensor:
        """(rows, experts), before the temperature.

        Errors:
            TwinmergeError: features of another width than the router reads.
        """
        if features.shape[-1:] != self.shape[1:]:
            found = features.shape[-1] if features.dim() else 0
            raise TwinmergeError(
                f"The router reads {self.shape[1]} features of each input, got {found}. Fit it again on this model and these layers."
            )
        return self._logits(features.float())

    def weights(self, features: Tensor, experts_per_row: int | None = 1) -> Tensor:
        """Mixtures (rows, experts), each ≥ 0 with sum 1: softmax(logits / temperature), the `experts_per_row` largest, renormalised."""
        return top_weights(torch.softmax(self.logits(features) / self.temperature, -1), experts_per_row)

    def far(self, features: Tensor) -> Tensor:
        """(rows,): True for rows that are nobody's, which the shared model answers alone."""
        if self.novelty is None:
            return torch.zeros(len(features), dtype=torch.bool, device=features.device)
        return self.novelty.far(features)


def top_weights(weights: Tensor, experts_per_row: int | None) -> Tensor:
    """Keep the k largest of each row (the first among equals) and divide by their sum; None or all keeps every one.

    Errors:
        TwinmergeError: experts_per_row below 1.

    Example:
        >>> top_weights(torch.tensor([[0.5, 0.3, 0.2]]), 2)
        tensor([[0.6250, 0.3750, 0.0000]])
    """
    if experts_per_row is None or experts_per_row >= weights.shape[-1]:
        return weights
    if experts_per_row < 1:
        raise TwinmergeError(
            f"experts_per_row={experts_per_row} is out of range. Give at least 1, or none for all experts."
        )
    chosen = torch.sort(weights, dim=-1, descending=True, stable=True).indices[..., :experts_per_row]
    kept = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
    return kept / kept.sum(-1, keepdim=True)
