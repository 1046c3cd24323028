"""Shared and exclusive parts: checks 1, 4, 5, 6, 7, 11, 23 and 29."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaModel

from twinmerge.engine.calls import merge
from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors, rank_of_rate, retained_energy
from twinmerge.methods.kit.registry import make_method
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.split import Exclusive, cut, linear_coefficients, official_generative, split
from twinmerge.twin.twin import Twin


def mixed(shared: Tensor, parts: dict[str, Exclusive], name: str, weights: list[float]) -> Tensor:
    """θs + Σ wt vt of one tensor by the packed parts, in float64."""
    total = shared.double()
    for w, part in zip(weights, parts.values(), strict=True):
        if name in part.low:
            b, a = part.low[name]
            total = total + w * (b.double() @ a.double()).reshape(shared.shape)
        elif name in part.dense:
            total = total + w * part.dense[name].double()
    return total


# ---------------------------------------------------------------------------------------- check 1


@pytest.mark.parametrize(
    "method, parameters",
    [("task_arithmetic", {"scale": 0.0}), ("task_arithmetic", {"scale": 0.29}), ("ties", {}), ("tsv", {})],
    ids=["base", "arithmetic", "ties", "tsv"],
)
def test_check1_shared_part_cancels(lab: Any, method: str, parameters: dict[str, float]) -> None:
    """Check 1: at full rank and Σw = 1 the result is Σ wt θt, whatever the shared part."""
    case = lab.case("bert")
    parts = {"rank": None, "shared": method, "progress": False}
    twin = Twin.build(case.base, case.experts, **parts, **parameters)
    weights = lab.mixtures("soft")[0].tolist()
    seen = 0
    for name in twin.package.shared.specs:
        states = [m.state_dict()[f"bert.{name}"] for m in case.experts.values()]
        expected = sum(w * s for w, s in zip(weights, states, strict=True))
        assert lab.relative(mixed(twin.package.shared.read(name), twin.package.exclusive, name, weights), expected) <= (
            1e-12
        )
        seen += 1
    assert seen == len(case.base.state_dict())


def test_check1_random_shared_part(lab: Any) -> None:
    """Check 1: also where θs is any tensor at all."""
    torch.manual_seed(0)
    shapes = {"w": (9, 7), "kernel": (6, 3, 2, 2), "row": (1, 8), "b": (5,)}
    states = [{n: torch.randn(s).double() for n, s in shapes.items()} for _ in range(3)]
    shared = {n: torch.randn(s).double() for n, s in shapes.items()}
    parts = split(shared, {f"e{i}": lab.opened(s) for i, s in enumerate(states)}, list(shapes), None, progress=False)
    for name in shapes:
        expected = 0.2 * states[0][name] + 0.5 * states[1][name] + 0.3 * states[2][name]
        assert lab.relative(mixed(shared[name], parts, name, [0.2, 0.5, 0.3]), expected) <= 1e-12


# ---------------------------------------------------------------------------------------- check 4


def on_grid(model: torch.nn.Module, step: float) -> Any:
    """A copy whose parameters are multiples of `step`, so that sums of a few are exact in float32."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p / step).round() * step)
    return model


def test_check4_task_arithmetic(lab: Any) -> None:
    """Check 4: θs − θ0 = λ Σ τt; λ = 1/T is the average, λ = 0 the base. On a grid where float32 rounds nothing: 1e-12;
    on any numbers to float32's last digit, in which the static engine writes."""
    case = lab.new_case("bert", experts=4)
    case.base = on_grid(case.base, 2**-8)
    case.experts = {n: on_grid(m, 2**-8) for n, m in case.experts.items()}
    base = case.base.state_dict()
    taus = {n: [m.state_dict()[f"bert.{n}"] - t for m in case.experts.values()] for n, t in base.items()}
    for scale in (0.375, 0.25, 0.0):
        shared = case.twin(2, scale=scale).package.shared
        for name, start in base.items():
            expected = start + scale * sum(taus[name])
            assert lab.relative(shared.read(name), expected) <= 1e-12
            if scale == 0.25:
                mean = sum(m.state_dict()[f"bert.{name}"] for m in case.experts.values()) / 4
                assert lab.relative(shared.read(name), mean) <= 1e-12
            if scale == 0:
                assert torch.equal(shared.read(name), start)
    case = lab.case("bert")
    for name, start in case.base.state_dict().items():
        change = sum(m.state_dict()[f"bert.{name}"] - start for m in case.experts.values())
        assert lab.relative(lab.twin("bert").package.shared.read(name), start + 0.29 * change) <= 2e-7


