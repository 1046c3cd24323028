"""Activation form against models rebuilt by plain arithmetic: checks 2, 3, 8, 9, 10, 12, 16 in part, and 22."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DebertaV2Config,
    DebertaV2Model,
    LongformerConfig,
    LongformerModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from twinmerge.errors import TwinmergeError
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.routers.gaussian import GaussianRouter
from twinmerge.twin.routers.kit.features import features
from twinmerge.twin.twin import Twin

NAMES = ["bert", "roberta", "vit", "clip_vision", "t5", "gpt2", "gpt2_classifier", "llama", "llama_tied", "mpnet"]


def tolerance(case: Any, dtype: torch.dtype, answer: torch.Tensor) -> float:
    """1e-10 in float64; in float32, and where transformers computes a norm in float32, 1e-5 × the output's spread."""
    exact = dtype == torch.float64 and not case.family.float32_inside
    return 1e-10 if exact else 1e-5 * float(answer[answer.isfinite()].std())


@pytest.mark.few(15)
@pytest.mark.parametrize(
    "dtype, rank", [(torch.float64, None), (torch.float64, 3), (torch.float32, 3)], ids=["whole", "rank3", "float32"]
)
@pytest.mark.parametrize("name", NAMES)
def test_check8_batched_equals_rebuilt(lab: Any, name: str, dtype: torch.dtype, rank: int | None) -> None:
    """Check 8: rows of other mixtures and lengths in one batch equal rebuilt models, one row at a time."""
    case, twin = lab.case(name, dtype), lab.twin(name, dtype, rank)
    kinds = ("soft", "sparse", "raw") if dtype == torch.float64 else ("soft", "sparse")
    for kind in kinds:
        weights = lab.mixtures(kind)
        heads = [case.names[row % 2] for row in range(len(weights))] if case.heads else None
        answer = lab.answer(twin(**case.batch, mixture=weights, unconstrained=True, head=heads))
        for row, w in enumerate(weights):
            model = case.rebuilt(w.tolist(), case.names[row % 2], rank)
            expected = case.alone(model, row)
            found = case.row_of(answer, row, row % 2)
            assert (found - expected).abs().max() <= tolerance(case, dtype, answer), (kind, row)
        if kind == "soft":  # the rows really differ from the shared model
            plain = case.alone(case.rebuilt([0.0] * 3, case.names[0]), 0)
            assert (case.row_of(answer, 0, 0) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_check2_one_hot_equals_expert(lab: Any, name: str) -> None:
    """Check 2: one-hot at full rank is the expert itself: norms, biases, embeddings, head."""
    case, twin = lab.case(name), lab.twin(name)
    owners = ["e2", "e0", "e2", "e1", "e0"]
    out = twin(**case.batch, expert=owners)
    assert out.expert == owners and out.head == (owners if case.heads else None)
    answer = lab.answer(out)
    for row, owner in enumerate(owners):
        expected = case.alone(case.experts[owner], row)
        found = case.row_of(answer, row, int(owner[1]))
        assert (found - expected).abs().max() <= tolerance(case, torch.float64, answer)


@pytest.mark.parametrize("name", ["bert", "vit", "clip_vision", "t5", "gpt2", "llama"])
def test_check3_zero_is_shared_model_bitwise(lab: Any, name: str) -> None:
    """Check 3: all-zero weights give the very bits of the shared model, on the whole padded batch."""
    case, twin = lab.case(name), lab.twin(name)
    model = case.rebuilt([0.0] * 3, "e0")
    with torch.no_grad():
        expected = lab.stock_answer(model(**case.batch))
    out = twin(**case.batch, mixture={}, head="e0" if case.heads else None)
    assert torch.equal(lab.answer(out), expected)
    assert out.expert == [None] * len(expected)


def test_check3_partial_weights(lab: Any) -> None:
    """Check 3: weights that sum below 1 leave the rest to θs: (1 − Σw) θs + Σ wt θt."""
    case, twin = lab.case("bert"), lab.twin("bert")
    w = {"e0": 0.5, "e2": 0.125}
    dense = twin.weights_for(w)
    for name, value in dense.items():
        shared = case.shared[name]
        expected = (1 - 0.625) * shared + sum(
            w.get(e, 0.0) * m.state_dict().get(f"bert.{name}", shared) for e, m in case.experts.items()
        )
        assert lab.relative(value, expected) <= 1e-12


def test_zero_row_needs_a_head(lab: Any) -> None:
    case, twin = lab.case("bert"), lab.twin("bert")
    with pytest.raises(TwinmergeError, match="no expert .* Name its head"):
        twin(**case.batch, mixture=torch.zeros(3))


# ---------------------------------------------------------------------------------------- check 9: companions


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_check9_companions_and_padding_change_nothing(lab: Any, name: str) -> None:
    """Check 9: a row keeps its answer beside 15 others, alone, and under extra padding (float32, 1e-6)."""
    case, twin = lab.case(name, torch.float32), lab.twin(name, torch.float32, 3)
    batch = lab.text_batch(16, 7, seed=3)
    batch["input_ids"][0], batch["attention_mask"][0] = case.batch["input_ids"][1], case.batch["attention_mask"][1]
    length = int(batch["attention_mask"][0].sum())
    assert length < 7
    generator = torch.Generator().manual_seed(1)
    weights = torch.softmax(torch.randn(16, 3, generator=generator), -1)
    head = "e1" if case.heads else None

    def row0(batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        answer = lab.answer(twin(**batch, mixture=weights, unconstrained=True, head=head))[0]
        return answer if case.heads else answer[:length]

    alone = row0({k: v[:1, :length] for k, v in batch.items()}, weights[:1])
    others = weights[torch.randperm(16, generator=generator)]
    others[0] = weights[0]
    wide = {
        k: torch.cat([v, torch.full((16, 9), 1 if k == "input_ids" else 0)], 1) for k, v in batch.items()
    }  # id 1 is padding
    size = max(1.0, float(alone.abs().max()))
    for seen in (row0(batch, weights), row0(batch, others), row0(wide, weights)):
        assert (seen - alone).abs().max() <= 1e-6 * size
    assert (row0(batch, others.flip(1)) - alone).abs().max() > 1e-3  # its own mixture does matter


def test_check9_router_features_of_a_row(lab: Any) -> None:
    """Check 9: the router's features are means over a row's own positions, whatever stands beside them."""
    case, twin = lab.case("bert", torch.float32), lab.twin("bert", torch.float32, 3)
    batch = lab.text_batch(16, 7, seed=3)
    length = int(batch["attention_mask"][1].sum())
    with torch.no_grad():
        alone = features(twin.model, {k: v[1:2, :length] for k, v in batch.items()}, (1, 2))[0]
        beside = features(twin.model, batch, (1, 2))[1]
        plain = torch.cat([twin.model.hidden_states(batch)[i].mean(1) for i in (1, 2)], -1)[1]
        with twin.runtime.mixing(Mixture.of(lab.mixtures("soft"))):  # what a mixture would make of them
            mixed = features(twin.model, case.batch, (1, 2))
    assert alone.shape == (64,)
    assert (alone - beside).abs().max() <= 1e-6
    assert (plain - alone).abs().max() > 1e-3
    shared_only = features(twin.model, case.batch, (1, 2))
    assert (mixed - shared_only).abs().max() > 1e-3  # so that routing on the shared model is no accident


# ---------------------------------------------------------------------------------------- check 10: ties


def delta_seen(twin: Twin, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the hooks add to a module's output for x, for one fixed mixture."""
    with torch.no_grad():
        plain = module(x)
        with twin.runtime.mixing(Mixture.of(torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64))):
            return module(x) - plain


@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "t5"])
def test_check10_tied_weights_stay_one(lab: Any, name: str, tmp_path: Any) -> None:
    """Check 10: one factorisation, one tensor, before and after the folder; both uses see the same Δ."""
    twin = lab.twin(name, torch.float64, 3)
    again = Twin.from_pretrained(twin.save_pretrained(tmp_path / "twin"))
    for each in (twin, again):
        body = each.model.body
        embedding, output = body.get_input_embeddings(), body.get_output_embeddings()
        assert embedding.weight.data_ptr() == output.weight.data_ptr()
        shapes = [f.shape for f in each.package.exclusive["e0"].low.values()]
        assert shapes.count((50, 32)) == 1
        by_word = delta_seen(each, embedding, torch.arange(50)[None])[0]
        by_logit = delta_seen(each, output, torch.eye(32, dtype=torch.float64)[None])[0].T
        assert by_word.norm() > 0.1
        assert lab.relative(by_word, by_logit) <= 1e-12


