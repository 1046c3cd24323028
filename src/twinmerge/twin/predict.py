"""Texts in, label names out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from twinmerge.arguments import at_least_one
from twinmerge.errors import UsageError
from twinmerge.results import Result, Rows, plain, some
from twinmerge.tasks.images import named
from twinmerge.twin.call import call
from twinmerge.twin.core import Core
from twinmerge.twin.routing import CHOICE, check_choice


@dataclass(frozen=True, repr=False)
class Prediction(Result):
    """The answer to one text.

    Attributes:
        label: its name.
        expert: whose head answered.
        confidence: softmax of the label.
        mixture: expert -> weight; all 0 where the text is far from every expert's inputs and the shared model
            answered alone.
    """

    label: str
    expert: str
    confidence: float
    mixture: dict[str, float]

    def _summary(self) -> str:
        mixed = ", ".join(f"{name} {weight:.2f}" for name, weight in self.mixture.items() if weight >= 0.005)
        return f"{self.label} by {self.expert}, {100 * self.confidence:.0f} %, {mixed or 'shared model alone'}"


class Predictions(Rows[Prediction]):
    """A prediction for each text.

    Attributes:
        texts: that were answered.
    """

    def __init__(self, found: Iterable[Prediction] = (), texts: Sequence[Any] = ()) -> None:
        super().__init__(found)
        self.texts = list(texts)

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data: what `twinmerge twin predict --json` prints."""
        return [{"text": plain(t), **p.to_dict()} for t, p in zip(self.texts, self, strict=True)]

    def _summary(self) -> str:
        return f"{len(self)} texts: {some(p.label for p in self)}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        experts = list(self[0].mixture) if self else []
        rows = [
            [str(t), p.label, p.expert, p.confidence, *p.mixture.values()]
            for t, p in zip(self.texts, self, strict=True)
        ]
        return ["text", "label", "expert", "confidence", *experts], rows


def predict(core: Core, texts: Sequence[Any], batch_rows: int, choice: Mapping[str, Any]) -> Predictions:
    """The answer to each text (see `Twin.predict`); what `choice` holds for each row is cut along with the texts."""
    at_least_one("batch_rows", batch_rows)
    check_choice(choice, (*CHOICE, "head", "strategy", "oracle_biases"))
    if core.own_module:
        raise UsageError(f"{type(core.model.body).__name__} has no names of labels. Call the twin itself.")
    if not len(texts):
        return Predictions()
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
    return Predictions(found, [named(row) for row in texts])