# ---------------------------------------------------------------------------------------- checks 5, 6, 7


@pytest.mark.parametrize(
    "rate, side, rank",
    [
        (0.9, 768, 76),
        (0.9, 514, 51),
        (0.9, 1, 0),
        (0.99, 768, 7),
        (0.998, 768, 1),
        (0.9987, 768, 0),
        (0.9, 5120, 511),
        (0.9, 1000, 99),
        (0.9, 3840, 383),
    ],
)
def test_check5_rank_rule(rate: float, side: int, rank: int) -> None:
    """Check 5: the official rule, floor and all."""
    assert rank_of_rate(rate, (side, 10_000)) == rank
    assert rank_of_rate(rate, (10_000, side)) == rank


@pytest.mark.parametrize("rank", [0, -1])
def test_check5_rank_below_one_is_refused(lab: Any, rank: int) -> None:
    """Check 5: where the official code silently keeps nothing, we refuse: on building and on cutting."""
    with pytest.raises(TwinmergeError, match=f"rank={rank} is out of range. Give at least 1"):
        lab.case("bert").twin(rank)
    with pytest.raises(TwinmergeError, match=f"rank={rank} is out of range. Give at least 1"):
        lab.twin("bert", torch.float64, 3).at_rank(rank)


def test_check5_rank_one_keeps_every_matrix_and_all_vectors(lab: Any) -> None:
    """Check 5: rank 1 leaves something of every changed matrix; RoBERTa's (1, d) token type stays whole."""
    case, part = lab.case("roberta"), lab.case("roberta").twin(1).package.exclusive["e0"]
    matrices = [n for n, t in case.base.state_dict().items() if t.dim() > 1 and t.shape[0] > 1 and "pooler" not in n]
    assert sorted(part.low) == sorted(matrices)
    assert {f.rank for f in part.low.values()} == {1}
    name = "embeddings.token_type_embeddings.weight"
    expected = case.experts["e0"].state_dict()[f"roberta.{name}"] - case.shared[name]
    assert torch.equal(part.dense[name], expected) and expected.shape == (1, 32)


def one(lab: Any, delta: Tensor, rank: int | None) -> Exclusive:
    shared = {"w": torch.zeros_like(delta)}
    return split(shared, {"e": lab.opened({"w": delta})}, ["w"], rank, progress=False)["e"]


def test_check6_eckart_young(lab: Any) -> None:
    """Check 6: the cut's error is Σ of the dropped σ², and the energy kept grows with the rank."""
    delta = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = torch.linalg.svdvals(delta)
    energies = []
    for rank in (1, 2, 5, 15, 29):
        factors = one(lab, delta, rank).low["w"]
        assert factors.rank == rank
        error = float((delta - factors.dense()).square().sum())
        assert error == pytest.approx(float(s[rank:].square().sum()), rel=1e-9)
        energies.append(retained_energy(delta, factors))
    assert energies == sorted(energies) and energies[0] < energies[-1] < 1