def test_untied_output_layer_mixes_on_its_own(lab: Any) -> None:
    twin = lab.twin("llama", torch.float64, 3)
    body = twin.model.body
    words = delta_seen(twin, body.get_input_embeddings(), torch.arange(50)[None])[0]
    logits = delta_seen(twin, body.get_output_embeddings(), torch.eye(32, dtype=torch.float64)[None])[0].T
    assert (words - logits).norm() > 0.1


# ---------------------------------------------------------------------------------------- check 12: no dense matrix


class Watch(TorchDispatchMode):
    """The largest tensor that an operation made anew (views of what was there before do not count)."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, leaf.numel())
        return out


@pytest.fixture(scope="module")
def wide_twin() -> Twin:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    base = BertModel(BertConfig(vocab_size=80, max_position_embeddings=64, **sizes)).eval()
    experts = {}
    for i in range(3):
        model = BertModel(base.config).eval()
        model.load_state_dict({k: v + 0.02 * torch.randn_like(v) for k, v in base.state_dict().items()})
        experts[f"e{i}"] = model
    return Twin.build(base, experts, rank=4, progress=False)


def test_check12_no_dense_materialisation(wide_twin: Twin) -> None:
    """Check 12: a mixed pass makes nothing as large as a layer's matrix; a rebuild under the same watch does."""
    smallest = 64 * 64
    held = [*wide_twin.parameters(), *wide_twin.buffers()]
    known = {t.untyped_storage().data_ptr() for t in held}
    ids = torch.randint(3, 80, (4, 4))
    for weights in (torch.softmax(torch.randn(4, 3), -1), torch.eye(3)[[0, 2, 1, 2]]):
        with torch.no_grad(), Watch(known) as watch:
            wide_twin(input_ids=ids, mixture=weights)
        assert 0 < watch.largest < smallest
    with torch.no_grad(), Watch(known) as watch:
        wide_twin.weights_for({"e0": 1.0})
    assert watch.largest >= smallest


