"""One meaning, several ways: stacked, grouped, folded and rebuild give the same answers, and the planner picks one."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from twinmerge.errors import TwinmergeError
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.modules import State, attach
from twinmerge.twin.mixing.parts import Low
from twinmerge.twin.mixing.planner import STRATEGIES, Machine, Planner
from twinmerge.twin.twin import Twin

FAMILIES = ["bert", "roberta", "vit", "clip_vision", "gpt2_classifier", "llama", "llama_tied", "t5"]


@pytest.mark.few(11)
@pytest.mark.parametrize("kind", ["soft", "one_hot", "sparse", "raw"])
@pytest.mark.parametrize("name", FAMILIES)
def test_serving01_every_strategy_is_one_function(lab: Any, name: str, kind: str) -> None:
    """Serving 1, check 16: all ways agree on whole models of several families, heads and their order included."""
    case, twin = lab.case(name), lab.twin(name, rank=3)
    bound = 1e-6 if case.family.float32_inside else 1e-10
    weights = lab.mixtures(kind)
    heads = ["e1", "e0", "e2", "e0", "e1"] if case.heads else None
    found = {
        s: twin(**case.batch, mixture=weights, unconstrained=True, head=heads, strategy=s)
        for s in ("stacked", "grouped", "rebuild")
    }
    reference = lab.answer(found["rebuild"])
    for strategy, out in found.items():
        assert out.strategy == strategy and out.head == heads
        assert lab.relative(lab.answer(out).nan_to_num(neginf=0), reference.nan_to_num(neginf=0)) <= bound
    one = weights[:1].expand(5, 3)
    folded = [twin(**case.batch, mixture=one, unconstrained=True, head=heads, strategy=s) for s in STRATEGIES]
    for out in folded[1:]:
        answers = [lab.answer(o).nan_to_num(neginf=0) for o in (out, folded[0])]
        assert lab.relative(*answers) <= bound


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_serving01_layers_of_any_shape(lab: Any, dtype: torch.dtype, bound: float) -> None:
    """Serving 1: 200 random layers, experts of ragged ranks, some without a part, against a dense rebuild in
    float64."""
    random = np.random.default_rng(0)
    for case in range(200):
        torch.manual_seed(case)
        d, m, rows, positions, experts = (int(random.integers(1, n)) for n in (40, 40, 9, 6, 7))
        ranks = [int(random.integers(0, 9)) for _ in range(experts)]
        ranks[int(random.integers(experts))] += 1
        layer = nn.Linear(d, m).to(dtype).requires_grad_(False)
        factors = {
            i: (torch.randn(m, r).to(dtype), (torch.randn(r, d) / (d * r) ** 0.5).to(dtype))
            for i, r in enumerate(ranks)
            if r
        }
        weights = torch.softmax(torch.randn(rows, experts), -1)
        if case % 2:
            keep = int(random.integers(1, experts + 1))
            weights = torch.where(weights >= weights.topk(keep).values[:, -1:], weights, 0)
        x = torch.randn(rows, positions, d).to(dtype)
        expected = layer.weight.double() @ x.double().mT + layer.bias.double()[:, None]
        for i, (b, a) in factors.items():
            expected += weights[:, i].double()[:, None, None] * (b.double() @ a.double() @ x.double().mT)
        state = State()
        attach(state, "layer", layer, None, {"weight": Low("w", factors, experts)})
        for grouped in (False, True):
            mixture = Mixture.of(weights, grouped)
            order = torch.arange(rows) if mixture.order is None else mixture.order
            state.mixture = mixture
            assert lab.relative(layer(x[order]).double(), expected.mT[order]) <= bound


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=12), st.booleans(), st.booleans())
def test_blocks_hold_every_weight_once_and_no_expert_in_vain(
    pattern: list[list[bool]], grouped: bool, reorder: bool
) -> None:
    weights = torch.tensor(pattern).float()
    mixture = Mixture.of(weights, grouped, reorder)
    times = torch.zeros(len(weights), 4)
    for block in mixture.blocks:
        times[block.rows, block.experts] += 1
        assert (mixture.weights[:, block.experts] != 0).any(0).all()
    assert (times <= 1).all() and (times[mixture.weights != 0] == 1).all()
    if grouped:
        assert (times[mixture.weights == 0] == 0).all()
    if mixture.order is not None:
        assert reorder and torch.equal(weights[mixture.order], mixture.weights)
    if reorder and grouped and (weights.sum(1) <= 1).all():
        assert len(mixture.blocks) == len(mixture.used)  # each expert's rows lie side by side


def test_check16_weights_come_back_to_the_bit(lab: Any) -> None:
    """Check 16: after folding and rebuilding every parameter is the same object with the same bits."""
    twin = lab.case("bert", torch.float32).twin(3)
    before = {n: (p, p.clone()) for n, p in twin.model.named_parameters()}
    for strategy in ("folded", "rebuild"):
        twin(**lab.case("bert", torch.float32).batch, mixture={"e0": 0.5, "e2": 0.5}, strategy=strategy)
    with pytest.raises(TwinmergeError, match="has 90 tokens in a row, and the model takes 40"):
        twin(input_ids=torch.zeros(2, 90, dtype=torch.int64), expert="e0", strategy="folded")
    after = dict(twin.model.named_parameters())
    assert all(after[n] is p and torch.equal(p, value) for n, (p, value) in before.items())


def test_folded_weights_are_kept_for_the_next_call_and_given_back(lab: Any) -> None:
    twin = lab.new_case("bert").twin(3)
    batch, mixture = lab.case("bert").batch, torch.tensor([0.5, 0.25, 0.25])
    twin(**batch, mixture=mixture, strategy="folded")
    assert twin.runtime.is_folded(mixture) and twin.planner.folding(mixture) == 0
    twin(**batch, mixture={"e0": 1.0}, strategy="folded")
    assert not twin.runtime.is_folded(mixture)
    twin.runtime.forget()
    assert twin.planner.folding(torch.tensor([1.0, 0, 0])) > 0


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
@pytest.mark.parametrize("rows", [2, 64])
def test_serving02_a_row_does_not_depend_on_its_batch_whatever_the_strategy(lab: Any, name: str, rows: int) -> None:
    """Serving 2, check 9: alone, shuffled, or among others: relative difference ≤ 1e-5."""
    twin = lab.twin(name, torch.float32, 3)
    batch = lab.text_batch(rows, 6, seed=1)
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :3].contiguous()
    weights = lab.mixtures("one_hot", rows).float()
    weights[::3] = lab.mixtures("soft", rows).float()[::3]
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    options = {"head": "e0"} if name == "bert" else {}
    for strategy in ("stacked", "grouped", "rebuild", "auto"):
        whole = lab.answer(twin(**batch, mixture=weights, strategy=strategy, **options))
        mixed = lab.answer(
            twin(**{k: v[shuffled] for k, v in batch.items()}, mixture=weights[shuffled], strategy=strategy, **options)
        )
        assert lab.relative(mixed, whole[shuffled]) <= 1e-5
        for row in range(0, rows, 7):
            one = {k: v[row : row + 1] for k, v in batch.items()}
            alone = lab.answer(twin(**one, mixture=weights[row : row + 1], strategy=strategy, **options))
            assert lab.relative(alone[0], whole[row]) <= 1e-5


# ---------------------------------------------------------------------------------------- the planner


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that every run of the tests shares."""
    machine = Machine(1e11, 1e11, 1e10, 2e-5, 5e-6)
    monkeypatch.setattr(Planner, "machine", property(lambda self: machine))
    return machine