def test_check6_fast_path(lab: Any) -> None:
    """Check 6: the randomised path stays within 1 % of the best error on σi = 1/i."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(300, 260, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(400, 260, dtype=torch.float64))
    s = 1 / torch.arange(1, 261, dtype=torch.float64)
    delta = (u * s) @ v.T
    for rank in (4, 16, 32):
        error = float((delta - one(lab, delta, rank).low["w"].dense()).square().sum())
        best = float(s[rank:].square().sum())
        assert best * (1 - 1e-9) <= error <= 1.01 * best


def test_check7_degenerate_matrices(lab: Any) -> None:
    """Check 7: zero, zero rows, rank 1, repeated singular values, (1, n) and (m, 1): exact and no crash."""
    torch.manual_seed(0)
    half = torch.randn(514, 24, dtype=torch.float64)
    half[130:] = 0
    single = torch.outer(torch.randn(9).double(), torch.randn(7).double())
    repeated = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    for delta in (half, single, repeated, torch.eye(8).double()):
        for rank in (None, min(delta.shape)):
            part = one(lab, delta, rank)
            assert not part.dense
            assert (part.low["w"].dense() - delta).abs().max() <= 1e-10
    assert one(lab, single, 5).low["w"].rank == 1
    assert one(lab, half, None).low["w"].rank == 24
    zero = one(lab, torch.zeros(6, 5, dtype=torch.float64), 2)
    assert zero == Exclusive({}, {})
    for flat in (torch.randn(1, 8).double(), torch.randn(8, 1).double()):
        assert torch.equal(one(lab, flat, 1).dense["w"], flat)


def test_check7_nan_is_named(lab: Any) -> None:
    """Check 7: NaN is refused with the tensor's name, and the expert's where a twin is built."""
    delta = torch.ones(6, 5)
    delta[2, 2] = torch.nan
    with pytest.raises(TwinmergeError, match="^w holds NaN"):
        one(lab, delta, 2)
    case = lab.new_case("bert")
    with torch.no_grad():
        case.experts["e1"].bert.pooler.dense.weight[0, 0] = torch.nan
    with pytest.raises(TwinmergeError, match="'pooler.dense.weight' of the expert 'e1' holds NaN"):
        case.twin(2)


def test_at_rank_is_the_twin_built_at_that_rank(lab: Any) -> None:
    case = lab.case("bert")
    small, built = lab.twin("bert", torch.float64, None).at_rank(2), case.twin(2)
    a, b = (t(**case.batch, mixture=lab.mixtures("soft"), head="e1").logits for t in (small, built))
    assert (a - b).abs().max() <= 1e-10
    assert small.package.shared is lab.twin("bert", torch.float64, None).package.shared


# ---------------------------------------------------------------------------------------- check 11: LoRA


def lora_models(base: torch.nn.Module, count: int = 3, rank: int = 2, grid: float | None = None) -> dict[str, Any]:
    """Adapters with independent A and B; on a grid of which products and sums are exact in float32."""
    models = {}
    for i in range(count):
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"], task_type="FEATURE_EXTRACTION"
        )
        model = get_peft_model(copy.deepcopy(base), config).eval()
        generator = torch.Generator().manual_seed(i)
        for name, p in model.named_parameters():
            if "lora_" in name:
                value = torch.randint(-2, 3, p.shape, generator=generator) * grid if grid else None
                noise = torch.randn(p.shape, generator=generator) * 0.3
                p.data.copy_(noise if value is None else value)
        models[f"e{i}"] = model
    return models


def lora_base(lab: Any, grid: float | None = None) -> LlamaModel:
    torch.manual_seed(0)
    sizes = {**lab.text, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2}
    base = lab.nudged(LlamaModel(LlamaConfig(**sizes)), 0.1, 3)
    return on_grid(base, grid) if grid else base


def ba_of(model: Any, name: str) -> Tensor:
    """(alpha/r) B A by PEFT itself."""
    module = model.get_base_model().get_submodule(name.removesuffix(".weight"))
    return module.get_delta_weight("default").detach().double()


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_check11_lora_product_space(lab: Any, where: str, tmp_path: Path) -> None:
    """Check 11: with no truncation the change is Σ wt Bt At to 1e-12, of rank ≤ T ρ, for PEFT models and folders."""
    base = lora_base(lab, 2**-6)
    models = lora_models(base, grid=2**-3)
    given: dict[str, Any] = dict(models)
    start: Any = base
    if where == "disk":
        base.save_pretrained(tmp_path / "base")
        for name, model in models.items():
            model.save_pretrained(tmp_path / name)
        start = str(tmp_path / "base")
        given = {n: f"{tmp_path / 'base'}+{tmp_path / n}" for n in models}
    twin = Twin.build(start, given, rank=None, shared="task_arithmetic", scale=0.25, progress=False)
    part = twin.package.exclusive
    adapted = sorted(part["e0"].low)
    assert adapted == sorted(f"layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qv")
    w = [0.55, 0.3, 0.15]
    for name in adapted:
        change = mixed(twin.package.shared.read(name), part, name, w) - base.state_dict()[name].double()
        expected = sum(wt * ba_of(m, name) for wt, m in zip(w, models.values(), strict=True))
        assert lab.relative(change, expected) <= 1e-12
        assert all(p.low[name].rank <= 3 * 2 for p in part.values())
    ids = lab.text_batch()
    with torch.no_grad():
        expected = models["e2"](**ids).last_hidden_state
    assert (twin(**ids, expert="e2").output.last_hidden_state - expected).abs().max() <= 1e-5


def test_check11_lora_truncation_is_the_best_of_its_rank(lab: Any) -> None:
    """Check 11: below T ρ the product is cut as Eckart and Young say, also from a twin that was kept whole."""
    base, name = lora_base(lab), "layers.0.self_attn.q_proj.weight"
    models = lora_models(base)
    options: dict[str, Any] = {"shared": "task_arithmetic", "scale": 0.3, "progress": False}
    whole, small = (Twin.build(base, models, rank=r, **options) for r in (None, 2))
    exact = ba_of(models["e0"], name) - 0.3 * sum(ba_of(m, name) for m in models.values())
    best = lab.truncated(exact, 2)
    assert lab.relative(whole.package.exclusive["e0"].low[name].dense().double(), exact) <= 1e-6
    for twin in (small, whole.at_rank(2)):
        found = twin.package.exclusive["e0"].low[name]
        assert found.rank == 2
        assert lab.relative(found.dense().double(), best) <= 1e-5


def test_check11_float64_factors_keep_their_digits(lab: Any) -> None:
    """Check 11: split itself, on float64 factors: vt = Bt At − Σ ci Bi Ai to 1e-12 and no matrix on the way."""
    torch.manual_seed(0)
    factors = [Factors(torch.randn(20, 2).double(), torch.randn(2, 16).double()) for _ in range(3)]
    models = {f"e{i}": lab.opened({"w": torch.zeros(20, 16).double()}, {"w": f}) for i, f in enumerate(factors)}
    shared = {"w": torch.zeros(20, 16).double()}
    parts = split(shared, models, ["w"], None, [0.3, 0.3, 0.3], progress=False)
    total = sum(f.b @ f.a for f in factors)
    for i, part in enumerate(parts.values()):
        expected = factors[i].b @ factors[i].a - 0.3 * total
        assert lab.relative(part.low["w"].b @ part.low["w"].a, expected) <= 1e-12
        assert part.low["w"].rank <= 6
        cut_part = cut(part, 2).low["w"]
        assert lab.relative(cut_part.b @ cut_part.a, lab.truncated(expected, 2)) <= 1e-10


@pytest.mark.parametrize("rank", [None, 4])
def test_check11_official_generative(lab: Any, rank: int | None) -> None:
    """Check 11: the authors' code mixes A and B apart: (Bs + Σ w SVD(Bt − Bs)) (As + Σ w SVD(At − As))."""
    torch.manual_seed(0)
    a = [torch.randn(8, 24).double() for _ in range(4)]
    b = [torch.randn(20, 8).double() for _ in range(4)]
    w = [0.55, 0.25, 0.15, 0.05]
    sides = []
    for parts in (b, a):
        shared = 0.3 * sum(parts)
        sides.append(shared + sum(wt * lab.truncated(p - shared, rank) for wt, p in zip(w, parts, strict=True)))
    assert (official_generative(a, b, w, 0.3, rank) - sides[0] @ sides[1]).abs().max() <= 1e-10


