"""The router that asks every expert: the surest one answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.twin.routers.kit.base import Router

UNFITTED = 0.05  # temperature, as entropies are shares of the highest one


class EntropyRouter(Router):
    """logit_k = −H_k, how unsure expert k's own answer is; only the temperature is fitted, and no data is needed.

    H_k: of classifiers the entropy of the answer, divided by the logarithm of its number of labels; of language
    models the mean negative log-likelihood of the prompt's own tokens, in nats. Every expert answers every input: K
    passes for one.

    Source: Oh et al. 2025 (DaWin, ICLR), which mixes by the entropy of each expert's prediction.

    Example:
        >>> router = EntropyRouter().of_experts(["a", "b"], (), lambda layer: [])
        >>> router.weights(torch.tensor([[0.9, 0.2]]))
        tensor([[0., 1.]])
    """

    needs_inputs = False
    reads = "answers"

    _experts: int = 0

    def of_experts(
        self, experts: Sequence[str], layers: Sequence[int], directions: Callable[[int], list[Tensor]]
    ) -> Self:
        self._experts = len(experts)
        self.temperature.fill_(UNFITTED)
        return self

    def restore(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        self._experts = int(header["experts"])
        return self

    def read_answer(self, logits: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
        return unsureness(logits, ids, mask)

    def header(self) -> dict[str, Any]:
        return {"experts": self._experts}

    @property
    def shape(self) -> tuple[int, int]:
        return self._experts, self._experts

    def _logits(self, features: Tensor) -> Tensor:
        return -features


def unsureness(logits: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """H of one expert's answers.

    Args:
        logits: (rows, labels), −∞ where a row has fewer labels; or (rows, positions, words) of a language model.
        ids: (rows, positions), its words.
        mask: the same, 0 where they are padding.

    Returns:
        (rows,).

    Raises:
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
    raise UsageError(
        "The entropy router reads the answers of classifiers of two labels or more, or of language models with a "
        "prompt of two tokens "
        "or more. Choose another router."
    )