def test_serving07_the_planner_follows_the_operations(lab: Any, steady: Machine) -> None:
    """Serving 7: one mixture of many tokens is folded, of few it is mixed; rows of one expert each are grouped where
    ranks are large; the break-even is dm / (d + m) for any rank."""
    twin = lab.twin("bert", torch.float32, 3)
    planner = twin.planner
    soft, one = lab.mixtures("soft", 32).float(), torch.tensor([[0.5, 0.3, 0.2]]).expand(32, 3)
    assert planner.choose(one, 100_000) == "folded"
    assert planner.choose(soft, 16) == "stacked"
    apart = planner.predict(lab.mixtures("one_hot", 32).float(), 10_000)
    assert apart["grouped"] < apart["stacked"]
    d, inner = 32, 48
    assert planner.break_even() == pytest.approx(
        (2 * (4 * d * d + 2 * d * inner) + d * d) / (2 * (8 * d + 2 * (d + inner)) + 2 * d), rel=1e-6
    )
    long = planner.predict(one, 1, steps=5000)
    assert long["folded"] < long["stacked"]


def test_serving07_folding_pays_from_the_break_even_on(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving 7: with operations alone, predicted costs cross at dm / (d + m) tokens, within 25 %."""
    planner = copy.copy(lab.twin("bert", torch.float32, 3).planner)
    planner.sites = Counter({site: n for site, n in planner.sites.items() if not site.lookup})
    planner.small = 0
    free = Machine(1e11, 1e11, 1e30, 0.0, 0.0)
    monkeypatch.setattr(Planner, "machine", property(lambda self: free))
    one = torch.full((1, 3), 1 / 3)
    tokens = next(t for t in range(1, 1000) if planner.predict(one, t)["folded"] < planner.predict(one, t)["stacked"])
    assert abs(tokens - planner.break_even()) <= 0.25 * planner.break_even()


def test_serving07_explain_tells_predicted_and_measured(lab: Any) -> None:
    twin = lab.twin("bert", torch.float32, 3)
    found = twin.explain(lab.case("bert", torch.float32).batch, mixture=lab.mixtures("soft").float(), repeats=2)
    assert set(found.predicted) == set(found.measured) == {"stacked", "grouped", "rebuild"}
    assert found.chosen in found.predicted and found.shared > 0 and found.mixtures == 5
    lines = str(found).splitlines()
    assert len(lines) == 6 and sum("<- chosen" in line for line in lines) == 1
    uniform = twin.explain(lab.case("bert", torch.float32).batch, expert="e0", repeats=1)
    assert "folded" in uniform.measured
    assert not twin.explain(lab.case("bert", torch.float32).batch, expert="e0", measure=False).measured


def test_bfloat16_is_not_folded_unless_asked(lab: Any, steady: Machine) -> None:
    """Check 17: weights of 16 bits would round small changes away."""
    twin = lab.case("bert", torch.float32).twin(3)
    twin(**lab.case("bert", torch.float32).batch, expert="e0", strategy="folded")
    twin.bfloat16()
    assert twin.planner.dtype == torch.bfloat16 and not twin.runtime.is_folded(torch.tensor([1.0, 0, 0]))
    one = torch.tensor([[0.5, 0.3, 0.2]]).expand(32, 3)
    assert twin.planner.choose(one, 100_000) in ("stacked", "grouped")
    assert twin.planner.choose(one, 100_000, strategy="folded") == "folded"


@pytest.mark.parametrize(
    "strategy, mixture, says",
    [
        ("fast", {"e0": 1.0}, "Unknown strategy 'fast'.*stacked"),
        ("folded", [{"e0": 1.0}, {"e1": 1.0}, {"e0": 1.0}, {"e1": 1.0}, {"e2": 1.0}], "different mixtures.*rebuild"),
    ],
)
def test_strategies_that_cannot_be(lab: Any, strategy: str, mixture: Any, says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        lab.twin("bert")(**lab.case("bert").batch, mixture=mixture, strategy=strategy)


def test_experts_that_hold_nan_are_refused_by_name_and_harm_nobody_else(lab: Any) -> None:
    case = lab.new_case("bert")
    twin = case.twin(3)
    part = twin.package.exclusive["e1"]
    name = next(iter(part.low))
    part.low[name].b[0, 0] = torch.nan
    broken = Twin(twin.package, None)
    for strategy in ("stacked", "grouped"):
        answer = broken(**case.batch, expert=["e0", "e2", "e0", "e2", "e0"], strategy=strategy)
        assert torch.equal(
            answer.logits,
            twin(**case.batch, expert=["e0", "e2", "e0", "e2", "e0"], strategy=strategy).logits,
        )
        with pytest.raises(TwinmergeError, match=f"{name}.*NaN"):
            broken(**case.batch, expert=["e0", "e1", "e0", "e2", "e0"], strategy=strategy)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 1000))
def test_serving09_sparse_gates_take_the_work_of_their_experts(lab: Any, rows: int, top: int, seed: int) -> None:
    """Serving 9: the columns that a grouped batch multiplies are those of the experts that its rows use."""
    weights = torch.softmax(torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)), -1)
    kept = weights.topk(top).indices
    sparse = torch.zeros_like(weights).scatter(1, kept, weights.gather(1, kept))
    mixture = Mixture.of(sparse)
    work = sum((b.rows.stop - b.rows.start) * (b.experts.stop - b.experts.start) for b in mixture.blocks)
    assert work == rows * top or mixture.uniform