@pytest.mark.parametrize("w, published", [([0.55, 0.25, 0.15, 0.05], 0.663), ([0.9, 0.1, 0.0, 0.0], None)])
def test_check11_official_differs_by_the_closed_form(lab: Any, w: list[float], published: float | None) -> None:
    """Check 11: on independent A and B the two differ by the closed form (5 %), and by nothing on one-hot weights."""
    torch.manual_seed(0)
    a = [torch.randn(32, 512) for _ in range(4)]
    b = [torch.randn(512, 32) for _ in range(4)]
    product = sum(wt * bt @ at for wt, bt, at in zip(w, b, a, strict=True))
    found = lab.relative(official_generative(a, b, w), product)
    square = sum(x * x for x in w)
    cross = square**2 - sum(x**4 for x in w)
    closed = ((sum((x - x * x) ** 2 for x in w) + cross) / square) ** 0.5
    assert found == pytest.approx(closed, rel=0.05) and found > 0.01
    if published is not None:
        assert closed == pytest.approx(published, abs=1e-3)
    one_hot = official_generative(a, b, [0.0, 1.0, 0.0, 0.0])
    assert lab.relative(one_hot, b[1] @ a[1]) <= 1e-5


# ---------------------------------------------------------------------------------------- check 23: identity


def test_check23_order_of_experts_changes_nothing(lab: Any) -> None:
    """Check 23: experts in another order, with the router's columns permuted alike: outputs equal to 1e-6."""
    case = lab.case("bert")
    order = [2, 0, 1]
    again = Twin.build(case.base, {f"e{i}": case.experts[f"e{i}"] for i in order}, 3, progress=False)
    first = Twin.build(case.base, case.experts, 3, progress=False)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    first.router, again.router = (
        GaussianRouter().of(weight, torch.zeros(3)),
        GaussianRouter().of(weight[order], torch.zeros(3)),
    )
    first.layers = again.layers = (1, 2)
    for k in (1, 2, None):
        a, b = first(**case.batch, experts_per_row=k), again(**case.batch, experts_per_row=k)
        assert a.expert == b.expert and a.head == b.head and len(set(a.expert)) > 1
        assert (a.mixture[:, order] - b.mixture).abs().max() <= 1e-6
        width = min(a.logits.shape[1], b.logits.shape[1])
        assert (a.logits[:, :width].exp() - b.logits[:, :width].exp()).abs().max() <= 1e-6


