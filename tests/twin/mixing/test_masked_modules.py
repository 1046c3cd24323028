"""Masked experts run by the twin: exact row by row under every way, and small in memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from twinmerge.errors import TwinmergeError
from twinmerge.twin.codebook import CodeBook
from twinmerge.twin.export import export_lora
from twinmerge.twin.masked import masked
from twinmerge.twin.mixing.forward import State
from twinmerge.twin.mixing.masked_modules import MAKING, apart
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.modules import attach
from twinmerge.twin.mixing.parts import Dense, Masks
from twinmerge.twin.mixing.planner import Machine, Planner
from twinmerge.twin.split import Exclusive
from twinmerge.twin.twin import Twin

SCALES = {"e0": 1.0, "e1": 0.75, "e2": 1.5}
HEADS = ["e1", "e0", "e2", "e0", "e1"]


def parts_of(case: Any, twin: Twin, seed: int = 3) -> dict[str, Exclusive]:
    """τ is the sum of the experts' changes; random masks, that of the last expert empty."""
    names = sorted({n for part in twin.package.exclusive.values() for n in part.names})
    states = [m.state_dict() for m in case.experts.values()]
    rng = torch.Generator().manual_seed(seed)
    vector, masks = {}, {e: {} for e in case.experts}
    for name in names:
        own = [next(t for key, t in state.items() if f".{key}".endswith(f".{name}")) for state in states]
        base = twin.package.shared.read(name)
        vector[name] = sum(t - base for t in own)
        for i, expert in enumerate(case.experts):
            masks[expert][name] = torch.rand(base.shape, generator=rng) < (0.6, 0.3, 0.0)[i % 3]
    return masked(vector, masks, {e: SCALES.get(e, 1.0) for e in case.experts})


def twin_of(case: Any, **options: Any) -> Twin:
    """The case's base and heads with masks in place of low-rank parts."""
    built = Twin.build(case.base, case.experts, 1, shared="task_arithmetic", scale=0.0, progress=False)
    return Twin(built.package._replace(exclusive=parts_of(case, built, **options)), None)


@lru_cache(maxsize=16)
def made(lab: Any, name: str, dtype: torch.dtype = torch.float64) -> Twin:
    return twin_of(lab.case(name, dtype))


@pytest.fixture(scope="module")
def lab_key(lab: Any) -> Any:
    """The helpers, as a key of the cache."""

    class Key(SimpleNamespace):
        __hash__ = object.__hash__

    return Key(**vars(lab))


def rebuilt(case: Any, twin: Twin, weights: Sequence[float], head: str) -> Any:
    """The expert's own class with θ0 + Σ w s m ⊙ τ, by plain arithmetic."""
    model = copy.deepcopy(case.experts[head])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            name = next((n for n in twin.package.shared.specs if f".{key}".endswith(f".{n}")), None)
            if name is not None:
                total = twin.package.shared.read(name).double()
                for w, part in zip(weights, twin.package.exclusive.values(), strict=True):
                    if name in part.masked:
                        m = part.masked[name]
                        total = total + float(w) * m.scale * m.vector.double() * m.mask()
                parameter.copy_(total)
    return model


FAMILIES = ["bert", "gpt2", "gpt2_classifier", "vit", "t5", "llama_tied", "clip_vision", "mpnet"]