def test_check12_weights_are_never_written(wide_twin: Twin) -> None:
    """Check 12: storage pointers, version counters and bits of all weights are the same after 100 calls."""
    held = dict(wide_twin.named_parameters()) | dict(wide_twin.named_buffers())
    assert len(held) > 90
    before = {n: (t.data_ptr(), t._version, t.clone()) for n, t in held.items()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (2, 3))
    for call in range(100):
        soft = torch.softmax(torch.randn(2, 3, generator=generator), -1)
        wide_twin(input_ids=ids, mixture=soft if call % 2 else torch.eye(3)[torch.tensor([2, call % 3])])
    after = dict(wide_twin.named_parameters()) | dict(wide_twin.named_buffers())
    assert before.keys() == after.keys()
    for name, (pointer, version, value) in before.items():
        assert after[name].data_ptr() == pointer and after[name]._version == version, name
        assert torch.equal(after[name], value), name


# ---------------------------------------------------------------------------------------- check 22: top-k


@pytest.fixture
def routed(lab: Any) -> Twin:
    case = lab.case("bert")
    twin = case.twin(3)
    generator = torch.Generator().manual_seed(4)
    twin.router = GaussianRouter().of(torch.randn(3, 64, generator=generator), torch.zeros(3))
    twin.layers = (1, 2)
    return twin


