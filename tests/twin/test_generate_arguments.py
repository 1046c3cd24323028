"""Every argument of transformers' `generate` reaches it: stock `generate` of the rebuilt models is the reference."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList

from twinmerge.errors import TwinmergeError
from twinmerge.twin.twin import Twin

IDS = torch.randint(3, 50, (4, 5), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :2] = 0
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
WEIGHTS = [0.2, 0.5, 0.3]


class Ban(LogitsProcessor):
    """Bans a token for each row, by its place in the batch."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[torch.arange(len(scores)), 3 + torch.arange(len(scores))] = -torch.inf
        return scores


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append([])


def allowed(row: int, ids: Tensor) -> list[int]:
    return [5 + row, 20 + row, 30 + row]


OPTIONS: dict[str, dict[str, Any]] = {
    "top_k of 1 is greedy": {"do_sample": True, "top_k": 1},
    "sampling": {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.7},
    "beams": {"num_beams": 3},
    "returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "sampled sequences": {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
    "max_length": {"max_length": 9},
    "config": {"generation_config": GenerationConfig(max_new_tokens=4, eos_token_id=2, pad_token_id=1, bos_token_id=0)},
    "config of sampling": {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=4, pad_token_id=1)},
    "processor": {"logits_processor": LogitsProcessorList([Ban()])},
    "criteria": {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(8)])},
    "allowed tokens": {"prefix_allowed_tokens_fn": allowed},
    "two end tokens": {"eos_token_id": torch.tensor([2, 7, 9, 11])},
    "penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [6]]},
}
BOUND = {"max_length", "config", "config of sampling"}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("strategy", ["stacked", pytest.param("folded", marks=pytest.mark.slow)])
def test_one_mixture_generates_what_the_rebuilt_model_does(lab: Any, name: str, strategy: str) -> None:
    case, twin = lab.case("llama"), lab.twin("llama")
    options = OPTIONS[name] | ({} if name in BOUND else {"max_new_tokens": 5})
    torch.manual_seed(3)
    found = twin.generate(**GIVEN, mixture=dict(zip(twin.experts, WEIGHTS, strict=True)), strategy=strategy, **options)
    torch.manual_seed(3)
    assert torch.equal(found, case.rebuilt(WEIGHTS, "e0").generate(**GIVEN, **options))


@pytest.mark.few(10)
@pytest.mark.parametrize("name", [n for n in OPTIONS if "sampl" not in n])
@pytest.mark.parametrize("strategy", ["stacked", pytest.param("grouped", marks=pytest.mark.slow), "rebuild"])
def test_rows_of_different_mixtures_are_those_of_their_models(lab: Any, name: str, strategy: str) -> None:
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("one_hot", rows=4)
    options = OPTIONS[name] | ({} if name in BOUND else {"max_new_tokens": 5})
    told = strategy == "rebuild" and name in ("processor", "criteria")
    if told:
        with pytest.raises(TwinmergeError, match="cannot be told"):
            twin.generate(**GIVEN, mixture=weights, strategy=strategy, **options)
        return
    if strategy == "grouped" and name in ("processor", "criteria"):
        strategy = "stacked"
    found = twin.generate(**GIVEN, mixture=weights, strategy=strategy, **options)
    times = options.get("num_return_sequences", 1)
    for row, w in enumerate(weights):
        whole = case.rebuilt(w.tolist(), "e0").generate(**GIVEN, **options)
        for k in range(times):
            one = whole[row * times + k]
            own = found[row * times + k]
            length = min(len(one), len(own))
            assert torch.equal(own[:length], one[:length])
            assert {*own[length:].tolist(), *one[length:].tolist()} <= {1, 2, 7, 9, 11}  # padding alone


