"""One pass over a batch by a way of the planner's: rows are sorted once, and come back in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.models.layers import Early
from twinmerge.models.rows import rows_of
from twinmerge.twin.core import Core
from twinmerge.twin.mixing.arguments import CacheError
from twinmerge.twin.mixing.forward import UnseenError
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.own import by_copies, require_rebuild
from twinmerge.twin.mixing.planner import distinct_mixtures
from twinmerge.twin.mixing.rebuilt import CACHES, Answered, one_pass, rebuilt

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


def positions_of(core: Core, batch: Mapping[str, Any]) -> int:
    """How many positions a row has in a pass; for the planner only."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(found := batch.get(name), Tensor) and found.dim() > 1:
            return max(1, int(found.shape[1]))
    pixels, config = batch.get("pixel_values"), core.model.architecture.config
    if isinstance(pixels, Tensor) and isinstance(patch := getattr(config, "patch_size", None), int):
        return 1 + (pixels.shape[-1] // patch) * (pixels.shape[-2] // patch)
    return 1


def couples_rows(core: Core) -> bool:
    """Models with pictures or sounds beside words: what belongs to a row may stand anywhere in their inputs, and
    models of two towers score every row of one against every row of the other, so rows must keep their order."""
    config = core.model.architecture.config
    return hasattr(config, "vision_config") or hasattr(config, "audio_config")


def keeps_order(core: Core, batch: Mapping[str, Any]) -> bool:
    """Whether rows must stay where they are: also those that go on from a cache do, whose rows are not looked into."""
    return couples_rows(core) or any(batch.get(name) is not None for name in CACHES)


def planned(
    core: Core,
    batch: Mapping[str, Any],
    heads: Sequence[str] | None,
    weights: Tensor,
    strategy: str | None = None,
    biases: Tensor | None = None,
    early: Early | None = None,
) -> tuple[Answered, str]:
    """Answer a batch whose mixtures are known, and say which way was taken.

    Args:
        strategy: the way, or "auto" for the planner's; the twin's own where None. With biases it is "stacked". Of a
            module of one's own it is "rebuild".
        heads, weights, biases, early: as in `answer`.
    """
    if core.own_module:
        require_rebuild(core.strategy if strategy is None else strategy, biases)
        return answer(core, batch, heads, weights, "rebuild"), "rebuild"
    way = "stacked" if biases is not None else under_autocast(core, core.strategy if strategy is None else strategy)
    with core.lock:
        blind = core.runtime.look_at(batch) if bool(weights.any()) else None
        way = core.planner.choose(weights, positions_of(core, batch), 0, not keeps_order(core, batch), way, blind)
        return answer(core, batch, heads, weights, way, biases, early), way


def under_autocast(core: Core, strategy: str) -> str:
    """The strategy that may be used: within torch.autocast only whole weights are exact, since the parts of experts
    would be added to answers of another dtype.

    Raises:
        UsageError: a way that adds parts to answers is asked for.
    """
    if not torch.is_autocast_enabled(core.device.type) or strategy in ("folded", "rebuild"):
        return strategy
    if strategy != "auto":
        raise UsageError(
            f"Within torch.autocast strategy={strategy!r} would add parts in one dtype to answers in another. Leave it "
            "out, say "
            'strategy="rebuild", or convert the twin: twin.to(torch.bfloat16).'
        )
    return "rebuild"


def answer(
    core: Core,
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
    if core.fresh is not None:
        output = by_copies(core.fresh, batch, weights)
        return Answered(output, output if isinstance(output, Tensor) else getattr(output, "logits", None))
    if strategy in ("folded", "rebuild"):
        return rebuilt(core.model, core.runtime, batch, heads, distinct_mixtures(weights), early)
    plan = Mixture.of(weights, strategy == "grouped" and biases is None, not keeps_order(core, batch))
    others = None if biases is None else Mixture.of(biases, grouped=False)

    def mixed(batch: Mapping[str, Any] = batch) -> Answered:
        with core.runtime.mixing(plan, others):
            return one_pass(core.model, batch, heads, early, plan.order)

    try:
        answered = with_look(core, batch, mixed)
    except CacheError:
        if batch.get("use_cache") is not None:
            raise
        answered = with_look(core, batch, partial(mixed, {**batch, "use_cache": False}))
    return answered if plan.order is None else _back(answered, plan.order)


def with_look(core: Core, batch: Mapping[str, Any], run: Callable[[], T]) -> T:
    """A pass under mixtures; where it calls what no look has seen, the model is looked at with this batch first.

    Raises:
        UsageError: a module that even that does not call.
    """
    try:
        return run()
    except UnseenError:
        why = core.runtime.look_at(batch, again=True)
    try:
        return run()
    except UnseenError as unseen:
        lead = f"{why} " if why else ""
        raise UsageError(
            f"{lead}The module {str(unseen)!r} is not called in the same way in every pass, so it is not known how it "
            "sees the rows. "
            'Give one mixture for the whole batch, or say strategy="rebuild".'
        ) from None


def _back(answered: Answered, order: Tensor) -> Answered:
    """The rows in the caller's order again."""
    back = torch.argsort(order)
    logits = None if answered.logits is None else answered.logits.index_select(0, back)
    return Answered(rows_of(answered.output, back), logits)
