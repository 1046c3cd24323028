"""Batches, mixtures and routers that cannot be: one sentence each, and nothing is half done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import GPT2ForTokenClassification

from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors
from twinmerge.twin.export import export_dense, export_lora
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.base import Router
from twinmerge.twin.routers.mlp import MlpRouter
from twinmerge.twin.routers.projection import ProjectionRouter
from twinmerge.twin.twin import Twin

NOBODY = {
    "input_ids": torch.zeros(0, 7, dtype=torch.int64),
    "attention_mask": torch.ones(0, 7, dtype=torch.int64),
}


def sentence(call: Any) -> str:
    """What a call is refused with."""
    with pytest.raises(TwinmergeError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400
    return text


@pytest.fixture(scope="module")
def routed(lab: Any) -> Twin:
    twin = lab.new_case("bert", torch.float32).twin(3)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        n: {"input_ids": torch.randint(3 + 15 * i, 18 + 15 * i, (20, 6), generator=generator)}
        for i, n in enumerate(twin.experts)
    }
    twin.fit_router(inputs, progress=False)
    return twin


# ---------------------------------------------------------------------------------------- no rows


@pytest.mark.parametrize(
    "choice",
    [{}, {"expert": "e0"}, {"expert": []}, {"mixture": {"e0": 1.0}}, {"mixture": []}, {"mixture": torch.zeros(0, 3)}],
    ids=["routed", "expert", "no experts", "mixture", "no mixtures", "empty tensor"],
)
def test_a_batch_of_no_rows(routed: Twin, choice: dict[str, Any]) -> None:
    says = "The batch holds no rows. Give at least one input."
    assert sentence(lambda: routed(**NOBODY, **choice)) == says
    assert sentence(lambda: routed.mixtures(NOBODY, **choice)) == says
    assert sentence(lambda: routed.explain(NOBODY, **choice)) == says


def test_no_rows_to_route_to_generate_from_or_to_learn_from(lab: Any, routed: Twin) -> None:
    writer = lab.case("gpt2", torch.float32).twin(3)
    nothing = dict.fromkeys(routed.experts, NOBODY)
    for call in (
        lambda: routed.route(NOBODY),
        lambda: routed.route(NOBODY, None),
        lambda: writer.generate(**NOBODY, expert="e0"),
        lambda: writer.generate(**NOBODY, mixture={"e0": 1.0}),
        lambda: writer.pin(**NOBODY, expert="e0"),
        lambda: routed.fit_router(nothing, progress=False),
        lambda: routed.compress(rank=1, inputs=nothing, progress=False),
        lambda: routed.add("e9", lab.case("bert", torch.float32).experts["e0"], NOBODY, progress=False),
    ):
        assert "holds no rows" in sentence(call)


def test_no_texts_have_no_labels(routed: Twin, lab: Any) -> None:
    assert routed.predict([]) == [] == routed.predict([], detail=True, expert="e0")
    assert lab.twin("gpt2").score([], []) == []


# ---------------------------------------------------------------------------------------- mixtures


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(width=32), min_size=3, max_size=3), st.booleans())
def test_only_mixtures_of_the_simplex_are_taken(routed: Twin, weights: list[float], by_name: bool) -> None:
    given = torch.tensor(weights)
    row = dict(zip(routed.experts, weights, strict=True)) if by_name else given
    fits = bool(given.isfinite().all()) and bool((given >= 0).all()) and not bool(given.sum() > 1 + 1e-4)

    def call() -> torch.Tensor:
        return routed.mixtures({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, mixture=row)

    if fits:
        assert torch.equal(call(), given.expand(2, 3))
    else:
        says = sentence(call)
        assert "NaN or infinity" in says or "at least 0 and add up to 1 at most" in says


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_never_taken(lab: Any, routed: Twin, tmp_path: Path, value: float) -> None:
    """Not with `unconstrained`, not with `normalize`, and no export leaves anything behind."""
    batch = lab.case("bert", torch.float32).batch
    bad = {"e0": 0.5, "e1": value}
    for call in (
        lambda: routed(**batch, mixture=bad, unconstrained=True),
        lambda: routed(**batch, mixture=bad, normalize=True),
        lambda: routed(**batch, mixture=[bad] * 5, head="e0"),
        lambda: routed(**batch, mixture=torch.tensor([0.5, value, 0.0]), unconstrained=True),
        lambda: routed.weights_for(bad),
        lambda: export_dense(routed, bad, tmp_path / "dense"),
        lambda: export_lora(routed, bad, tmp_path / "lora"),
    ):
        assert "NaN or infinity" in sentence(call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "mixture, normalize",
    [
        ("e0", False),
        (0.5, False),
        ([0.5, 0.5, 0.0], False),
        ([[0.5, 0.5, 0.0]] * 5, False),
        ({"e0": "half"}, False),
        ({"e0": None}, False),
        ({3: 1.0}, False),
        ({"e0": 1e39}, False),
        ({"e0": 3e38, "e1": 3e38}, True),
    ],
    ids=str,
)
def test_mixtures_of_another_type_are_refused_in_a_sentence(
    lab: Any, routed: Twin, mixture: Any, normalize: bool
) -> None:
    sentence(lambda: routed(**lab.case("bert", torch.float32).batch, mixture=mixture, normalize=normalize, head="e0"))


@pytest.mark.parametrize("names", [["e0"], ["e0", "e1"]])
def test_check30_oracle_biases_name_one_expert_for_each_row(lab: Any, routed: Twin, names: list[str]) -> None:
    call = partial(routed, **lab.case("bert", torch.float32).batch, expert="e0", oracle_biases=names)
    assert "5 rows" in sentence(call)


@pytest.mark.parametrize("name", ["e9", "", "E0", "e0 "])
def test_experts_that_are_not_there_are_refused_everywhere(lab: Any, routed: Twin, tmp_path: Path, name: str) -> None:
    batch = lab.case("bert", torch.float32).batch
    for call in (
        lambda: routed(**batch, expert=name),
        lambda: routed(**batch, mixture={name: 1.0}),
        lambda: routed(**batch, expert="e0", head=name),
        lambda: routed(**batch, expert="e0", oracle_biases=[name] * 5),
        lambda: routed.weights_for({name: 1.0}),
        lambda: routed.remove(name),
        lambda: routed.fit_router({name: batch}, progress=False),
        lambda: routed.compress(rank=1, inputs={name: batch}, progress=False),
        lambda: export_dense(routed, {"e0": 0.5, name: 0.5}, tmp_path / "dense"),
        lambda: export_lora(routed, name, tmp_path / "lora"),
    ):
        assert f"There is no expert {name!r}" in sentence(call)
    assert list(tmp_path.iterdir()) == []


def test_heads_of_different_kinds_cannot_share_a_batch(lab: Any) -> None:
    case = lab.new_case("gpt2_classifier", torch.float32)
    tagger = GPT2ForTokenClassification(case.experts["e1"].config).eval()
    tagger.transformer.load_state_dict(case.experts["e1"].transformer.state_dict())
    twin = Twin.build(case.base, {"e0": case.experts["e0"], "e1": tagger}, 2, progress=False)
    assert "answer in different shapes" in sentence(lambda: twin(**case.batch, expert=["e0", "e1", "e0", "e1", "e0"]))
    assert twin(**case.batch, expert="e1").logits.shape == (5, 7, 3)


# ---------------------------------------------------------------------------------------- routers


def routers() -> dict[str, Router]:
    """Of three experts and eight features each."""
    return {
        "gaussian": GaussianRouter().of(torch.ones(3, 8), torch.zeros(3)),
        "mlp": MlpRouter().sized(8, 3),
        "projection": ProjectionRouter().from_bases(list(torch.eye(8)[:, :6].split(2, 1))),
    }


@pytest.mark.parametrize("kind", ["gaussian", "mlp", "projection"])
@pytest.mark.parametrize("width", [0, 1, 7, 9])
def test_features_of_another_width_name_both(kind: str, width: int) -> None:
    router = routers()[kind]
    assert router.shape == (3, 8)
    for features in (torch.ones(2, width), torch.ones(width)):
        for call in (router.logits, router.weights):
            assert f"reads 8 features of each input, got {width}." in sentence(partial(call, features))
    assert router.logits(torch.ones(2, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    "layers, says", [((1, 9), "layer 9, the model's last is 2"), ((-1,), "cannot read the layers"), ((), "cannot read")]
)
def test_layers_that_the_model_does_not_have(lab: Any, routed: Twin, layers: tuple[int, ...], says: str) -> None:
    batch = lab.case("bert", torch.float32).batch
    before = routed.router
    for kind in ("gaussian", "mlp"):
        fit = partial(routed.fit_router, kind=kind, layers=layers, progress=False)
        assert says in sentence(partial(fit, dict.fromkeys(routed.experts, batch)))
    assert routed.router is before and routed.layers == (1, 2)


def test_a_router_of_other_layers_names_both_widths(lab: Any, routed: Twin) -> None:
    batch = lab.case("bert", torch.float32).batch
    twin = routed.at_rank(1)
    twin.layers = (1,)
    assert "reads 64 features of each input, got 32" in sentence(lambda: twin(**batch))


# ---------------------------------------------------------------------------------------- models of another base


def adapted(folder: Path, factors: Factors) -> Path:
    """A PEFT folder that changes the first layer's queries."""
    folder.mkdir()
    where = "base_model.model.encoder.layer.0.attention.self.query"
    save_file(
        {f"{where}.lora_A.weight": factors.a, f"{where}.lora_B.weight": factors.b},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return folder


@pytest.mark.parametrize("shape", [(32, 31), (31, 32), (48, 48)])
def test_an_adapter_of_another_base_is_refused_by_its_shapes(lab: Any, tmp_path: Path, shape: tuple[int, int]) -> None:
    case = lab.case("bert", torch.float32)
    case.base.save_pretrained(tmp_path / "base")
    fits = adapted(tmp_path / "fits", Factors(torch.ones(32, 2), torch.ones(2, 32)))
    other = adapted(tmp_path / "other", Factors(torch.ones(shape[0], 2), torch.ones(2, shape[1])))
    base = str(tmp_path / "base")
    before = sorted(tmp_path.rglob("*"))

    def build(*folders: Path) -> Twin:
        return Twin.build(base, {f.name: f"{base}+{f}" for f in folders}, 1, progress=False)

    says = sentence(lambda: build(fits, other))
    assert "layer.0.attention.self.query" in says and str(shape[0]) in says
    assert sorted(tmp_path.rglob("*")) == before
    twin = build(fits)
    assert "layer.0.attention.self.query" in sentence(lambda: twin.add("other", f"{base}+{other}", progress=False))


def test_an_expert_of_another_training_is_refused(lab: Any) -> None:
    """Of the same shapes, but nothing in common with the base."""
    case = lab.new_case("bert", torch.float32)
    torch.manual_seed(5)
    stranger = case.family.expert(2)
    says = sentence(lambda: Twin.build(case.base, {"e0": case.experts["e0"], "x": stranger}, 1, progress=False))
    assert "does not come from the base" in says
    assert "does not come from" in sentence(lambda: case.twin(1).add("x", stranger, progress=False))
