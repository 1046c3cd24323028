"""Inputs that rows do not sort: caches, places, what comes once for all rows; the model of each row's mixture is the
reference."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.twin.mixing.glance import LONGEST, prints

IDS = torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :2] = 0
ONCE = torch.arange(2, 8)[None]


def whole(case: Any, weights: Any, run: Any) -> Any:
    """Each row out of the answer of its own model to the whole batch."""
    found = []
    for row, w in enumerate(weights):
        with torch.no_grad():
            found.append(run(case.rebuilt(w.tolist(), "e0"))[row])
    return torch.stack(found)


@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild"])
@pytest.mark.parametrize(
    "given",
    [
        {"logits_to_keep": torch.tensor([5, 0, 2, 1])},
        {"position_ids": ONCE},
        {"attention_mask": MASK, "return_dict": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_places_and_what_all_rows_share(lab: Any, given: dict[str, Any], strategy: str) -> None:
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("sparse", rows=4)
    found = twin(**given, input_ids=IDS, mixture=weights, strategy=strategy)
    expected = whole(case, weights, lambda model: model(input_ids=IDS, **given).logits)
    assert lab.relative(found.logits, expected) < 1e-6


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids"])
def test_positions_once_for_all_rows_of_bert(lab: Any, name: str) -> None:
    twin = lab.twin("bert")
    once = torch.tensor([[0, 1, 0, 1, 1, 0]])
    weights = lab.mixtures("one_hot", rows=4)
    for strategy in ("stacked", "grouped", "rebuild"):
        found = twin(**{name: once}, input_ids=IDS, mixture=weights, strategy=strategy)
        each = twin(input_ids=IDS, **{name: once.repeat(4, 1)}, mixture=weights, strategy=strategy)
        assert lab.relative(found.logits[:, :2], each.logits[:, :2]) < 1e-9


@pytest.mark.parametrize("strategy", ["stacked", "grouped"])
def test_rows_that_go_on_from_a_cache_keep_their_order(lab: Any, strategy: str) -> None:
    case, twin = lab.case("llama"), lab.twin("llama")
    weights = lab.mixtures("one_hot", rows=4)

    def step(model: Any) -> Any:
        past = model(input_ids=IDS[:, :-1], attention_mask=MASK[:, :-1], use_cache=True).past_key_values
        return model(input_ids=IDS[:, -1:], attention_mask=MASK, past_key_values=past, use_cache=True).logits

    expected = whole(case, weights, step)
    past = twin(input_ids=IDS[:, :-1], attention_mask=MASK[:, :-1], mixture=weights, strategy="stacked", use_cache=True)
    cache = past.output.past_key_values
    with pytest.raises(TwinmergeError, match="cache"):
        twin(input_ids=IDS[:, -1:], attention_mask=MASK, past_key_values=cache, mixture=weights, strategy="rebuild")
    more = {"input_ids": IDS[:, -1:], "attention_mask": MASK, "past_key_values": cache, "use_cache": True}
    assert lab.relative(twin(**more, mixture=weights, strategy=strategy).logits, expected) < 1e-6

    with torch.no_grad():
        start = case.base(input_ids=IDS[:, :-2], attention_mask=MASK[:, :-2], use_cache=True).past_key_values
    options = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 4, "do_sample": False}
    tokens = twin.generate(**options, past_key_values=copy.deepcopy(start), mixture=weights, strategy=strategy)
    wanted = whole(
        case, weights, lambda m: m.generate(**options, past_key_values=copy.deepcopy(start), min_new_tokens=4)
    )
    same = [torch.equal(a[:7], b[:7]) for a, b in zip(tokens, wanted, strict=True)]
    assert all(same)


@pytest.mark.few(1)
@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild"])
def test_answers_of_an_encoder_are_sorted_with_their_rows(lab: Any, strategy: str) -> None:
    case, twin = lab.case("t5"), lab.twin("t5")
    weights = lab.mixtures("one_hot", rows=4)
    with torch.no_grad():
        states = case.base.get_encoder()(input_ids=IDS, attention_mask=MASK)
    for given in (states, (states[0],)):
        batch = {"encoder_outputs": given, "attention_mask": MASK, "decoder_input_ids": IDS[:, :3]}
        found = twin(**batch, mixture=weights, strategy=strategy)
        expected = whole(case, weights, lambda model, batch=batch: model(**batch).logits)
        assert lab.relative(found.logits, expected) < 1e-6
    options = {"attention_mask": MASK, "max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    found = twin.generate(encoder_outputs=states, **options, mixture=weights, strategy=strategy)
    assert len(states[0]) == 4  # what the caller gave stays as it was
    expected = whole(case, weights, lambda m: m.generate(encoder_outputs=copy.copy(type(states)(**states)), **options))
    assert torch.equal(found, expected)


def test_a_start_for_each_row(lab: Any) -> None:
    case, twin = lab.case("t5"), lab.twin("t5")
    weights = lab.mixtures("one_hot", rows=4)
    options = {"input_ids": IDS, "decoder_start_token_id": [5, 6, 7, 8], "max_new_tokens": 4, "min_new_tokens": 4}
    expected = whole(case, weights, lambda model: model.generate(**options))
    for strategy in ("stacked", "grouped"):
        assert torch.equal(twin.generate(**options, mixture=weights, strategy=strategy), expected)
    with pytest.raises(TwinmergeError, match="decoder_start_token_id cannot be told"):
        twin.generate(**options, mixture=weights, strategy="rebuild")


def test_twins_made_of_a_twin_answer_as_it_is_set(lab: Any) -> None:
    twin = copy.deepcopy(lab.twin("llama"))
    twin.to(torch.bfloat16)
    twin.strategy, twin.experts_per_row = "grouped", None
    for made in (twin.at_rank(1), twin.compress(rank=1), twin.single_pass(1), twin.remove("e1")):
        assert (made.strategy, made.experts_per_row) == ("grouped", None)
        assert next(made.model.body.parameters()).dtype == torch.bfloat16


def test_the_answer_as_a_tuple_is_refused(lab: Any) -> None:
    with pytest.raises(TwinmergeError, match="to_tuple"):
        lab.twin("llama")(input_ids=IDS, expert="e0", return_dict=False)


def test_numbers_of_numpy_are_numbers(lab: Any) -> None:
    twin = copy.deepcopy(lab.twin("bert"))
    inputs = {name: lab.text_batch(8, 6, seed) for seed, name in enumerate(twin.experts)}
    twin.fit_router(inputs, layers=np.array([0, 1]), null=np.bool_(False), progress=np.bool_(False))
    assert twin.layers == (0, 1) and all(type(layer) is int for layer in twin.layers)


def test_directions_of_an_encoder_decoder(lab: Any) -> None:
    """The pass that finds what reads a layer has words for the decoder, too."""
    twin = copy.deepcopy(lab.twin("t5"))
    twin.fit_router(kind="projection", progress=False)
    assert twin.route({"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}).shape == (4, len(twin.experts))


def test_entries_of_many_numbers_are_told_apart() -> None:
    """Prints of entries that are longer than a wave: any number that changes, or two that change places, are seen."""
    x = torch.randn(1, 3 * LONGEST + 5)
    rows = x.repeat(5, 1)
    rows[1, 0] += 1e-3
    rows[2, 2 * LONGEST + 7] += 1e-3
    rows[3, -1] += 1e-3
    rows[4, [3, LONGEST + 3]] = rows[4, [LONGEST + 3, 3]]
    change = (prints(rows) - prints(x)).abs().amax(1)
    assert change[0] < 1e-9 and bool((change[1:] > 1e-5).all())