@pytest.mark.few(26)
@pytest.mark.parametrize("strategy", ["stacked", "grouped", "rebuild", "auto"])
@pytest.mark.parametrize("kind", ["one_hot", "sparse", "soft", "raw"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_is_answered_by_its_own_dense_model(lab_key: Any, name: str, kind: str, strategy: str) -> None:
    """Exact: mixed batches, rows of no expert, of an empty mask, of several, whatever the way."""
    case, twin, weights = lab_key.case(name), made(lab_key, name), lab_key.mixtures(kind)
    heads = HEADS if case.heads else None
    answer = lab_key.answer(twin(**case.batch, mixture=weights, unconstrained=True, head=heads, strategy=strategy))
    bound = 1e-6 if case.family.float32_inside else 1e-10
    for row, w in enumerate(weights):
        head = HEADS[row] if case.heads else "e0"
        expected = case.alone(rebuilt(case, twin, w.tolist(), head), row)
        found = case.row_of(answer, row, int(head[1]))
        assert (found - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "t5"])
def test_float32_to_a_hundred_thousandth(lab_key: Any, name: str) -> None:
    case, twin = lab_key.case(name, torch.float32), made(lab_key, name, torch.float32)
    weights = lab_key.mixtures("sparse").float()
    heads = HEADS if case.heads else None
    for strategy in ("stacked", "grouped", "rebuild"):
        answer = lab_key.answer(twin(**case.batch, mixture=weights, head=heads, strategy=strategy))
        for row, w in enumerate(weights):
            head = HEADS[row] if case.heads else "e0"
            expected = case.alone(rebuilt(case, twin, w.tolist(), head), row)
            assert lab_key.relative(case.row_of(answer, row, int(head[1])), expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_one_mixture_folded_is_the_same_function(lab_key: Any, name: str) -> None:
    case, twin = lab_key.case(name), made(lab_key, name)
    answers = [
        lab_key.answer(twin(**case.batch, mixture={"e0": 0.5, "e1": 0.25}, strategy=s)).nan_to_num(neginf=0)
        for s in ("folded", "stacked", "grouped", "rebuild")
    ]
    assert all(lab_key.relative(a, answers[0]) <= 1e-6 for a in answers[1:])


def test_no_expert_is_the_shared_model_to_the_bit(lab_key: Any) -> None:
    case, twin = lab_key.case("bert"), made(lab_key, "bert")
    with torch.no_grad():
        expected = case.base(**case.batch).last_hidden_state
    none = twin(**case.batch, mixture={}, head="e0").logits
    empty = twin(**case.batch, expert="e2", head="e0").logits  # an empty mask
    assert torch.equal(twin.model.hidden_states(case.batch)[-1], expected)
    assert torch.allclose(empty, none, rtol=0, atol=1e-12)


@pytest.mark.parametrize("strategy", ["stacked", "grouped"])
def test_generation_keeps_each_prompt_s_mask(lab_key: Any, strategy: str) -> None:
    case, twin = lab_key.case("gpt2"), made(lab_key, "gpt2")
    prompts = case.batch["input_ids"][::2]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "pad_token_id": 1}
    got = twin.generate(input_ids=prompts, expert=["e1", "e0", "e2"], strategy=strategy, **options)
    for row, own in enumerate(("e1", "e0", "e2")):
        alone = rebuilt(case, twin, [float(e == own) for e in case.names], own).generate(
            prompts[row : row + 1], **options
        )
        assert torch.equal(got[row, : alone.shape[1]], alone[0])


def test_convolutions_and_batch_norms(lab: Any) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=6, hidden_sizes=[6, 10], depths=[1, 1], layer_type="basic")
    base = ResNetModel(config).double().eval()
    experts = {f"e{i}": lab.nudged(base, 0.03, i) for i in range(3)}
    case = SimpleNamespace(base=base, experts=experts)
    twin = twin_of(case)
    x = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    for kind in ("one_hot", "soft"):
        weights = lab.mixtures(kind)
        for strategy in ("stacked", "grouped", "rebuild"):
            got = twin(pixel_values=x, mixture=weights, strategy=strategy).output.last_hidden_state
            for row, w in enumerate(weights):
                model = copy.deepcopy(base)
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        for wt, part in zip(w, twin.package.exclusive.values(), strict=True):
                            p += wt * part.masked[name].dense()
                    expected = model(x[row : row + 1]).last_hidden_state[0]
                assert lab.relative(got[row], expected) <= 1e-10


