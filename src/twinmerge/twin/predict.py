"""Inputs in; label names or probabilities out."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.arguments import at_least_one
from twinmerge.errors import UsageError
from twinmerge.models.answers import Answers
from twinmerge.models.rows import for_each_row, rows_of_batch
from twinmerge.results import Result, Rows, plain, some
from twinmerge.tasks.columns import inputs_from
from twinmerge.tasks.images import named as named_row
from twinmerge.twin.answer import planned
from twinmerge.twin.call import TwinOutput, call
from twinmerge.twin.core import Core, placed
from twinmerge.twin.reading import check_batch
from twinmerge.twin.routing import CHOICE, check_choice, heads_of_rows


@dataclass(frozen=True, repr=False)
class Prediction(Result):
    """The answer to one input.

    Attributes:
        label: its name.
        expert: whose head answered.
        confidence: softmax of the label.
        mixture: expert -> weight; all 0 where the shared model answered alone.
        routing: expert -> the router's probability, also where the mixture has only the largest; None where the
            mixture or the expert was named.
        refused: whether the router left the input to the shared model, since it is far from every expert's inputs.
    """

    label: str
    expert: str
    confidence: float
    mixture: dict[str, float]
    routing: dict[str, float] | None = None
    refused: bool = False

    @property
    def head(self) -> str:
        """The same as `expert`, by the name that calls take it by."""
        return self.expert

    def _summary(self) -> str:
        mixed = ", ".join(f"{name} {weight:.2f}" for name, weight in self.mixture.items() if weight >= 0.005)
        sure = "" if self.routing is None else f", router {100 * max(self.routing.values()):.0f} %"
        alone = "refused" if self.refused else "shared model alone"
        return f"{self.label} by {self.expert}, {100 * self.confidence:.0f} %, {mixed or alone}{sure}"


class Predictions(Rows[Prediction]):
    """A prediction for each input.

    Attributes:
        texts: the inputs that were answered; the rows' numbers where they came as a batch of tensors.
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
        mixed = [f"mixture {name}" for name in self[0].mixture] if self else []
        routed = [f"router {name}" for name in self[0].routing] if self and self[0].routing is not None else []
        rows = [
            [str(t), p.label, p.expert, p.confidence, p.refused, *p.mixture.values(), *(p.routing or {}).values()]
            for t, p in zip(self.texts, self, strict=True)
        ]
        return ["text", "label", "expert", "confidence", "refused", *mixed, *routed], rows


class _Asked(NamedTuple):
    """Some rows as a batch, what was said of mixtures for them, and the twin's answer."""

    batch: Mapping[str, Any]
    choice: Mapping[str, Any]
    answer: TwinOutput


def _probabilities(logits: Tensor | None, answers: Answers = "one label") -> Tensor:
    """(rows, labels): of each label alone where a row may have several."""
    if logits is None or logits.dim() != 2:
        raise UsageError("This twin has no classifier head. Call the twin itself, or generate().")
    return logits.float().sigmoid() if answers == "several labels" else logits.float().softmax(-1)


def _check_answers(core: Core, heads: Sequence[str | None], allowed: Sequence[Answers]) -> None:
    """Refuse heads whose outputs mean something else than what is asked."""
    for head in heads:
        if head is not None and head not in core.model.head_specs:
            continue  # which is refused by its name later
        if (head is not None or core.labels) and (found := core.model.answers(head)) not in allowed:
            whose = "The twin" if head is None else f"The head {head!r}"
            instead = (
                "Ask predict_proba() for the probability of each"
                if found == "several labels"
                else ("Call the twin itself: the logits of its answer are the number")
            )
            gives = "several labels of one input" if found == "several labels" else "a number and no label"
            others = [str(name) for name in core.model.head_specs if core.model.answers(name) in allowed]
            other = f", or name another head: {', '.join(others)}" if others else ""
            raise UsageError(f"{whose} gives {gives}. {instead}{other}.")


