"""One pass over a batch by a way of the planner's: rows are sorted once, and come back in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError
from twinmerge.models.headed import rows_of
from twinmerge.models.layers import Early
from twinmerge.twin.mixing.arguments import CacheError
from twinmerge.twin.mixing.forward import UnseenError
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.planner import distinct_mixtures
from twinmerge.twin.rebuilt import CACHES, Answered, passed, rebuilt

if TYPE_CHECKING:
    from twinmerge.twin.twin import Twin

T = TypeVar("T")
PROMPT = (
    "input_ids",
    "attention_mask",
    "pixel_values",
    "inputs_embeds",
    "token_type_ids",
    "input_features",
    "input_values",
)


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
    """Models with pictures or sounds beside words: what belongs to a row may stand anywhere in their inputs, and models of two
    towers score every row of one against every row of the other, so rows must keep their order."""
    config = twin.model.architecture.config
    return hasattr(config, "vision_config") or hasattr(config, "audio_config")


def keeps_order(twin: Twin, batch: Mapping[str, Any]) -> bool:
    """Whether rows must stay where they are: also those that go on from a cache do, whose rows are not looked into."""
    return couples_rows(twin) or any(batch.get(name) is not None for name in CACHES)


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
        return rebuilt(twin, batch, heads, distinct_mixtures(weights), early)
    plan = Mixture.of(weights, strategy == "grouped" and biases is None, not keeps_order(twin, batch))
    others = None if biases is None else Mixture.of(biases, grouped=False)

    def mixed(batch: Mapping[str, Any] = batch) -> Answered:
        with twin.runtime.mixing(plan, others):
            return passed(twin, batch, heads, early, plan.order)

    try:
        answered = seeing(twin, batch, mixed)
    except CacheError:
        if batch.get("use_cache") is not None:
            raise
        answered = seeing(twin, batch, partial(mixed, {**batch, "use_cache": False}))
    return answered if plan.order is None else _back(answered, plan.order)


def seeing(twin: Twin, batch: Mapping[str, Any], run: Callable[[], T]) -> T:
    """A pass under mixtures; where it calls what no look has seen, the model is looked at with this batch first.

    Errors:
        TwinmergeError: a module that even that does not call.
    """
    try:
        return run()
    except UnseenError:
        why = twin.runtime.look_at(batch, again=True)
    try:
        return run()
    except UnseenError as unseen:
        told = f"{why} " if why else ""
        raise TwinmergeError(
            f"{told}The module {str(unseen)!r} is not called in the same way in every pass, so it is not known how it sees the rows. "
            'Give one mixture for the whole batch, or say strategy="rebuild".'
        ) from None


def _back(answered: Answered, order: Tensor) -> Answered:
    """The rows in the caller's order again."""
    back = torch.argsort(order)
    logits = None if answered.logits is None else answered.logits.index_select(0, back)
    return Answered(rows_of(answered.output, back), logits)
