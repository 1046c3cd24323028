"""One pass over a batch by a way of the planner's: rows are sorted once, and come back in the caller's order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.models.headed import batch_size, joined, rows_of, rows_of_batch
from twinmerge.twin.early import Early, resumed
from twinmerge.twin.mixture import Mixture
from twinmerge.twin.planner import distinct_mixtures

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

PROMPT = ("input_ids", "attention_mask", "pixel_values", "inputs_embeds", "token_type_ids")


class Answered(NamedTuple):
    """output: the model class's own; logits: (rows, labels or ...) or None."""

    output: Any
    logits: Tensor | None


def positions_of(twin: Twin, batch: Mapping[str, Any]) -> int:
    """How many positions a row has in a pass; for the planner only."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := batch.get(name), Tensor) and found.dim() > 1:
            return max(1, int(found.shape[1]))
    pixels, config = batch.get("pixel_values"), twin.model.architecture.config
    if isinstance(pixels, Tensor) and isinstance(patch := getattr(config, "patch_size", None), int):
        return 1 + (pixels.shape[-1] // patch) * (pixels.shape[-2] // patch)
    return 1


def couples_rows(twin: Twin) -> bool:
    """Models of two towers score every row of one against every row of the other: rows must keep their order."""
    config = twin.model.architecture.config
    return hasattr(config, "vision_config") or hasattr(config, "audio_config")


def answer(
    twin: Twin,
    batch: Mapping[str, Any],
    heads: Sequence[str] | None,
    weights: Tensor,
    strategy: str,
    biases: Tensor | None = None,
    early: Early | None = None,
) -> Answered:
    """Answer a batch whose mixtures are known.

    Args:
        heads: of each row, where the model has heads.
        weights: (rows, experts).
        strategy: one that the batch allows.
        biases: mixtures (rows, experts) of the biases, where they are not those of the weights.
        early: what the first layers gave already, where it may be used.
    """
    if strategy in ("folded", "rebuild"):
        groups = distinct_mixtures(weights)
        found = []
        for mixture, rows in groups:
            with twin.runtime.folded(mixture):
                found.append(_passed(twin, batch, heads, early, rows if len(groups) > 1 else None))
        if len(groups) == 1:
            return found[0]
        logits = None if found[0].logits is None else joined([f.logits for f in found])
        whole = Answered(joined([f.output for f in found]), logits)
        return _back(whole, torch.cat([rows for _, rows in groups]))
    plan = Mixture.of(weights, strategy == "grouped" and biases is None, not couples_rows(twin))
    with twin.runtime.mixing(plan, None if biases is None else Mixture.of(biases, grouped=False)):
        answered = _passed(twin, batch, heads, early, plan.order)
    return answered if plan.order is None else _back(answered, plan.order)


def _passed(
    twin: Twin, batch: Mapping[str, Any], heads: Sequence[str] | None, early: Early | None, rows: Tensor | None
) -> Answered:
    """One pass over some rows, in an order; None for all as they are."""
    if rows is not None:
        batch = rows_of_batch(batch, rows, batch_size(batch))
        heads = None if heads is None else [heads[i] for i in rows.tolist()]
    with nullcontext() if early is None else resumed(twin.model, early, rows):
        found = twin.model(batch, heads)
    if heads:
        return Answered(found["output"], found["logits"])
    return Answered(found, getattr(found, "logits", None))


def _back(answered: Answered, order: Tensor) -> Answered:
    """The rows in the caller's order again."""
    back = torch.argsort(order)
    logits = None if answered.logits is None else answered.logits.index_select(0, back)
    return Answered(rows_of(answered.output, back), logits)