def predict(core: Core, given: Any, batch_size: int, choice: Mapping[str, Any]) -> Predictions:
    """The answer to each input (see `Twin.predict`)."""
    inputs = _inputs(core, given, batch_size, choice)
    named = choice.get("head") or choice.get("expert") or list(core.model.head_specs)
    heads = [named] if isinstance(named, str) else list(named)
    _check_answers(core, heads if core.model.head_specs else [None], ["one label"])
    found: list[Prediction] = []
    for asked in _answers(core, inputs, batch_size, choice):
        out, refused = asked.answer, asked.answer.refused
        routing = (
            None if out.routing is None else [dict(zip(core.experts, row, strict=True)) for row in out.routing.tolist()]
        )
        for i, p in enumerate(_probabilities(asked.answer.logits)):
            head = out.head[i] if out.head else None
            mixture = dict(zip(core.experts, out.mixture[i].tolist(), strict=True))
            soft = None if routing is None else routing[i]
            label = core.model.labels(head)[int(p.argmax())]
            found.append(Prediction(label, head or str(out.expert[i]), p.max().item(), mixture, soft, refused[i]))
    core.warn_truncated()
    if empty := sum(
        isinstance(row, str) and not row.strip() for row in ([] if isinstance(inputs, Mapping) else inputs)
    ):
        warnings.warn(
            f"{empty} of {len(found)} inputs are empty: their answers say nothing. Leave them out.", stacklevel=4
        )
    return Predictions(found, range(len(found)) if isinstance(inputs, Mapping) else [named_row(row) for row in inputs])


def predict_proba(core: Core, given: Any, batch_size: int, choice: Mapping[str, Any]) -> Any:
    """The probabilities of labels (see `Twin.predict_proba`)."""
    inputs = _inputs(core, given, batch_size, choice)
    heads = list(core.model.head_specs)
    named = choice.get("head") or choice.get("expert")
    if named is not None and not isinstance(named, str):
        raise UsageError("predict_proba gives the labels of one head, or those of all. Name one head, or none.")
    wanted = [named] if named is not None and heads else heads
    _check_answers(core, wanted or [None], ["one label", "several labels"])
    found: dict[str | None, list[Tensor]] = {head: [] for head in wanted} if wanted else {None: []}
    for asked in _answers(core, inputs, batch_size, {**choice, "head": wanted[0]} if wanted else choice):
        first = wanted[0] if wanted else None
        found[first].append(_probabilities(asked.answer.logits, core.model.answers(first)))
        size = len(asked.answer.mixture)
        for head in wanted[1:]:  # the same mixtures, and another head
            names = heads_of_rows(core, head, [None] * size)
            batch, way = for_each_row(asked.batch, size), asked.choice.get("strategy")
            logits = planned(core, batch, names, asked.answer.mixture, way)[0].logits
            found[head].append(_probabilities(logits, core.model.answers(head)))
    core.warn_truncated()
    arrays = {head: _stacked(parts, len(core.model.labels(head))) for head, parts in found.items()}
    return arrays if len(wanted) > 1 else next(iter(arrays.values()))


def _stacked(parts: Sequence[Tensor], labels: int) -> np.ndarray[Any, Any]:
    return torch.cat(list(parts)).cpu().numpy() if parts else np.zeros((0, labels), np.float32)


def _inputs(core: Core, given: Any, batch_size: int, choice: Mapping[str, Any]) -> Any:
    """The inputs as a list or a batch, once all else is known to be right."""
    at_least_one("batch_size", batch_size)
    check_choice(choice, (*CHOICE, "head", "strategy", "oracle_biases"))
    if core.own_module:
        raise UsageError(f"{type(core.model.body).__name__} has no names of labels. Call the twin itself.")
    return inputs_from(given)


def _answers(core: Core, inputs: Any, batch_size: int, choice: Mapping[str, Any]) -> Iterator[_Asked]:
    """Answer inputs, batch by batch in their order; what `choice` holds for each row is cut along with them."""
    if isinstance(inputs, Mapping):
        check_batch(inputs)
    size = core.rows(inputs) if isinstance(inputs, Mapping) else len(inputs)
    each = {name: value for name, value in choice.items() if _for_each_row(value)}
    for name, value in each.items():
        if len(value) != size:
            raise UsageError(f"{size} inputs need one {name.replace('_', ' ')} or {size}, got {len(value)}.")
    for start in range(0, size, batch_size):
        stop = min(start + batch_size, size)
        if isinstance(inputs, Mapping):
            device = next((v.device for v in inputs.values() if isinstance(v, Tensor)), None)
            batch = rows_of_batch(inputs, torch.arange(start, stop, device=device), size)
        else:
            batch = core.encode(list(inputs[start:stop]))
        own = {**choice, **{name: value[start:stop] for name, value in each.items()}}
        batch = {name: placed(value, core.device, core.dtype) for name, value in batch.items()}
        yield _Asked(batch, own, call(core, **{**batch, **own}))


def _for_each_row(value: Any) -> bool:
    """Whether what is said of mixtures is said for each row: a list of names or mappings, or a matrix."""
    if isinstance(value, (list, tuple)):
        return not all(isinstance(one, (int, float)) for one in value)
    return hasattr(value, "ndim") and value.ndim > 1
