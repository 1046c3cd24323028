"""Texts in, label names out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from twinmerge.arguments import at_least_one
from twinmerge.errors import UsageError
from twinmerge.twin.call import call
from twinmerge.twin.core import Core
from twinmerge.twin.routing import CHOICE, check_choice


@dataclass(frozen=True)
class Prediction:
    """label: name; expert: whose head answered; confidence: softmax of the label; mixture: expert -> weight, all 0 where the
    text is far from every expert's inputs and the shared model answered alone."""

    label: str
    expert: str
    confidence: float
    mixture: dict[str, float]


def predict(core: Core, texts: Sequence[Any], batch_rows: int, choice: Mapping[str, Any]) -> list[Prediction]:
    """The answer to each text (see `Twin.predict`); what `choice` holds for each row is cut along with the texts."""
    at_least_one("batch_rows", batch_rows)
    check_choice(choice, (*CHOICE, "head", "strategy", "oracle_biases"))
    if not len(texts):
        return []
    found: list[Prediction] = []
    for start in range(0, len(texts), batch_rows):
        chunk = list(texts[start : start + batch_rows])
        rows: dict[str, Any] = {
            k: v[start : start + batch_rows]
            if isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.dim() > 1)
            else v
            for k, v in choice.items()
        }
        out = call(core, **{**core.encode(chunk), **rows})
        if out.logits is None or out.logits.dim() != 2:
            raise UsageError("This twin has no classifier head. Call the twin itself, or generate().")
        probabilities = out.logits.float().softmax(-1)
        for i, p in enumerate(probabilities):
            head = out.head[i] if out.head else None
            mixture = dict(zip(core.experts, out.mixture[i].tolist(), strict=True))
            label = core.model.labels(head)[int(p.argmax())]
            found.append(Prediction(label, head or str(out.expert[i]), p.max().item(), mixture))
    core.warn_truncated()
    return found
