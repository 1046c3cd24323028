"""A twin's state without its facade: what is done with a twin takes it, and gives what the twin gives."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.twin.call import call
from twinmerge.twin.core import Core
from twinmerge.twin.export import export_dense
from twinmerge.twin.generate import Pinned, generate
from twinmerge.twin.package import load
from twinmerge.twin.routing import mixtures_for
from twinmerge.twin.score import score
from twinmerge.twin.twin import Twin


def test_a_core_answers_as_its_twin(lab: Any, tmp_path: Path) -> None:
    case = lab.case("bert", torch.float32)
    folder = case.twin(2).save_pretrained(tmp_path / "twin")
    core, twin = Core(load(folder), folder), Twin.from_pretrained(folder)
    names = ["e0", "e1", "e2", "e0", "e1"]
    own, other = call(core, **case.batch, expert=names), twin(**case.batch, expert=names)
    assert torch.equal(own.logits, other.logits) and own.head == other.head == names
    mixed = mixtures_for(core, case.batch, {"mixture": {"e0": 0.5, "e2": 0.5}})
    assert torch.equal(mixed, twin.mixtures(case.batch, mixture={"e0": 0.5, "e2": 0.5}))
    written = [export_dense(each, {"e0": 1.0}, tmp_path / name) for name, each in (("a", core), ("b", twin))]
    assert (written[0] / "model.safetensors").read_bytes() == (written[1] / "model.safetensors").read_bytes()


def test_a_core_of_a_language_model_generates_and_holds_conversations(lab: Any) -> None:
    twin = lab.case("gpt2").twin(3)
    core = Core(twin.package_now(), None)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    choice: dict[str, Any] = {"mixture": {"e0": 0.7, "e1": 0.3}}
    how = {"max_new_tokens": 4, "do_sample": False}
    expected = twin.generate(**prompt, **how, **choice)
    assert torch.equal(generate(core, **prompt, **how, **choice), expected)
    pinned = Pinned.of(core, {**prompt, **choice})
    assert torch.equal(pinned.generate(**prompt, **how), expected) and pinned.core is core
    assert torch.equal(pinned(**prompt).logits, twin(**prompt, **choice, strategy="folded").logits)
    own = score(core, [[5, 6]], [[7]], 1, choice)[0]
    assert own.log_likelihood == pytest.approx(twin.score([[5, 6]], [[7]], **choice)[0].log_likelihood, abs=1e-9)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda core: pickle.loads(pickle.dumps(core))], ids=["copy", "pickle"])
def test_a_core_is_copied_and_pickled(lab: Any, how: Any) -> None:
    case = lab.case("bert", torch.float32)
    core = Core(case.twin(2).package_now(), None)
    core.strategy, core.experts_per_row = "grouped", None
    again = how(core)
    assert type(again) is Core and (again.strategy, again.experts_per_row) == ("grouped", None)
    names = ["e0", "e1", "e2", "e0", "e1"]
    assert torch.equal(call(again, **case.batch, expert=names).logits, call(core, **case.batch, expert=names).logits)
    assert again.model is not core.model and again.runtime is not core.runtime


def test_a_method_is_named_by_the_class_of_its_object(lab: Any) -> None:
    """Not by the class that it is written in, which a caller does not know."""
    twin = lab.case("bert", torch.float32).twin(2)
    for call_wrongly, says in (
        (lambda: twin.weights_for(["e0"]), "Twin.weights_for takes mixture as a mapping"),
        (lambda: twin.score("a", ["b"]), "Twin.score takes contexts as a list, not 'a'"),
        (lambda: twin.explain({}, measure="no"), "Twin.explain takes measure as True or False"),
    ):
        with pytest.raises(TwinmergeError, match=says):
            call_wrongly()
