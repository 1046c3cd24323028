"""Language models: sampled tokens, pinned conversations, and continuations under the mixture of their context."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.twin import Twin

PROMPTS = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(PROMPTS)


def routed(twin: Twin) -> Twin:
    generator = torch.Generator().manual_seed(4)
    twin.router, twin.layers = GaussianRouter().of(40 * torch.randn(3, 32, generator=generator), torch.zeros(3)), (1,)
    return twin


@pytest.mark.parametrize("strategy", ["stacked", "grouped", "folded", "rebuild"])
def test_check26_every_strategy_generates_the_tokens_of_the_rebuilt_model(lab: Any, strategy: str) -> None:
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = [0.2, 0.5, 0.3]
    options: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 20, "do_sample": False}
    found = twin.generate(
        input_ids=PROMPTS, mixture=dict(zip(twin.experts, weights, strict=True)), strategy=strategy, **options
    )
    assert torch.equal(found, case.rebuilt(weights, "e0").generate(input_ids=PROMPTS, **options))


@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild", "auto"])
def test_check26_mixed_batches_by_every_strategy(lab: Any, strategy: str) -> None:
    """Check 26: 20 greedy tokens of four different mixtures equal four runs of batch 1 on rebuilt models."""
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("soft", rows=4)
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    found = twin.generate(input_ids=PROMPTS, attention_mask=MASK, mixture=weights, strategy=strategy, **options)
    for row, w in enumerate(weights):
        one = {"input_ids": PROMPTS[row : row + 1], "attention_mask": MASK[row : row + 1]}
        expected = case.rebuilt(w.tolist(), "e0").generate(**one, **options)[0]
        assert torch.equal(found[row, : len(expected)], expected)


@pytest.mark.parametrize("strategy", ["stacked", "grouped", "auto"])
def test_sampled_tokens_are_those_of_the_rebuilt_models(lab: Any, strategy: str) -> None:
    """One draw for the whole batch at each step, from probabilities that the rebuilt models give row by row."""
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("one_hot", rows=4)
    models = [case.rebuilt(w.tolist(), "e0") for w in weights]
    torch.manual_seed(11)
    found = twin.generate(
        input_ids=PROMPTS,
        attention_mask=MASK,
        mixture=weights,
        strategy=strategy,
        max_new_tokens=6,
        do_sample=True,
        top_k=0,
    )
    torch.manual_seed(11)
    ids, ended = PROMPTS, torch.zeros(4, dtype=torch.bool)
    for _ in range(found.shape[1] - 5):
        with torch.no_grad():
            logits = torch.cat([m(input_ids=ids[i : i + 1]).logits[:, -1] for i, m in enumerate(models)])
        drawn = torch.multinomial(logits.float().softmax(-1), 1)[:, 0]
        drawn = torch.where(ended, torch.tensor(1), drawn)
        ids, ended = torch.cat([ids, drawn[:, None]], 1), ended | (drawn == 2)
    assert torch.equal(found, ids)


def test_a_conversation_keeps_the_mixture_of_its_first_prompt(lab: Any) -> None:
    twin = routed(lab.new_case("llama").twin())
    first = {"input_ids": PROMPTS[:1], "attention_mask": MASK[:1]}
    talk = twin.pin(**first, experts_per_row=None)
    assert talk.mixture == pytest.approx(dict(zip(twin.experts, twin.route(first, None)[0].tolist(), strict=True)))
    later = {"input_ids": PROMPTS[1:3], "attention_mask": MASK[1:3]}
    given = talk.weights.expand(2, -1)
    assert not torch.allclose(twin.route(later, None)[0], talk.weights)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    expected = twin.generate(**later, mixture=given, strategy="stacked", **options)
    assert torch.equal(talk.generate(**later, **options), expected)
    assert twin.runtime.is_folded(talk.weights)
    assert lab.relative(talk(**later).logits, twin(**later, mixture=given, strategy="stacked").logits) <= 1e-6
    assert twin.pin(expert="e1").mixture["e1"] == 1
    with pytest.raises(TwinmergeError, match="got 2 rows"):
        twin.pin(**later)


def test_serving22_continuations_are_scored_under_their_contexts_mixture(lab: Any) -> None:
    """Serving 22: options of one question share its mixture, whatever they say; equal to the rebuilt model's
    likelihood."""
    case = lab.new_case("llama")
    twin = routed(case.twin())
    contexts = [PROMPTS[i // 3].tolist() for i in range(9)]
    options = [
        torch.randint(3, 50, (1 + i % 4,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(9)
    ]
    found = twin.score(contexts, options, batch_size=4, experts_per_row=None)
    for question in range(3):
        assert len({tuple(s.mixture.values()) for s in found[3 * question : 3 * question + 3]}) == 1
    assert len({tuple(s.mixture.values()) for s in found}) == 3
    for context, option, score in zip(contexts, options, found, strict=True):
        model = case.rebuilt(list(score.mixture.values()), "e0")
        with torch.no_grad():
            told = model(input_ids=torch.tensor([context + option])).logits[0].log_softmax(-1)
        expected = sum(told[len(context) - 1 + i, token].item() for i, token in enumerate(option))
        assert score.log_likelihood == pytest.approx(expected, rel=1e-4) and score.tokens == len(option)
        best = [int(told[len(context) - 1 + i].argmax()) for i in range(len(option))]
        assert score.greedy == (best == option)
    greedy = twin.generate(
        input_ids=PROMPTS[:1], attention_mask=MASK[:1], experts_per_row=None, max_new_tokens=3, do_sample=False
    )
    assert twin.score([PROMPTS[0].tolist()], [greedy[0, 5:].tolist()], experts_per_row=None)[0].greedy


@pytest.mark.parametrize(
    "contexts, continuations, says",
    [([[3]], [], "1 contexts have 0"), ([[3]], [[]], "holds no token"), ([[3]], ["a"], "both be texts")],
)
def test_scores_that_cannot_be(lab: Any, contexts: Any, continuations: Any, says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        lab.twin("llama").score(contexts, continuations, expert="e0")
    with pytest.raises(TwinmergeError, match="gives no likelihood"):
        lab.twin("bert").score([[3]], [[4]], expert="e0")
