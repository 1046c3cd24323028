"""The router that asks every expert: the surest one answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.kit.base import Router

UNFITTED = 0.05  # temperature, as entropies are shares of the highest one


class EntropyRouter(Router):
    """logit_k = −H_k, how unsure expert k's own answer is; nothing but the temperature is fitted, and no data is needed.

    H_k: of classifiers the entropy of the answer, divided by the logarithm of its number of labels; of language models the
    mean negative log-likelihood of the prompt's own tokens, in nats. Every expert answers every input: K passes for one.

    Source: Oh et al. 2025 (DaWin, ICLR), which mixes by the entropy of each expert's prediction.

    Example:
        >>> EntropyRouter(2).weights(torch.tensor([[0.9, 0.2]]))
        tensor([[0., 1.]])
    """

    kind = "entropy"
    needs_inputs = False
    reads = "answers"

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.temperature.fill_(UNFITTED)

    @classmethod
    def fit(cls, features: Tensor, owners: Tensor, experts: Sequence[str], seed: int = 0) -> EntropyRouter:
        return cls(len(experts))

    @classmethod
    def blank(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> EntropyRouter:
        return cls(int(header["experts"]))

    def header(self) -> dict[str, Any]:
        return {"experts": self.experts}

    @property
    def shape(self) -> tuple[int, int]:
        return self.experts, self.experts

    def _logits(self, features: Tensor) -> Tensor:
        return -features


def unsureness(logits: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """H of one expert's answers.

    Args:
        logits: (rows, labels), −∞ where a row has fewer labels; or (rows, positions, words) of a language model.
        ids: (rows, positions), its words; mask: the same, 0 where they are padding.

    Returns:
        (rows,).

    Errors:
        TwinmergeError: answers of one label, or of a model that is neither.

    Example:
        >>> unsureness(torch.tensor([[0.0, 0.0], [9.0, -9.0]])).round(decimals=3).tolist()
        [1.0, 0.0]
    """
    if logits.dim() == 2 and logits.shape[1] > 1:
        logs = torch.log_softmax(logits.float(), 1)
        labels = logits.isfinite().sum(1)
        entropy = -torch.where(logs.isfinite(), logs.exp() * logs, 0.0).sum(1)
        return entropy / labels.clamp(min=2).log()
    if logits.dim() == 3 and ids is not None and logits.shape[:2] == ids.shape and ids.shape[1] > 1:
        logs = torch.log_softmax(logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0]
        own = torch.ones_like(logs) if mask is None else mask[:, 1:].to(logs) * mask[:, :-1].to(logs)
        return -(logs * own).sum(1) / own.sum(1).clamp(min=1)
    raise TwinmergeError(
        "The entropy router reads the answers of classifiers of two labels or more, or of language models with a prompt of two tokens "
        "or more. Choose another router."
    )
