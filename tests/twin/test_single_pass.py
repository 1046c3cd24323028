"""Single pass: stop at an early layer, route, go on from there; the same answers as a whole pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from twinmerge.errors import TwinmergeError
from twinmerge.models.layers import layers_of, read_early
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.twin import Twin


def routed(twin: Twin, layers: tuple[int, ...], batch: dict[str, torch.Tensor]) -> Twin:
    """With a router that tells the rows of this batch apart."""
    generator = torch.Generator().manual_seed(4)
    weight = 5 * torch.randn(3, 32 * len(layers), generator=generator)
    with torch.no_grad():
        middle = (features(twin.model, batch, layers) @ weight.T).mean(0)
    twin.router, twin.layers = GaussianRouter().of(weight, -middle), layers
    return twin


class Count:
    """How often each layer of a stack runs."""

    def __init__(self, twin: Twin) -> None:
        self.ran: list[int] = []
        for i, layer in enumerate(layers_of(twin.model)):
            first = next(m for m in layer.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
            first.register_forward_pre_hook(lambda m, a, i=i: self.ran.append(i))


@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "clip_vision", "gpt2_classifier", "llama"])
def test_early_states_are_those_of_a_whole_pass(lab: Any, name: str) -> None:
    case, twin = lab.case(name), lab.twin(name)
    with torch.no_grad():
        whole = twin.model.hidden_states(case.batch)
        for deepest in (0, 1):
            early = read_early(twin.model, case.batch, deepest)
            assert len(early.states) == deepest + 1 and len(early.outputs) == deepest
            assert all(torch.equal(a, b) for a, b in zip(early.states, whole[: deepest + 1], strict=True))


@pytest.mark.few(8)
@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild", "auto"])
@pytest.mark.parametrize("experts_per_row", [1, None])
@pytest.mark.parametrize("name", ["bert", "roberta", "vit", "gpt2_classifier", "llama"])
def test_serving11_no_layer_runs_twice_and_answers_are_those_of_two_passes(
    lab: Any, name: str, experts_per_row: int | None, strategy: str
) -> None:
    """Serving 11: the router reads layer 1 of the pass that answers; mixtures and answers equal a pass of its own."""
    case = lab.new_case(name)
    twin = routed(case.twin(3).single_pass(1), (0, 1), case.batch)
    options = {"use_cache": False} if name == "llama" else {}
    twin(**case.batch, **options)  # the first pass looks what comes before the layer
    count = Count(twin)
    out = twin(**case.batch, experts_per_row=experts_per_row, strategy=strategy, **options)
    assert count.ran.count(0) == 1 and count.ran.count(1) >= 1
    again = twin(**case.batch, mixture=out.mixture, unconstrained=True, strategy=strategy, **options)
    assert count.ran.count(0) >= 2
    assert lab.relative(lab.answer(out).nan_to_num(neginf=0), lab.answer(again).nan_to_num(neginf=0)) <= 1e-12
    if experts_per_row == 1:
        assert len(set(out.expert)) > 1


def test_a_pass_that_shows_its_inside_runs_whole(lab: Any) -> None:
    case = lab.new_case("bert")
    twin = routed(case.twin(3).single_pass(1), (0, 1), case.batch)
    twin(**case.batch)
    count = Count(twin)
    out = twin(**case.batch, output_hidden_states=True)
    assert count.ran.count(0) == 2 and len(out.output.hidden_states) == 3


def test_a_batch_with_labels_is_routed_and_answered(lab: Any) -> None:
    case = lab.new_case("llama")
    twin = routed(case.twin(3).single_pass(1), (0, 1), case.batch)
    out = twin(**case.batch, labels=case.batch["input_ids"], use_cache=False)
    assert out.output.loss.isfinite()
    assert torch.equal(out.logits, twin(**case.batch, use_cache=False).logits)


def test_a_batch_that_goes_on_from_a_cache_is_not_routed_anew(lab: Any) -> None:
    """Routing would run the first layers and write into the caller's cache."""
    case = lab.new_case("llama")
    twin = routed(case.twin(3), (0, 1), case.batch)
    first = {"input_ids": case.batch["input_ids"][:, :4]}
    weights = twin.route(first)
    with torch.no_grad():
        start = twin(**first, mixture=weights)
    length = start.output.past_key_values.get_seq_length()
    later = {"input_ids": case.batch["input_ids"][:, 4:6], "past_key_values": start.output.past_key_values}
    with pytest.raises(TwinmergeError, match="goes on from a cache"):
        twin(**later)
    assert start.output.past_key_values.get_seq_length() == length
    assert twin(**later, mixture=weights).logits.isfinite().all()


def test_experts_that_act_below_are_not_skipped(lab: Any) -> None:
    """A twin whose experts change the first layer too runs it again, whatever its router reads."""
    case = lab.new_case("bert")
    twin = routed(case.twin(3), (0, 1), case.batch)
    twin(**case.batch)
    count = Count(twin)
    out = twin(**case.batch)
    assert count.ran.count(0) == 2
    assert torch.equal(out.logits, twin(**case.batch, expert=out.expert).logits)


def test_what_experts_change_below_the_layer_is_left_out(lab: Any, tmp_path: Path) -> None:
    case = lab.case("bert")
    twin = case.twin(3).single_pass(1)
    names = {n for part in twin.package.exclusive.values() for n in (*part.low, *part.dense)}
    assert names and not any(n.startswith(("embeddings", "encoder.layer.0")) for n in names)
    assert any(n.startswith("encoder.layer.1") for n in names)
    assert twin.router is None and twin.first_layer == 1
    again = Twin.from_pretrained(routed(twin, (0, 1), case.batch).save_pretrained(tmp_path / "twin"))
    assert again.first_layer == 1
    assert torch.equal(again(**case.batch).logits, twin(**case.batch).logits)
    count = Count(again)
    again(**case.batch)
    assert count.ran.count(0) == 1
    inputs = {f"e{i}": lab.text_batch(12, 6, seed=i) for i in range(3)}
    again.fit_router(inputs, progress=False)
    assert again.layers == (0, 1)


def test_experts_that_come_act_from_the_layer_too(lab: Any) -> None:
    case = lab.new_case("bert")
    two = Twin.build(case.base, {n: case.experts[n] for n in ("e0", "e1")}, 3, progress=False).single_pass(1)
    inputs = {f"e{i}": lab.text_batch(12, 6, seed=i) for i in range(3)}
    two.fit_router({n: inputs[n] for n in ("e0", "e1")}, progress=False)
    three = two.add("e2", case.experts["e2"], inputs["e2"], progress=False)
    assert three.first_layer == 1 and three.layers == (0, 1) and three.router is not None
    assert not any(n.startswith("encoder.layer.0") for n in three.package.exclusive["e2"].low)
    three(**case.batch)
    count = Count(three)
    three(**case.batch)
    assert count.ran.count(0) == 1
    assert three.remove("e2").package.exclusive.keys() == two.package.exclusive.keys()


@pytest.mark.parametrize("name, layer, says", [("bert", 2, "Layer 2 is out of range"), ("t5", 1, "not one stack")])
def test_layers_that_cannot_be(lab: Any, name: str, layer: int, says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        lab.twin(name).single_pass(layer)
