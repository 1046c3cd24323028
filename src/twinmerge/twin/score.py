"""How likely continuations are, each under the mixture of its context alone: the options of one question share a
model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.arguments import at_least_one
from twinmerge.errors import UsageError
from twinmerge.twin.call import call
from twinmerge.twin.core import Core
from twinmerge.twin.routing import check_choice, mixtures_for

Tokens = str | Sequence[int]


class Score(NamedTuple):
    """log_likelihood: Σ log p of the continuation's tokens, in nats; greedy: each of them is the likeliest; tokens:
    how many; mixture: expert -> weight, that of the context."""

    log_likelihood: float
    greedy: bool
    tokens: int
    mixture: dict[str, float]


@torch.no_grad()
def score(
    core: Core, contexts: Sequence[Tokens], continuations: Sequence[Tokens], batch_size: int, choice: dict[str, Any]
) -> list[Score]:
    """See `Twin.score`."""
    at_least_one("batch_size", batch_size)
    check_choice(choice)
    if len(contexts) != len(continuations):
        raise UsageError(f"{len(contexts)} contexts have {len(continuations)} continuations. Give one for each.")
    if core.own_module or not hasattr(core.model.body, "generate") or core.model.head_specs:
        raise UsageError(
            f"{type(core.model.body).__name__} gives no likelihood of tokens. Use a language model of transformers."
        )
    rows = [_ids(core, a, b) for a, b in zip(contexts, continuations, strict=True)]
    distinct = list(dict.fromkeys(tuple(a) for a, _ in rows))
    mixtures: dict[tuple[int, ...], Tensor] = {}
    for start in range(0, len(distinct), batch_size):
        some = distinct[start : start + batch_size]
        found = mixtures_for(core, _batch([list(ids) for ids in some]), choice)
        mixtures |= dict(zip(some, found, strict=True))
    scores: list[Score | None] = [None] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for start in range(0, len(rows), batch_size):
        at = by_length[start : start + batch_size]
        weights = torch.stack([mixtures[tuple(rows[i][0])] for i in at])
        batch = _batch([rows[i][0] + rows[i][1] for i in at])
        logits = call(core, mixture=weights, unconstrained=True, use_cache=False, **batch).logits
        assert logits is not None
        for i, row, w in zip(at, logits, weights, strict=True):
            context, tokens = rows[i]
            logp = row[len(context) - 1 : len(context) - 1 + len(tokens)].float().log_softmax(-1)
            wanted = torch.tensor(tokens, device=logp.device)
            total = logp.gather(1, wanted[:, None]).sum().item()
            greedy = bool((logp.argmax(-1) == wanted).all())
            scores[i] = Score(total, greedy, len(tokens), dict(zip(core.experts, w.tolist(), strict=True)))
    return [s for s in scores if s is not None]


def _ids(core: Core, context: Tokens, continuation: Tokens) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows; texts are cut into tokens together, as they would be read."""
    if isinstance(context, str) != isinstance(continuation, str):
        raise UsageError("A context and its continuation must both be texts, or both lists of tokens.")
    if isinstance(context, str) and isinstance(continuation, str):
        tokenizer = core.encoder.tokenizer
        before = list(tokenizer(context)["input_ids"])
        after = list(tokenizer(context + continuation)["input_ids"])[len(before) :]
    else:
        before, after = [int(i) for i in context], [int(i) for i in continuation]
    if not before or not after:
        raise UsageError("A context or a continuation holds no token. Give at least one of each.")
    return before, after


def _batch(rows: Sequence[list[int]]) -> dict[str, Any]:
    longest = max(len(ids) for ids in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