@given(
    st.sampled_from(["linear", "table"]), st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 40),
    st.integers(1, 4), st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_layers_of_any_shape(
    kind: str, out: int, into: int, rows: int, positions: int, experts: int, seed: int
) -> None:
    """Widths that are no multiple of 8, one position, one row, few and many mixtures: against a dense rebuild in
    float64."""
    rng = torch.Generator().manual_seed(seed)
    layer: Any = nn.Linear(into, out, bias=bool(seed % 2)) if kind == "linear" else nn.Embedding(out, into)
    layer.double().requires_grad_(False)
    before = layer.weight.clone()
    vector = torch.randn(layer.weight.shape, generator=rng, dtype=torch.float64)
    masks = [torch.rand(vector.shape, generator=rng) < 0.5 for _ in range(experts)]
    scales = [1.0, 0.5, -2.0, 0.0][:experts]
    found = masked(
        {"w": vector}, {str(i): {"w": m} for i, m in enumerate(masks)}, {str(i): s for i, s in enumerate(scales)}
    )
    part = Masks("w", vector, [found[str(i)].masked["w"].bits for i in range(experts)], scales)
    weights = torch.randn(rows, experts, generator=rng, dtype=torch.float64)
    weights *= torch.rand(weights.shape, generator=rng) < 0.6
    if seed % 3:  # rows of one expert each, in full
        weights = torch.nn.functional.one_hot(weights.argmax(1), experts).double()
    if kind == "linear":
        x = torch.randn(rows, positions, into, generator=rng, dtype=torch.float64)
    else:
        x = torch.randint(0, out, (rows, positions), generator=rng)
    state = State()
    attach(state, "layer", layer, None, {"weight": part})
    dense = [before + sum(w * s * m * vector for w, s, m in zip(row, scales, masks, strict=True)) for row in weights]
    expected = [
        nn.functional.linear(one, d, layer.bias) if kind == "linear" else d[one]
        for one, d in zip(x, dense, strict=True)
    ]
    for grouped in (False, True):
        state.mixture = mixture = Mixture.of(weights, grouped)
        order = torch.arange(rows) if mixture.order is None else mixture.order
        assert torch.allclose(layer(x[order]), torch.stack(expected)[order], rtol=0, atol=1e-10)
    assert torch.equal(layer.weight, before)  # no bias or weight was written to


