"""Models whose classes hold the experts of a mixture in one tensor, stored one by one: stock transformers is the
reference."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import twinmerge as tm
from twinmerge.models.conversion import as_module, as_stored, conversions
from twinmerge.models.opening import open_model
from twinmerge.models.transformers_class import TransformersArchitecture
from twinmerge.statistics.file import Statistics
from twinmerge.statistics.measure import measure
from twinmerge.twin.export import export_dense

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"num_key_value_heads": 2, "n_routed_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}
LATENT |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
SMALL = {**FEW, "moe_intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen2Moe": {**SMALL, "shared_expert_intermediate_size": 12},
    "Qwen3Moe": {**SMALL, "head_dim": 8},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Olmoe": FEW,
    "Phimoe": {"num_local_experts": 3},
    "GraniteMoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Jamba": {
        "num_experts": 3,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
    }
    | {"expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "Glm4Moe": {**LATENT, "head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_intermediate_size": 12, "moe_k": 2, "moe_layer_start_index": 1},
    "Lfm2Moe": {**SMALL, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "FlexOlmo": FEW,
    "JetMoe": {"num_local_experts": 3, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2},
}
QUICK = ["Mixtral"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK]
IDS = torch.arange(3, 15)[None]
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}

pytestmark = pytest.mark.filterwarnings("ignore:The module:UserWarning")


def noisy(model: Any, scale: float, seed: int) -> Any:
    made = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return made


def made(family: str, kind: str = "ForCausalLM") -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    return noisy(getattr(transformers, family + kind)(config), 0.05, 0)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**BATCH).logits
    return found


def stock(kind: type[PreTrainedModel], folder: Path) -> Any:
    """What transformers loads, which must be all there."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


def sorted_by_values(state: dict[str, Tensor]) -> list[Tensor]:
    return sorted(state.values(), key=lambda t: (tuple(t.shape), t.double().sum().item()))


class Lab:
    def __init__(self, family: str, root: Path) -> None:
        self.base = made(family)
        self.experts = {"a": noisy(self.base, 0.02, 1), "b": noisy(self.base, 0.02, 2)}
        self.kind, self.root = type(self.base), root
        for name, model in {"base": self.base, **self.experts}.items():
            model.save_pretrained(root / name)
        self.paths = {name: str(root / name) for name in self.experts}

    def average(self) -> Any:
        mean = copy.deepcopy(self.base)
        for parameter, *own in zip(mean.parameters(), *(e.parameters() for e in self.experts.values()), strict=True):
            parameter.data = (own[0].data + own[1].data) / 2
        return mean


@pytest.fixture(params=[*QUICK, *SLOW])
def lab(request: Any, tmp_path: Path) -> Lab:
    return Lab(request.param, tmp_path)


