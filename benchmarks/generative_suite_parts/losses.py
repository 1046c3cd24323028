"""What a model or a twin loses on the continuation of each window."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import twinmerge as tm
from generative_suite_parts.data import CONTEXT

Losses: TypeAlias = dict[str, NDArray[np.float64]]
"""Kind -> nats per token of the continuation, (windows,)."""

BATCH = 50


def continuation_losses(answer: Callable[[Tensor], Tensor], rows: Tensor) -> NDArray[np.float64]:
    """Nats per token of each row's continuation; `answer` gives logits (rows, tokens, vocabulary)."""
    found = []
    with torch.inference_mode():
        for part in rows.split(BATCH):
            logits = answer(part)[:, CONTEXT - 1 : -1].double()
            found.append(F.cross_entropy(logits.transpose(1, 2), part[:, CONTEXT:], reduction="none").mean(1))
    return torch.cat(found).numpy()


def model_losses(folder: Path, rows: Mapping[str, Tensor]) -> Losses:
    """The losses of a plain model folder on every kind."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    return {kind: continuation_losses(lambda part: model(input_ids=part).logits, r) for kind, r in rows.items()}


def batch_of(rows: Tensor) -> dict[str, Any]:
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def mixture_of(twin: tm.Twin, setting: str, kind: str, contexts: Tensor) -> Tensor:
    """(rows, experts): the mixture that a setting gives to windows of a kind, by their contexts."""
    if setting == "task given":
        return torch.eye(len(twin.experts))[[twin.experts.index(kind)] * len(contexts)]
    return twin.route(batch_of(contexts), experts_per_row=1 if setting == "routed top-1" else None)


def twin_losses(twin: tm.Twin, setting: str, rows: Mapping[str, Tensor]) -> Losses:
    def answer(kind: str, part: Tensor) -> Tensor:
        mixture = mixture_of(twin, setting, kind, part[:, :CONTEXT])
        logits: Tensor | None = twin(**batch_of(part), mixture=mixture).logits
        assert logits is not None
        return logits

    return {kind: continuation_losses(partial(answer, kind), r) for kind, r in rows.items()}
