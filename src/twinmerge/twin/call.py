"""One call of a twin: mixtures, then the way of mixing them, then the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.models.rows import batch_size, for_each_row
from twinmerge.moved import with_old_keywords
from twinmerge.results import Shown, some
from twinmerge.twin.answer import planned
from twinmerge.twin.core import Core
from twinmerge.twin.mixing.mixture import MixtureLike, one_hot
from twinmerge.twin.mixing.own import inputs_of, refuse_taken
from twinmerge.twin.reading import check_batch
from twinmerge.twin.routing import TOP_K, PerRow, check_names, heads_of_rows, mixtures, per_row
from twinmerge.twin.told.watch import refused_rows


@dataclass(frozen=True, repr=False)
class TwinOutput(Shown):
    """The answer to a batch.

    Attributes:
        logits: (rows, most labels of any head used), −inf beyond a row's own labels; None for models without logits.
        mixture: (rows, experts).
        expert: of each row, the one of largest weight, or None where all weights are zero (routed: the row is far
            from every expert's inputs, and the nearest one's head answers).
        head: the head of each row, or None.
        output: what the model's own class returned (of the first head's class).
        strategy: how the parts were added.
        routing: (rows, experts), the router's probabilities before any is dropped; None where the mixture was named.
    """

    logits: Tensor | None
    mixture: Tensor
    expert: list[str | None]
    head: list[str] | None
    output: Any
    strategy: str = "stacked"
    routing: Tensor | None = None

    @property
    def refused(self) -> list[bool]:
        """Of each row, whether the router left it to the shared model, since it is far from every expert's inputs."""
        return refused_rows(self.mixture, self.routing)

    def _summary(self) -> str:
        what = "no logits" if self.logits is None else f"logits {tuple(self.logits.shape)}"
        names = Counter("shared model" if name is None else name for name in self.expert)
        shares = some((f"{name} {count}" for name, count in names.most_common()), 3)
        return f"{len(self.mixture)} rows, {what}, {shares}, {self.strategy}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        heads: Sequence[str | None] = self.head or [None] * len(self.expert)
        rows = zip(self.expert, heads, self.refused, self.mixture.tolist(), strict=True)
        columns = ["expert", "head", "refused", *(f"weight {k}" for k in range(self.mixture.shape[1]))]
        return columns, [[expert, head, refused, *weights] for expert, head, refused, weights in rows]


def call(
    core: Core,
    /,
    *unnamed: Any,
    mixture: MixtureLike | None = None,
    expert: str | Sequence[str] | None = None,
    head: str | Sequence[str] | None = None,
    experts_per_row: PerRow = "own",
    normalize: bool = False,
    unconstrained: bool = False,
    oracle_biases: Sequence[str] | None = None,
    strategy: str | None = None,
    **batch: Any,
) -> TwinOutput:
    """Answer a batch whose rows may have different mixtures.

    Args:
        mixture: weights by name for all rows, one mapping per row, or (rows, experts), at least 0 with a sum of at
            most 1; routed where neither this nor `expert` is given.
        normalize: divide a mixture's weights by their sum first.
        unconstrained: take any finite weights, negative ones and larger sums too.
        expert: a name for all rows or one per row: weight 1 for it, and its head.
        head: a name for all rows or one per row; by default that of the expert of largest weight.
        experts_per_row: of the router; the twin's own `experts_per_row` (1) where not given, None for soft mixtures.
        oracle_biases: one expert per row whose biases are used in full whatever the mixture. Only to reproduce the
            paper's evaluation, which hands the labelled task's biases in.
        strategy: how the parts are added: "stacked", "grouped", "folded" or "rebuild" (see `twin/mixing/planner.py`);
            the fastest by the planner's reckoning where not given. The answers are the same. A module of your own has
            one way, "rebuild".
        unnamed, batch: what the tokenizer or image processor returns, by name; of a module of your own what its forward
            takes, by position or name.

    Raises:
        TwinmergeError: unknown names, no router, wrong number of rows, a strategy that the batch does not allow.
    """
    batch = inputs_of(core.model.body, unnamed, batch) if core.own_module else _checked(core, unnamed, batch)
    size = core.rows(batch)
    weights, nearest, early, soft = mixtures(core, batch, mixture, expert, experts_per_row, normalize, unconstrained)
    chosen = [core.experts[int(row.argmax())] if bool(row.any()) else None for row in weights]
    likely = chosen if nearest is None else [core.experts[k] for k in nearest.tolist()]
    heads = heads_of_rows(core, head, likely)
    biases = None
    if oracle_biases is not None:
        biases = one_hot(per_row(oracle_biases, size, "oracle bias"), core.experts).to(weights)
    found, way = planned(core, batch, heads, weights, strategy, biases, early)
    out = TwinOutput(found.logits, weights, chosen, heads, found.output, way, soft)
    core.tell(weights, soft, heads)
    return out


_call = with_old_keywords(call)


@wraps(call)
def asked(core: Core, *unnamed: Any, **given: Any) -> TwinOutput:
    if core.own_module:
        refuse_taken(core.model.body, given)
    return _call(core, *unnamed, **given)


def _checked(core: Core, unnamed: Sequence[Any], batch: dict[str, Any]) -> dict[str, Any]:
    """A batch of a model of transformers, with a row for each of what may come once for all."""
    if unnamed:
        check_batch(unnamed[0])
        raise UsageError("A batch is given by name: twin(**batch).")
    if "top_k" in batch:
        raise UsageError(TOP_K)
    check_batch(batch)
    if core.model.head_specs and batch.get("labels") is not None:
        raise UsageError(
            "A twin with heads answers, and computes no loss. Leave labels out; take the loss of the logits."
        )
    check_names(core, {k: v for k, v in batch.items() if k != "return_dict"})
    if batch.pop("return_dict", None) is False:
        raise UsageError(
            "A twin gives its answer by name. Leave return_dict out, and take twin(**batch).output.to_tuple()."
        )
    return for_each_row(batch, batch_size(batch))