def test_check23_subset_by_name(lab: Any) -> None:
    """Check 23: a subset that is no prefix uses those very experts (the official code takes them by position)."""
    case = lab.case("bert")
    twin = Twin.build(case.base, {n: case.experts[n] for n in ("e2", "e1")}, None, progress=False)
    assert twin.experts == ["e2", "e1"]
    for name in ("e1", "e2"):
        with torch.no_grad():
            expected = case.experts[name](**case.batch).logits
        assert (twin(**case.batch, expert=name).logits - expected).abs().max() <= 1e-10
    a = twin(**case.batch, mixture={"e2": 0.75, "e1": 0.25}, head="e1").logits
    b = lab.twin("bert")(**case.batch, mixture={"e1": 0.25, "e2": 0.75}, head="e1").logits
    assert (a - b).abs().max() <= 1e-10


@pytest.mark.parametrize(
    "choice, words",
    [
        ({"expert": "e9"}, "no expert 'e9'.*The twin has: e0, e1, e2"),
        ({"mixture": {"e0": 0.5, "e11": 0.5}}, "no expert 'e11'.*Did you mean 'e1'"),
        ({"mixture": [{"e0": 1.0}, {"x": 1.0}, {}, {}, {}], "head": "e0"}, "no expert 'x'"),
        ({"expert": "e0", "head": "e7"}, "'e7'"),
        ({"expert": ["e0", "e1"]}, "5 rows need one expert or 5, got 2"),
        ({"expert": "e0", "head": ["e1"] * 4}, "5 rows need one head or 5, got 4"),
        ({"mixture": torch.ones(5, 2)}, r"The mixture is \[5, 2\]"),
        ({"mixture": torch.tensor([0.5, torch.nan, 0.5])}, "NaN"),
        ({"mixture": {"e0": 1.0}, "expert": "e0"}, "Both mixture and expert"),
        ({}, "no router"),
    ],
)
def test_check23_unknown_names_are_refused(lab: Any, choice: dict[str, Any], words: str) -> None:
    """Check 23: names and shapes that do not fit raise, with what would fit."""
    with pytest.raises(TwinmergeError, match=words):
        lab.twin("bert")(**lab.case("bert").batch, **choice)