def test_a_static_merge_loads_and_computes_the_mean(lab: Lab) -> None:
    merge = tm.merge("average", str(lab.root / "base"), lab.paths, progress=False)
    expected = logits(lab.average())
    torch.testing.assert_close(logits(stock(lab.kind, merge.save(lab.root / "out"))), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(logits(merge.load()), expected, atol=1e-6, rtol=1e-5)
    memory = tm.merge("average", lab.base, {**lab.experts, "b": lab.paths["b"]}, progress=False).state_dict()
    files = merge.state_dict()
    if TransformersArchitecture(
        lab.base.config, lab.kind
    ).converts:  # in memory too they are named as save_pretrained names them
        assert memory.keys() == files.keys()
    assert all(torch.equal(a, b) for a, b in zip(sorted_by_values(memory), sorted_by_values(files), strict=True))
    with safe_open(lab.root / "base" / "model.safetensors", "pt") as written:
        assert set(files) == set(written.keys())


@pytest.mark.parametrize("where", ["files", "memory"])
def test_a_twin_answers_as_its_experts(lab: Lab, where: str) -> None:
    base: Any = str(lab.root / "base") if where == "files" else lab.base
    experts: Any = lab.paths if where == "files" else {"a": lab.experts["a"], "b": lab.paths["b"]}
    twin = tm.Twin.build(base, experts, None, shared="task_arithmetic", progress=False)
    for name, expert in lab.experts.items():
        out = twin(**BATCH, expert=name)
        torch.testing.assert_close(out.logits, logits(expert), atol=1e-5, rtol=1e-4)
    twin.save_pretrained(lab.root / "twin")
    again = tm.Twin.from_pretrained(lab.root / "twin")
    assert torch.equal(again(**BATCH, expert="b").logits, twin(**BATCH, expert="b").logits)
    shared = logits(stock(lab.kind, lab.root / "twin" / "shared"))
    torch.testing.assert_close(again(**BATCH, mixture={}).logits, shared, atol=1e-6, rtol=1e-5)
    export_dense(again, {"a": 1.0}, lab.root / "one")
    torch.testing.assert_close(
        logits(stock(lab.kind, lab.root / "one")), logits(lab.experts["a"]), atol=1e-5, rtol=1e-4
    )
    with (
        safe_open(lab.root / "one" / "model.safetensors", "pt") as one,
        safe_open(lab.root / "base" / "model.safetensors", "pt") as two,
    ):
        if TransformersArchitecture(lab.base.config, lab.kind).converts:
            assert set(one.keys()) == set(two.keys())


def test_generated_tokens_are_the_experts(lab: Lab) -> None:
    twin = tm.Twin.build(lab.base, lab.experts, None, shared="task_arithmetic", progress=False)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    both = {name: tensor.expand(2, -1) for name, tensor in BATCH.items()}
    found = twin.generate(**both, expert=["b", "a"], strategy="rebuild", **options)
    for row, name in zip(found, ("b", "a"), strict=True):
        expected = lab.experts[name].generate(**BATCH, **options)[0]
        assert torch.equal(row[: len(expected)], expected)


# ---------------------------------------------------------------------------------------- one family


def test_each_stored_matrix_keeps_its_own_rank(tmp_path: Path) -> None:
    """Against the truncated SVD of each expert's own matrix, folded into the stock model."""
    lab = Lab("Mixtral", tmp_path)
    twin = tm.Twin.build(lab.base, lab.experts, 2, shared="task_arithmetic", scale=0.3, progress=False)
    stored = {n: open_model(m) for n, m in {"base": lab.base, **lab.experts}.items()}
    state = {}
    for name in stored["base"].specs:
        base, a, b = (stored[n].read(name).double() for n in ("base", "a", "b"))
        shared = (base + 0.3 * (a - base) + 0.3 * (b - base)).float().double()
        change = a - shared
        if change.dim() == 2:
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            change = (u[:, :2] * s[:2]) @ vh[:2]
        state[name] = (shared + change).float()
    architecture = TransformersArchitecture(lab.base.config, lab.kind)
    whole = as_module(state, conversions(architecture, state))
    model = copy.deepcopy(lab.base)
    model.load_state_dict({k: whole[architecture.of_module(k)] for k in model.state_dict()})
    torch.testing.assert_close(twin(**BATCH, expert="a").logits, logits(model), atol=1e-5, rtol=1e-4)


def test_there_and_back_are_the_same_bits() -> None:
    model = made("Qwen2Moe")
    architecture = TransformersArchitecture(model.config, type(model))
    found = {name: tensor for name, (_, tensor) in as_stored(architecture, model.state_dict()).items()}
    back = as_module(found, conversions(architecture, found))
    assert all(torch.equal(back[architecture.of_module(k)], t) for k, t in model.state_dict().items())


def test_an_expert_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    lab = Lab("Mixtral", tmp_path)
    state = tm.merge("average", None, lab.paths, progress=False).canonical_state()
    del state["layers.1.block_sparse_moe.experts.2.w1.weight"]
    from twinmerge.models.headed import HeadedModel

    with pytest.raises(tm.TwinmergeError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        HeadedModel(TransformersArchitecture(lab.base.config, lab.kind), state)


def test_classifiers_keep_their_body_and_their_heads(tmp_path: Path) -> None:
    """Experts inside the body are no heads, though the class has no parameter of their names."""
    torch.manual_seed(0)
    base = made("Mixtral", "Model")
    experts = {}
    for i, name in enumerate(("a", "b")):
        config = copy.deepcopy(base.config)
        config.num_labels, config.id2label = 2 + i, {k: f"{name}{k}" for k in range(2 + i)}
        expert = transformers.MixtralForSequenceClassification(config).eval()
        expert.model.load_state_dict(noisy(base, 0.02, i).state_dict())
        experts[name] = expert
    twin = tm.Twin.build(base, experts, None, shared="task_arithmetic", progress=False)
    assert {n for head in twin.package.heads.values() for n in head.tensors} == {"score.weight"}
    for name, expert in experts.items():
        torch.testing.assert_close(twin(**BATCH, expert=name).logits, logits(expert), atol=1e-5, rtol=1e-4)


def test_refining_and_copies_reach_the_experts(tmp_path: Path) -> None:
    lab = Lab("Mixtral", tmp_path)
    twin = tm.Twin.build(lab.base, lab.experts, 1, shared="task_arithmetic", progress=False)
    given = {"input_ids": torch.randint(3, 40, (12, 6), generator=torch.Generator().manual_seed(0))}
    better = twin.refine({"a": given}, steps=20, rate=3e-3, progress=False)
    name = "layers.0.block_sparse_moe.experts.1.w2.weight"
    assert not torch.equal(better.package.exclusive["a"].low[name].b, twin.package.exclusive["a"].low[name].b)
    wanted = lab.experts["a"](**given).logits.detach()
    gaps = [float((t(**given, expert="a").logits - wanted).norm()) for t in (twin, better, copy.deepcopy(better))]
    assert gaps[1] < gaps[0] and gaps[2] == gaps[1]


def test_fisher_information_is_that_of_the_stored_tensors(tmp_path: Path) -> None:
    """Against the stock model's own gradients, example by example, exactly over all classes."""
    config = transformers.MixtralConfig(**{**SIZES, "num_hidden_layers": 1}, num_local_experts=2, num_labels=2)
    torch.manual_seed(0)
    model = transformers.MixtralForSequenceClassification(config).eval()
    rows = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 3, 12, 5]]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = measure("fisher", model, tmp_path / "d.jsonl", tmp_path / "f.safetensors", progress=False)
    expected = torch.zeros_like(model.model.layers[0].mlp.experts.down_proj)
    for ids in rows:
        odds = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for one in odds:
            (gradient,) = torch.autograd.grad(one, model.model.layers[0].mlp.experts.down_proj, retain_graph=True)
            expected += float(one.exp()) * gradient.square()
    found = Statistics.open(file)
    for e in range(2):
        own = found.read(f"layers.0.block_sparse_moe.experts.{e}.w2.weight")
        torch.testing.assert_close(own, expected[e], rtol=1e-3, atol=1e-9)