def test_check22_experts_per_row(lab: Any, routed: Twin) -> None:
    """Check 22: k = T is the dense mixture bitwise, k = 1 is that single expert, k = 2 has two."""
    batch = lab.case("bert").batch
    dense, all_of = routed(**batch, experts_per_row=None), routed(**batch, experts_per_row=3)
    assert torch.equal(dense.mixture, all_of.mixture) and torch.equal(dense.logits, all_of.logits)
    two = routed.route(batch, 2)
    assert ((two > 0).sum(1) == 2).all() and torch.allclose(two.sum(1), torch.ones(5))
    one = routed(**batch)
    assert one.expert == [f"e{i}" for i in dense.mixture.argmax(1).tolist()]
    assert ((one.mixture > 0).sum(1) == 1).all()
    single = routed(**batch, expert=one.expert)
    assert torch.equal(one.logits, single.logits)
    with pytest.raises(TwinmergeError, match="experts_per_row is 0"):
        routed(**batch, experts_per_row=0)


@pytest.mark.parametrize("kind", ["one_hot", "soft", "uniform"])
def test_check22_unselected_experts_are_never_touched(lab: Any, kind: str) -> None:
    """Check 22: with the factors of an expert of no weight poisoned by NaN, outputs stay as they were."""
    case = lab.case("bert")
    twin = case.twin(3)
    weights = lab.mixtures("soft" if kind == "uniform" else kind)
    weights[:, 1] = 0
    if kind == "one_hot":
        weights[~weights.bool().any(1), 2] = 1
    if kind == "uniform":
        weights = weights[:1].expand(5, 3)
    before = twin(**case.batch, mixture=weights, unconstrained=True, head="e0").logits
    for part in twin.runtime.parts.values():
        if hasattr(part, "stack"):
            part.stack[1] = torch.nan
        else:
            for factor in part.of(1):
                factor.fill_(torch.nan)
    assert torch.equal(twin(**case.batch, mixture=weights, unconstrained=True, head="e0").logits, before)
    assert before.isfinite().all()
    weights = weights.clone()
    weights[:, 1] = 0.1
    assert not twin(**case.batch, mixture=weights, unconstrained=True, head="e0").logits.isfinite().all()


# ---------------------------------------------------------------------------------------- two towers


def clip(only: str = "") -> tuple[CLIPModel, dict[str, CLIPModel], dict[str, torch.Tensor]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49, "bos_token_id": 0, **sizes}
    config = CLIPConfig(text_config=text, vision_config={"image_size": 8, "patch_size": 4, **sizes}, projection_dim=16)
    torch.manual_seed(0)
    base = CLIPModel(config).double().eval()
    experts = {}
    for i in range(3):
        model = CLIPModel(config).double().eval()
        model.load_state_dict(
            {k: v + 0.05 * torch.randn_like(v) * k.startswith(only) for k, v in base.state_dict().items()}
        )
        experts[f"e{i}"] = model
    ids = torch.randint(3, 49, (3, 5))
    ids[:, -1] = 49
    return base, experts, {"input_ids": ids, "pixel_values": torch.randn(3, 3, 8, 8).double()}


def test_check8_clip_with_one_mixture(lab: Any) -> None:
    """Check 8: CLIPModel (logit_scale is mixed before its exp) is exact with one mixture for the batch."""
    base, experts, batch = clip()
    twin = Twin.build(base, experts, rank=None, shared="task_arithmetic", progress=False)
    w = [0.2, -0.3, 0.9]
    answer = twin(**batch, mixture=torch.tensor(w, dtype=torch.float64), unconstrained=True).output
    model = CLIPModel(base.config).double().eval()
    shared = twin.package.shared
    model.load_state_dict(
        {
            k: shared.read(k)
            + sum(wt * (e.state_dict()[k] - shared.read(k)) for wt, e in zip(w, experts.values(), strict=True))
            for k in base.state_dict()
        }
    )
    expected = model(**batch)
    assert (answer.logits_per_image - expected.logits_per_image).abs().max() <= 1e-10
    assert (answer.logits_per_text - expected.logits_per_text).abs().max() <= 1e-10
    with pytest.raises(TwinmergeError, match="logit_scale.*Give one mixture for the whole batch"):
        twin(**batch, expert=["e0", "e1", "e2"])
    after = twin(
        **batch, mixture=torch.tensor(w, dtype=torch.float64), unconstrained=True
    ).output  # the refusal left nothing behind
    assert torch.equal(after.logits_per_image, answer.logits_per_image)