def damaged(lab: Any, tmp_path: Path, change: Any) -> Twin:
    case = lab.case("bert")
    case.base.save_pretrained(tmp_path / "base")
    for name, model in case.experts.items():
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "e1" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return Twin.build(tmp_path / "base", {n: tmp_path / n for n in case.experts}, 2, progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("bert.encoder.layer.1.output.dense.bias"), "e1 lacks .*'encoder.layer.1.output.dense.bias'"),
        (lambda t: t.update({"bert.extra.weight": torch.ones(2, 2)}), "'(bert.)?extra.weight' of .*e1"),
        (
            lambda t: t.update({"bert.pooler.dense.weight": torch.ones(32, 31)}),
            r"e1 the tensor 'bert.pooler.dense.weight' is \[32, 31\], by its config",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_check23_tensors_that_do_not_fit_are_named(lab: Any, tmp_path: Path, change: Any, words: str) -> None:
    """Check 23: missing, unknown and misshapen tensors of an expert raise and are named; none is dropped."""
    with pytest.raises(TwinmergeError, match=words):
        damaged(lab, tmp_path, change)


def test_check23_sound_folders_build(lab: Any, tmp_path: Path) -> None:
    twin = damaged(lab, tmp_path, lambda t: None)
    assert twin.experts == ["e0", "e1", "e2"]


# ---------------------------------------------------------------------------------------- check 29: ablation


def test_check29_the_shared_part_matters_only_below_full_rank(lab: Any) -> None:
    """Check 29: "pretrained + dynamic" equals Twin at full rank with the same w, and differs below."""
    case, w = lab.case("bert"), lab.mixtures("soft")
    logits = {
        (scale, rank): case.twin(rank, scale=scale)(**case.batch, mixture=w, head="e1").logits
        for scale in (0.0, 0.3)
        for rank in (None, 2)
    }
    assert (logits[0.0, None] - logits[0.3, None]).abs().max() <= 1e-6
    assert (logits[0.0, 2] - logits[0.3, 2]).abs().max() > 1e-4


def test_labels_of_one_shape_stay_apart(lab: Any) -> None:
    """Classifiers of equal shape whose labels differ keep their own output layers."""
    torch.manual_seed(0)
    base = lab.nudged(BertModel(BertConfig(**lab.text)), 0.1, 1)
    experts = {}
    for i, words in enumerate((["no", "yes"], ["cold", "hot"])):
        config = BertConfig(id2label=dict(enumerate(words)), label2id={w: j for j, w in enumerate(words)}, **lab.text)
        model = BertForSequenceClassification(config).eval()
        model.bert.load_state_dict(lab.nudged(base, 0.02, i).state_dict())
        experts[f"e{i}"] = model
    twin = Twin.build(base, experts, None, progress=False)
    assert twin.model.labels("e0") == ["no", "yes"] and twin.model.labels("e1") == ["cold", "hot"]
    batch = lab.text_batch()
    out = twin(**batch, expert=["e1", "e0", "e1", "e0", "e1"])
    for row, name in enumerate(out.head):
        with torch.no_grad():
            expected = experts[name](**{k: v[row : row + 1] for k, v in batch.items()}).logits[0]
        assert (out.logits[row] - expected).abs().max() <= 1e-5


def test_shared_part_is_the_static_merge(lab: Any) -> None:
    """The default shared part is TSV-Merge as the engine writes it."""
    case = lab.case("bert")
    twin = Twin.build(case.base, case.experts, 2, progress=False)
    static = merge("tsv", base=case.base, experts=case.experts, progress=False).state_dict()
    assert all(torch.equal(twin.package.shared.read(n), t) for n, t in static.items())
    assert twin.package.provenance["twin"] == {"rank": 2, "shared": "tsv"}


def test_what_of_each_expert_is_in_the_shared_model():
    order = ("a", "b")

    def found(name, parameters):
        return linear_coefficients(make_method(name, order, parameters), order, ["b", "a"])

    assert found("average", {"weights": (1.0, 3.0)}) == [0.75, 0.25]
    assert found("average", {"normalize": False}) is None  # a sum of models is no sum of task vectors
    assert found("task_arithmetic", {"weights": (1.0, 3.0), "scale": 0.5}) == [1.5, 0.5]
    assert found("task_arithmetic", {"weights": (1.0, 3.0), "scale": 0.5, "normalize": True}) == [0.375, 0.125]
    assert found("ties", {}) is None