def test_prompts_come_first_as_in_transformers(lab: Any) -> None:
    twin = lab.twin("llama")
    options: dict[str, Any] = {"expert": "e1", "max_new_tokens": 4, "do_sample": False}
    expected = twin.generate(input_ids=IDS, **options)
    assert torch.equal(twin.generate(IDS, **options), expected)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert torch.equal(twin.generate(IDS, config, expert="e1"), expected)
    assert torch.equal(twin.pin(expert="e1").generate(IDS, max_new_tokens=4, do_sample=False), expected)
    streamer = Kept()
    one = twin.generate(IDS[:1], streamer=streamer, **options)
    assert [i for part in streamer.seen for i in part] == one[0].tolist()


@pytest.mark.parametrize(
    "given, says",
    [
        ({"inputs": IDS, "input_ids": IDS}, "given twice"),
        ({"inputs": GIVEN}, "takes inputs as"),
        ({"inputs": [[3, 4]]}, "takes inputs as"),
        ({"input_ids": [[3, 4]]}, "not a tensor"),
        ({"input_ids": IDS, "assistant_model": object()}, "assistant_model"),
        ({"input_ids": IDS, "custom_generate": "org/name"}, "custom_generate"),
        ({"input_ids": IDS, "max_new_tokns": 3}, "max_new_tokns"),
        ({"input_ids": IDS, "generation_config": 3}, "does not take this call"),
        ({"input_ids": IDS, "experts_per_row": 0}, "experts_per_row is 0"),
        ({"input_ids": IDS, "experts_per_row": True}, "not True"),
        ({"input_ids": IDS, "num_beams": 0}, "does not take this call"),
    ],
)
def test_calls_that_cannot_be(lab: Any, given: dict[str, Any], says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        lab.twin("llama").generate(**{"expert": "e0", **given})


def test_the_sampling_argument_is_no_choice_of_experts(lab: Any) -> None:
    twin = lab.twin("llama")
    for call in (
        lambda: twin(**GIVEN, expert="e0", top_k=1),
        lambda: twin.mixtures(GIVEN, expert="e0", top_k=1),
        lambda: twin.score([[3]], [[4]], expert="e0", top_k=1),
        lambda: twin.explain(GIVEN, expert="e0", top_k=1),
        lambda: twin.pin(expert="e0", top_k=1),
    ):
        with pytest.raises(TwinmergeError, match="experts_per_row"):
            call()


# ------------------------------------------------------------------------------------------ autocast, copies


@pytest.mark.parametrize("rows", ["one mixture", "mixed"])
def test_within_autocast_whole_weights_answer(lab: Any, rows: str) -> None:
    """Bit for bit what the rebuilt models answer within autocast."""
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("one_hot", rows=4) if rows == "mixed" else torch.tensor([WEIGHTS] * 4)
    ids = IDS[:, :4]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        found = twin(input_ids=ids, mixture=weights)
        for row, w in enumerate(weights):
            expected = case.rebuilt(w.tolist(), "e0")(input_ids=ids).logits[row]
            torch.testing.assert_close(found.logits[row], expected, rtol=0.05, atol=0.05)
        with pytest.raises(TwinmergeError, match="autocast"):
            twin(input_ids=ids, mixture=weights, strategy="stacked")
    assert found.strategy == "rebuild"


@pytest.mark.parametrize("family", ["bert", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "vit"))])
@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_a_copy_answers_alike_and_stands_alone(lab: Any, family: str, way: str) -> None:
    case, twin = lab.new_case(family), lab.new_case(family).twin()
    twin.experts_per_row, twin.strategy = 2, "stacked"
    other: Twin = copy.deepcopy(twin) if way == "copied" else pickle.loads(pickle.dumps(twin))
    weights = lab.mixtures("soft", rows=len(next(iter(case.batch.values()))))
    first = twin(**case.batch, mixture=weights, head="e0" if twin.model.head_specs else None).logits
    assert torch.equal(other(**case.batch, mixture=weights, head="e0" if twin.model.head_specs else None).logits, first)
    assert (other.experts_per_row, other.strategy, other.experts) == (2, "stacked", twin.experts)
    with torch.no_grad():
        for parameter in other.model.body.parameters():
            parameter.zero_()
    assert torch.equal(twin(**case.batch, mixture=weights, head="e0" if twin.model.head_specs else None).logits, first)