@pytest.mark.few(1)
@pytest.mark.parametrize("fused", ["base", "expert", "both"])
def test_files_that_hold_experts_as_the_class_does(tmp_path: Path, fused: str) -> None:
    """`save_pretrained(save_original_format=False)` writes such; the output is as save_pretrained writes by default."""
    lab = Lab("Mixtral", tmp_path)
    for name, model in {"base": lab.base, **lab.experts}.items():
        if fused == "both" or (fused == "base") == (name == "base"):
            model.save_pretrained(tmp_path / name, save_original_format=False)
    merge = tm.merge("average", str(tmp_path / "base"), lab.paths, progress=False)
    torch.testing.assert_close(logits(merge.load()), logits(lab.average()), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        logits(stock(lab.kind, merge.save(tmp_path / "out"))), logits(lab.average()), atol=1e-6, rtol=1e-5
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as written:
        assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in set(written.keys())
    twin = tm.Twin.build(str(tmp_path / "base"), lab.paths, None, shared="task_arithmetic", progress=False)
    torch.testing.assert_close(twin(**BATCH, expert="a").logits, logits(lab.experts["a"]), atol=1e-5, rtol=1e-4)


def test_what_no_layer_holds_by_itself_is_no_head(tmp_path: Path) -> None:
    lab = Lab("Mixtral", tmp_path)
    with pytest.raises(tm.TwinmergeError, match=r"experts\.0\.w1\.weight.*cannot be a head"):
        tm.Twin.build(lab.base, lab.experts, 2, heads=("experts",), progress=False)


def test_gram_names_what_it_does_not_read(tmp_path: Path) -> None:
    model = made("Mixtral")
    (tmp_path / "d.jsonl").write_text('{"input_ids": [3, 4, 5]}\n{"input_ids": [6, 7]}')
    with pytest.warns(UserWarning, match=r"6 tensors, the first is 'layers\.0\.mlp\..*not measured"):
        file = measure("gram", model, tmp_path / "d.jsonl", tmp_path / "g.safetensors", progress=False)
    assert "layers.1.self_attn.q_proj.weight" in Statistics.open(file).header["modules"]