def test_clip_zero_shot_keeps_the_order_of_texts(lab: Any) -> None:
    """Images of other experts in one batch, as many class texts as images: the columns stay those of the texts."""
    base, experts, batch = clip(only="vision")
    twin = Twin.build(base, experts, rank=None, progress=False)
    owners = ["e2", "e0", "e1"]
    answer = twin(**batch, expert=owners).output
    for row, owner in enumerate(owners):
        one = batch | {"pixel_values": batch["pixel_values"][row : row + 1]}
        expected = experts[owner](**one).logits_per_image[0]
        assert (answer.logits_per_image[row] - expected).abs().max() <= 1e-10


# ---------------------------------------------------------------------------------------- positions as first axis


def test_deberta_is_exact(lab: Any) -> None:
    """DeBERTa reads its table of relative positions without calling it, and gives it to its queries once for all
    rows."""
    torch.manual_seed(0)
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    relative |= {"max_relative_positions": 16, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    base = lab.nudged(DebertaV2Model(DebertaV2Config(**lab.text, **relative)), 0.1, 9).double()
    experts = {f"e{i}": lab.nudged(base, 0.05, i) for i in range(2)}
    twin = Twin.build(base, experts, rank=None, progress=False)
    batch = lab.text_batch(4, 6)
    with torch.no_grad():
        for name, expert in experts.items():
            expected = expert(**batch).last_hidden_state
            assert (twin(**batch, expert=name).output.last_hidden_state - expected).abs().max() <= 1e-10
    owners = ["e0", "e1", "e0", "e1"]
    for strategy in ("stacked", "grouped", "rebuild"):
        found = twin(**batch, expert=owners, strategy=strategy).output.last_hidden_state
        for row, name in enumerate(owners):
            with torch.no_grad():
                expected = experts[name](**batch).last_hidden_state[row]
            assert (found[row] - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("rows", [2, 3, 6])
def test_mpnet_positions_are_not_rows(lab: Any, rows: int) -> None:
    """MPNet's table gives (positions, positions): as many positions as rows, or a multiple, are not mistaken for
    rows."""
    case, twin = lab.case("mpnet"), lab.twin("mpnet")
    ids = torch.randint(3, 50, (rows, 6), generator=torch.Generator().manual_seed(0))
    for owners in (["e1", "e0", "e2", "e1", "e0", "e2"][:rows], ["e1"] * rows):
        answer = twin(input_ids=ids, expert=owners).output.last_hidden_state
        for row, owner in enumerate(owners):
            with torch.no_grad():
                expected = case.experts[owner](input_ids=ids[row : row + 1]).last_hidden_state[0]
            assert (answer[row] - expected).abs().max() <= 1e-10


@pytest.mark.parametrize("rows", [2, 8])
def test_positions_before_rows_are_seen(lab: Any, rows: int) -> None:
    """Longformer's queries are (positions, rows, width): 8 positions are no 8 rows, nor 2 rows of 4 beams."""
    torch.manual_seed(0)
    base = LongformerModel(LongformerConfig(attention_window=4, **lab.text)).double().eval()
    experts = {f"e{i}": lab.nudged(base, 0.05, i) for i in range(2)}
    twin = Twin.build(base, experts, rank=None, progress=False)
    assert not twin.runtime.refused
    ids = torch.randint(3, 50, (rows, 8))
    owners = [f"e{i % 2}" for i in range(rows)]
    found = twin(input_ids=ids, expert=owners, strategy="grouped").output.last_hidden_state
    for row, name in enumerate(owners):
        with torch.no_grad():
            expected = experts[name](input_ids=ids[row : row + 1]).last_hidden_state[0]
        assert (found[row] - expected).abs().max() <= 1e-6  # its softmax is float32


# ---------------------------------------------------------------------------------------- what cannot mix


class OddConfig(PretrainedConfig):
    model_type = "twinmerge-odd"

    def __init__(self, part: str = "attention", **rest: Any) -> None:
        super().__init__(**rest)
        self.part = part


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.exp(self.strength)


class NormOfTwo(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Odd(PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(8, 8)
        if config.part == "attention":
            self.odd = nn.MultiheadAttention(8, 2, batch_first=True)
        elif config.part == "recurrent":
            self.odd = nn.GRU(8, 8, batch_first=True)
        elif config.part == "turned":
            self.odd = nn.Linear(8, 8)
        elif config.part == "norm of two":
            self.odd = NormOfTwo(8)
        else:
            self.odd = Gate()
        self.post_init()

    def forward(self, inputs_embeds: torch.Tensor) -> Any:
        x = self.first(inputs_embeds)
        if self.config.part == "turned":
            return BaseModelOutput(self.odd(x.transpose(0, 1)).transpose(0, 1))
        found = self.odd(x, x, x) if self.config.part == "attention" else self.odd(x)
        return BaseModelOutput(found[0] if isinstance(found, tuple) else found)


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("part", ["attention", "gate", "norm of two"])
def test_modules_of_any_kind_are_exact(lab: Any, part: str, rows: int) -> None:
    """No closed form here: each mixture's rows run through the module with their own weights (3 rows of 3 positions
    too)."""
    torch.manual_seed(0)
    base = lab.nudged(Odd(OddConfig(part)), 0.3, 9)
    experts = {f"e{i}": lab.nudged(base, 0.1, i) for i in range(2)}
    twin = Twin.build(base, experts, rank=None, progress=False)
    x = torch.randn(rows, 3, 8)
    owners = ["e0", "e1", "e0"][:rows]
    for strategy in ("stacked", "grouped", "rebuild", "auto"):
        found = twin(inputs_embeds=x, expert=owners, strategy=strategy).output.last_hidden_state
        for row, name in enumerate(owners):
            with torch.no_grad():
                expected = experts[name](inputs_embeds=x[row : row + 1]).last_hidden_state[0]
            assert (found[row] - expected).abs().max() <= 1e-5
    with torch.no_grad():
        expected = experts["e1"](inputs_embeds=x).last_hidden_state
    found = twin(inputs_embeds=x, expert="e1", strategy="stacked").output.last_hidden_state
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("part", ["turned", "recurrent"])
def test_unknown_use_of_a_parameter_is_refused_by_name(lab: Any, part: str) -> None:
    """A layer that sees positions before rows, or whose second answer has, with nothing above it but the model;
    refused also where both are 3."""
    torch.manual_seed(0)
    base = lab.nudged(Odd(OddConfig(part)), 0.3, 9)
    experts = {f"e{i}": lab.nudged(base, 0.1, i) for i in range(2)}
    twin = Twin.build(base, experts, rank=None, progress=False)
    for rows in (2, 3):
        x = torch.randn(rows, 3, 8)
        owners = ["e0", "e1", "e0"][:rows]
        for strategy in ("stacked", "auto"):
            with pytest.raises(TwinmergeError, match="'odd'.*strategy=\"rebuild\""):
                twin(inputs_embeds=x, expert=owners, strategy=strategy)
        found = twin(inputs_embeds=x, expert=owners, strategy="rebuild").output.last_hidden_state
        for row, name in enumerate(owners):
            with torch.no_grad():
                expected = experts[name](inputs_embeds=x[row : row + 1]).last_hidden_state[0]
            assert (found[row] - expected).abs().max() <= 1e-5
        for strategy in ("stacked", "folded", "stacked"):  # one way leaves no weights to the next
            found = twin(inputs_embeds=x, expert="e1", strategy=strategy).output.last_hidden_state
            with torch.no_grad():
                assert (found - experts["e1"](inputs_embeds=x).last_hidden_state).abs().max() <= 1e-5
    spared = {f"e{i}": lab.nudged(base, 0.01, i, only=lambda n: n.startswith("first")) for i in range(2)}
    assert not Twin.build(base, spared, rank=None, progress=False).runtime.refused
