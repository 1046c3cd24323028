"""What experts, static merges and twins answer, and where a router sends the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ViTForImageClassification

import twinmerge as tm
from kit.scores import SETTINGS
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.bootstrap import Scored
from twinmerge.twin.routing import routed
from vision_suite_parts.tasks import TASKS, Labels

BATCH_ROWS = 250


class Rows(NamedTuple):
    """One task's rows of a split: pixel values and the numbers of their labels."""

    pixels: Tensor
    labels: Labels


Split = dict[str, Rows]
"""Task -> its rows."""


def experts_on_their_own(experts: dict[str, str], split: Split) -> Evaluation:
    """Every expert on its own task."""
    answers = {}
    for name, folder in experts.items():
        model = ViTForImageClassification.from_pretrained(folder).eval()
        answers[name] = classify(model, split[name])
    return Evaluation.of(answers, "task given")


def classify(model: ViTForImageClassification, rows: Rows) -> Scored:
    with torch.inference_mode():
        found = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in rows.pixels.split(BATCH_ROWS)])
    return Scored("classes", "accuracy", rows.labels, found.numpy())


def base_score(base: str, rows: tuple[Tensor, Labels]) -> float:
    """The base's own accuracy on its ten classes."""
    return classify(ViTForImageClassification.from_pretrained(base).eval(), Rows(*rows)).score


def static(method: str, base: str, experts: dict[str, str], parameters: dict[str, Any], split: Split) -> Evaluation:
    """A static merge with the experts' own heads, told which head answers."""
    model = tm.merge(method, base=base, experts=experts, progress=False, **parameters).load()
    answers = {}
    for name, rows in split.items():
        batches = rows.pixels.split(BATCH_ROWS)
        with torch.inference_mode():
            found = [model(pixel_values=b, head=name).logits.argmax(-1) for b in batches]
        answers[name] = Scored(name, "accuracy", rows.labels, torch.cat(found).numpy())
    return Evaluation.of(answers, "head given")


class Routes(NamedTuple):
    """mixtures: (rows, experts), zeros for rows that are left to the shared model; nearest: the number of each row's
    expert, whose head answers."""

    mixtures: Tensor
    nearest: Labels


def route(twin: tm.Twin, split: Split) -> dict[str, Routes]:
    """Where each task's rows go. The rank does not matter: the shared model is read."""
    found = {}
    for name, rows in split.items():
        parts = [routed(twin, {"pixel_values": batch}, twin.experts_per_row) for batch in rows.pixels.split(BATCH_ROWS)]
        nearest = torch.cat([p.nearest for p in parts if p.nearest is not None])
        found[name] = Routes(torch.cat([p.weights for p in parts]), nearest.numpy())
    return found


def twin_answers(twin: tm.Twin, split: Split, routes: dict[str, Routes]) -> list[Evaluation]:
    """The four readings. A row that was routed right is asked once; the three others differ on the other rows alone."""
    names = list(split)
    answers: dict[str, dict[str, Scored]] = {setting: {} for setting in SETTINGS}
    right = float(np.concatenate([routes[name].nearest == k for k, name in enumerate(names)]).mean())
    for k, (name, rows) in enumerate(split.items()):
        labels, given = TASKS[name].labels, torch.eye(len(names))[k].expand(len(rows.labels), -1)
        own = _answers(twin, rows.pixels, given, [name] * len(given))
        by_head, strict, lenient = own.copy(), own.copy(), own.copy()
        other = np.flatnonzero((routes[name].mixtures != given).any(1).numpy())
        if len(other):
            mixtures, pixels = routes[name].mixtures[other], rows.pixels[torch.from_numpy(other)]
            chosen = [names[i] for i in routes[name].nearest[other]]
            by_head[other] = _answers(twin, pixels, mixtures, [name] * len(other))
            for row, head, said in zip(other, chosen, _answers(twin, pixels, mixtures, chosen), strict=True):
                text = TASKS[head].labels[said]
                strict[row] = said if head == name else -1
                lenient[row] = labels.index(text) if text in labels else -1
        for setting, found in zip(SETTINGS, (own, by_head, strict, lenient), strict=True):
            answers[setting][name] = Scored(name, "accuracy", rows.labels, found)
    return [
        Evaluation.of(answers["task given"], "task given"),
        Evaluation.of(answers["head given"], "head given", None, right),
        Evaluation.of(answers["nothing given, strict"], "nothing given", "strict", right),
        Evaluation.of(answers["nothing given, lenient"], "nothing given", "lenient", right),
    ]


def _answers(twin: tm.Twin, pixels: Tensor, mixtures: Tensor, heads: list[str]) -> Labels:
    """What the twin says of each row with this mixture (rows, experts) and head."""
    found = []
    with torch.inference_mode():
        for at in range(0, len(pixels), BATCH_ROWS):
            cut = slice(at, at + BATCH_ROWS)
            out = twin(pixel_values=pixels[cut], mixture=mixtures[cut], head=heads[cut])
            assert out.logits is not None
            found.append(out.logits.argmax(-1))
    return torch.cat(found).numpy()