def test_few_experts_of_many_mixtures_are_made_once_each() -> None:
    soft = torch.softmax(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), -1)
    assert apart(Mixture.of(torch.eye(4)[[0, 1, 2, 3, 0]]), 1) and apart(Mixture.of(soft[:1].expand(32, 4)), 1)
    assert not apart(Mixture.of(soft), MAKING // 2) and apart(Mixture.of(soft), 2 * MAKING)


# ------------------------------------------------------------------------------------------------ memory


def test_masks_take_a_bit_for_each_weight_and_expert_and_the_vector_is_held_once(lab_key: Any) -> None:
    twin = made(lab_key, "bert", torch.float32)
    masks = [p for p in twin.runtime.parts.values() if isinstance(p, Masks)]
    vectors = {n: m.vector for n, m in twin.package.exclusive["e0"].masked.items()}
    assert {p.name for p in masks} == {n for n, v in vectors.items() if v.dim() > 1}
    for part in masks:
        assert part.vector is vectors[part.name]  # the tensor of the package itself
        for i, expert in enumerate(twin.experts):
            own = twin.package.exclusive[expert].masked[part.name]
            assert own.vector is part.vector and (not part.has[i] or part.bits(i) is own.bits)
        largest = max(b.numel() * b.element_size() for b in part.buffers())
        assert largest == vectors[part.name].nbytes
    held = sum(b.nbytes for b in twin.runtime.buffers())
    small = sum(p.stack.nbytes for p in twin.runtime.parts.values() if isinstance(p, Dense))
    whole = sum(v.numel() for v in vectors.values() if v.dim() > 1)
    assert held - small <= 4 * whole + len(twin.experts) * (whole / 8 + len(masks))
    assert small == 4 * len(twin.experts) * sum(v.numel() for v in vectors.values() if v.dim() == 1)
    assert twin.package.exclusive["e0"].numel() == -(-sum(-(-v.numel() // 8) for v in vectors.values()) // 4)


def test_a_pass_makes_one_module_s_weights_at_a_time(lab_key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert's mask of a matrix is unpacked once in a grouped batch of one expert a row, and not at all where
    unused."""
    twin, unpacked = made(lab_key, "bert", torch.float32), []
    mask = Masks.mask
    monkeypatch.setattr(Masks, "mask", lambda self, e: unpacked.append((self.name, e)) or mask(self, e))
    twin(**lab_key.case("bert", torch.float32).batch, expert=["e0", "e1", "e0", "e1", "e0"], strategy="grouped")
    assert len(unpacked) == len(set(unpacked)) and {e for _, e in unpacked} == {0, 1}
    assert not any("embeddings" in name for name, _ in unpacked)  # tables are read row by row


def test_buffers_follow_the_model_to_another_dtype_and_bits_stay_bits(lab_key: Any) -> None:
    case = lab_key.case("bert", torch.float32)
    twin = twin_of(case)
    want = twin(**case.batch, expert=HEADS).logits
    twin.double()
    masks = [p for p in twin.runtime.parts.values() if isinstance(p, Masks)]
    assert all(p.vector.dtype == torch.float64 and p.bits(0).dtype == torch.uint8 for p in masks)
    assert (
        lab_key.relative(
            twin(**case.batch, expert=HEADS).logits.nan_to_num(neginf=0), want.double().nan_to_num(neginf=0)
        )
        <= 1e-5
    )
    twin.bfloat16()
    assert all(p.vector.dtype == torch.bfloat16 and p.bits(0).dtype == torch.uint8 for p in masks)
    low = twin(**case.batch, expert=HEADS).logits.float().nan_to_num(neginf=0)
    assert lab_key.relative(low, want.nan_to_num(neginf=0)) <= 5e-2
    with torch.device("meta"):
        assert all(b.dtype in (torch.uint8, torch.bfloat16) for b in twin.runtime.to("meta").buffers())


# ------------------------------------------------------------------------------------------------ planner


def test_the_planner_groups_rows_of_one_expert_each(lab_key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "machine", property(lambda self: Machine(1e11, 1e11, 1e10, 2e-5, 5e-6)))
    twin = made(lab_key, "bert", torch.float32)
    hot = lab_key.mixtures("one_hot", 32).float()
    assert twin.planner.choose(hot, 16) == "grouped"
    predicted = twin.planner.predict(hot, 16)
    assert twin.planner.base(32 * 16) < predicted["grouped"] < min(predicted["stacked"], predicted["rebuild"])
    long = twin.planner.predict(hot[:1], 1, steps=1000)
    assert long["folded"] < long["stacked"]  # weights that are made once, not for each token


def test_explain_tells_of_every_way(lab_key: Any) -> None:
    case, twin = lab_key.case("bert", torch.float32), made(lab_key, "bert", torch.float32)
    found = twin.explain(case.batch, expert=HEADS, repeats=1)
    assert set(found.measured) == {"stacked", "grouped", "rebuild"} and found.break_even == 0
    assert "<- chosen" in str(found)


def header(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "twin.safetensors", "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["twinmerge"])
        return found


def test_a_twin_without_masks_says_nothing_of_them(lab: Any, tmp_path: Path) -> None:
    twin = lab.case("bert", torch.float32).twin(2)
    assert "masks" not in header(twin.save_pretrained(tmp_path / "plain"))


def test_masks_made_in_memory_are_kept(lab_key: Any, tmp_path: Path) -> None:
    case, twin = lab_key.case("gpt2", torch.float32), made(lab_key, "gpt2", torch.float32)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    w = lab_key.mixtures("soft").float()
    assert torch.equal(again(**case.batch, mixture=w).logits, twin(**case.batch, mixture=w).logits)
    assert header(tmp_path / "twin")["masks"]["method"] == "masks"
    assert load_file(tmp_path / "twin" / "twin.safetensors")["scales"].tolist() == list(SCALES.values())


def test_a_single_pass_twin_leaves_the_masks_below_out(lab_key: Any, tmp_path: Path) -> None:
    case, twin = lab_key.case("bert", torch.float32), made(lab_key, "bert", torch.float32)
    late = Twin.from_pretrained(twin.single_pass(1).save_pretrained(tmp_path / "late"))
    names = late.package.exclusive["e0"].names
    assert names and not any(n.startswith(("embeddings", "encoder.layer.0")) for n in names)
    assert torch.equal(late(**case.batch, expert="e0").logits, twin.single_pass(1)(**case.batch, expert="e0").logits)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "call",
    [
        lambda t, c: t.compress(rank=1),
        lambda t, c: t.at_rank(1),
        lambda t, c: t.refine({"e0": c.batch}),
        lambda t, c: t.add("new", c.experts["e0"]),
        lambda t, c: t.rebuild(),
        lambda t, c: CodeBook.fit(t, torch.eye(3), 3),
        lambda t, c: t.fit_router(kind="projection"),
    ],
    ids=["compress", "at_rank", "refine", "add", "rebuild", "codebook", "projection"],
)
def test_what_only_low_rank_parts_allow_is_refused(lab_key: Any, call: Any) -> None:
    with pytest.raises(
        TwinmergeError, match=r"^The experts are masks of one vector, which cannot be .*low-rank parts\.$"
    ):
        call(made(lab_key, "bert"), lab_key.case("bert"))


def test_an_adapter_of_masks_is_refused(lab_key: Any, tmp_path: Path) -> None:
    with pytest.raises(
        TwinmergeError, match="no low-rank factors, so no LoRA adapter holds them. Export dense weights"
    ):
        export_lora(made(lab_key, "bert"), "e0", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_nan_in_the_vector_is_refused_by_name_before_it_answers(lab: Any) -> None:
    case = lab.new_case("bert")
    twin = twin_of(case)
    vector = twin.package.exclusive["e1"].masked["pooler.dense.weight"].vector
    vector[3, 4] = torch.nan
    broken = Twin(twin.package, None)
    for strategy in ("stacked", "grouped", "folded", "rebuild"):
        with pytest.raises(TwinmergeError, match="'pooler.dense.weight' holds NaN or infinity"):
            broken(**case.batch, expert="e1", strategy=strategy)
    assert broken(**case.batch, mixture={}, head="e0").logits.isfinite().any()


@pytest.mark.parametrize(
    "masks, scales, says",
    [
        ({"a": {"x": torch.ones(2, 3).bool()}}, {}, "The vector lacks 'x'"),
        (
            {"a": {"w": torch.ones(3, 2).bool()}},
            {},
            r"mask of 'w' of 'a' is \[3, 2\] of torch.bool, the vector is \[2, 3\]",
        ),
        ({"a": {"w": torch.ones(2, 3)}}, {}, "of torch.float32"),
        ({"a": {}}, {"a": float("nan")}, "scale of 'a' is nan"),
    ],
)
def test_masks_that_do_not_fit_their_vector(masks: Any, scales: Any, says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        masked({"w": torch.ones(2, 3)}, masks, scales)


def test_experts_of_two_kinds_are_not_written(lab_key: Any, tmp_path: Path) -> None:
    twin = made(lab_key, "bert", torch.float32)
    mixed = {**twin.package.exclusive, "e1": Exclusive({}, {"pooler.dense.bias": torch.ones(32)})}
    with pytest.raises(TwinmergeError, match="'e1' is no mask, other experts are"):
        Twin(twin.package._replace(exclusive=mixed), None).save_pretrained(tmp_path / "twin")
    assert not (tmp_path / "twin").exists()
