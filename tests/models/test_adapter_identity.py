"""One adapter at weight 1 is merge_and_unload of the PeftModel that stock PEFT loads, however it is read.

The oracle of every case is PEFT alone: the adapter is trained (its tensors are filled at random), saved, and loaded by
`PeftModel.from_pretrained` on the base's folder; its logits and the weights that it merges to are what must come out.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import twinmerge as tm
from twinmerge.engine.adapters.merge import merge_lora
from twinmerge.errors import TwinmergeError
from twinmerge.models.adapter_config import checked_config
from twinmerge.models.fused import stack_of
from twinmerge.models.in_memory import adapter_of
from twinmerge.models.opening import open_model
from twinmerge.models.placing import Base, placed
from twinmerge.statistics.model import Measured
from twinmerge.store.checkpoint import Spec
from twinmerge.store.header import SIZES

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
MOE = {**SMALL, "num_hidden_layers": 1, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
TIED = {**SMALL, "tie_word_embeddings": True}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 32}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SMALL),
    "tied": ("LlamaConfig", "LlamaForCausalLM", TIED),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "bert": ("BertConfig", "BertForSequenceClassification", {**SMALL, "num_labels": 3}),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**SMALL, "num_labels": 3, "pad_token_id": 1}),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "vit": ("ViTConfig", "ViTForImageClassification", {**VIT, "num_labels": 3}),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", RESNET),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 3}),
    "qwen3": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, "num_experts": 3, "head_dim": 8}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**MOE, "num_local_experts": 3, "head_dim": 8}),
    "nomic": ("NomicBertConfig", "NomicBertModel", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", VIT),
}
QV = ["q_proj", "v_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": QV}),
    "rslora": ("llama", {"target_modules": QV, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, ".*up_proj": 2},
            "alpha_pattern": {"^model.layers.1.*": 5, "v_proj": 7},
        },
    ),
    "gaussian": ("llama", {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": QV, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": QV, "init_lora_weights": "mica"}),
    "pissa": ("llama", {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "pissa"}),
    "pissa patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"up_proj": 2},
            "alpha_pattern": {"q_proj": 3},
        },
    ),
    "olora": ("llama", {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "olora"}),
    "pissa on the output layer": ("llama", {"target_modules": ["q_proj", "lm_head"], "init_lora_weights": "pissa"}),
    "pissa conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    "olora conv1d": ("gpt2", {"target_modules": ["attn.c_proj"], "init_lora_weights": "olora"}),
    "velora": ("llama", {"target_modules": QV, "velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)}),
    "layers": ("llama", {"target_modules": [*QV, "down_proj"], "layers_to_transform": [1], "exclude_modules": ["v_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "lm_head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "embed_tokens": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "both ends": ("llama", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied together": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied save": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied apart from it": ("tied", {"target_modules": QV}),
    "save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [3, 17, 5]}),
    "tokens of both": (
        "llama",
        {"target_modules": QV, "trainable_token_indices": {"lm_head": [3, 17], "embed_tokens": [5]}},
    ),
    "tokens t5": ("t5", {"target_modules": ["q"], "trainable_token_indices": [3]}),
    "tied both": ("tied", {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
    "norms": ("llama", {"target_modules": QV, "modules_to_save": ["norm"], "bias": "all"}),
    "mixtral all-linear": ("mixtral", {"target_modules": "all-linear"}),
    "qwen3 router": ("qwen3", {"target_modules": ["gate"]}),
    "tokens tied": ("tied", {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 17]}}),
    "parameters": ("llama", {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
    "gpt2 bias": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    "gpt2 lora_bias": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    "bert": ("bert", {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "bert all biases": ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
    "bert lora_bias": ("bert", {"target_modules": ["query", "classifier"], "lora_bias": True, "use_rslora": True}),
    "bert tables": ("bert", {"target_modules": ["word_embeddings", "position_embeddings"]}),
    "t5": ("t5", {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}),
    "vit": ("vit", {"target_modules": ["q_proj", "fc1", "projection"], "modules_to_save": ["classifier"]}),
    "convolutions": ("resnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier.1"]}),
    "attention": ("siglip", {"target_modules": ["head.attention", "q_proj"]}),
    "mixtral": ("mixtral", {"target_modules": QV, "target_parameters": EXPERTS}),
    "mixtral down": ("mixtral", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "mixtral router": ("mixtral", {"target_modules": QV, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}),
    "qwen3": ("qwen3", {"target_modules": QV, "target_parameters": EXPERTS, "use_rslora": True}),
    "qwen3 patterns": (
        "qwen3",
        {
            "target_modules": [],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.gate_up_proj": 3},
            "alpha_pattern": {"down_proj": 7},
        },
    ),
    "gpt-oss": ("gpt-oss", {"target_modules": QV, "target_parameters": EXPERTS}),
}  # fmt: skip


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


FAST = ("pissa", "both ends", "tied together", "tokens", "gpt2 lora_bias", "bert", "convolutions", "attention", "qwen3 patterns")  # fmt: skip


def made(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, str]:
    config, kind, options = FAMILIES[family]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(getattr(transformers, config)(**options)).to(dtype)
    if not options.get("tie_word_embeddings", family in ("gpt2", "t5")):
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    return model_class, str(folder)


def trained(model_class: Any, base: str, folder: Path, **options: Any) -> str:
    torch.manual_seed(1)
    model = peft.get_peft_model(
        model_class.from_pretrained(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.1 if "lora_" in name else 0.01) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def loaded(model_class: Any, base: str, lora: str) -> Any:
    return peft.PeftModel.from_pretrained(model_class.from_pretrained(base), lora).eval()


def answer(model: Any) -> torch.Tensor:
    rng = torch.Generator().manual_seed(3)
    model = model.eval()
    config = model.config
    with torch.no_grad():
        if hasattr(config, "patch_size") or config.model_type == "resnet":
            side = getattr(config, "image_size", 16)
            out = model(pixel_values=torch.randn(2, 3, side, side, generator=rng))
        else:
            ids = torch.randint(0, 40, (2, 7), generator=rng)
            more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
            out = model(input_ids=ids, **more)
    return (out.logits if hasattr(out, "logits") else out.pooler_output).float()


def in_tiles(model: Any, name: str, size: int) -> torch.Tensor:
    """The tensor read in ranges of a few elements, which start and stop anywhere."""
    code, shape = model.range_code(name), model.spec(name).shape
    numel = int(np.prod(shape))
    out = np.empty(numel * SIZES[code], np.uint8)
    for start in range(0, numel, size):
        model.read_range(name, start, out[start * SIZES[code] : min(start + size, numel) * SIZES[code]])
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}[code]
    return torch.from_numpy(out).view(dtype).reshape(shape)


def near(got: torch.Tensor, want: torch.Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("case", [c if c in FAST else slow(c) for c in CASES])
def test_one_adapter_is_what_peft_computes(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    truth = loaded(model_class, base, lora)
    want = answer(truth)
    assert (want - answer(model_class.from_pretrained(base))).abs().max() > 1e-3

    memory = open_model(truth)
    theirs = {n: memory.read(n).clone() for n in memory.specs}
    merged = truth.merge_and_unload()
    twice = case in (
        "tied together",
        "tied both",
    )  # PEFT merges one product into the one tensor for each of its two names
    if not twice:
        near(answer(merged), want, 2e-5)
        of_theirs = open_model(merged)
        assert theirs.keys() == of_theirs.specs.keys()
        for name, tensor in theirs.items():
            near(tensor, of_theirs.read(name))

    ours = open_model(f"{base}+{lora}")
    for name in ours.specs:
        whole = ours.read(name)
        for size in (7, 64, 10**6):
            if size >= 64 or whole.numel() < 2000:
                assert torch.equal(in_tiles(ours, name, size), whole)
    out = tmp_path / "out"
    tm.merge("task_arithmetic", base=base, experts={"a": f"{base}+{lora}"}, scale=1.0, progress=False).save(out)
    back = model_class.from_pretrained(out)
    for name, tensor in back.state_dict().items() if not twice else ():
        near(tensor, merged.state_dict()[name], 2e-6)
    near(answer(back), want, 2e-5)


@pytest.mark.parametrize("adapter", ["default", "mine"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_all_biases_of_a_head_that_is_saved_in_full(tmp_path: Path, family: str, adapter: str) -> None:
    """PEFT writes them twice, once under the wrapper's names, with the adapter's name inside where the head has
    modules; a name that it does not understand is told as the file has it."""
    model_class, base = made(family, tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", bias="all")
    model = peft.get_peft_model(model_class.from_pretrained(base), config, adapter_name=adapter)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0.0)
    model.save_pretrained(tmp_path / "lora")
    lora = str(tmp_path / "lora" / ("" if adapter == "default" else adapter))
    wrapped = [key for key in load_file(Path(lora) / "adapter_model.safetensors") if ".modules_to_save." in key]
    assert len(wrapped) == (1 if family == "bert" else 2) and (f".{adapter}." in wrapped[0]) == (family == "roberta")
    want = loaded(model_class, base, lora).merge_and_unload()
    ours = open_model(f"{base}+{lora}")
    theirs = open_model(want)
    assert ours.specs.keys() == theirs.specs.keys()
    for name in ours.specs:
        near(ours.read(name), theirs.read(name))
    rewritten(lora, lambda tensors: {**tensors, "base_model.model.classifier.modules_to_save.other.odd": torch.ones(3)})
    with pytest.raises(TwinmergeError, match="holds 'classifier.modules_to_save.other.odd', which its base"):
        open_model(f"{base}+{lora}")


# ------------------------------------------------------------------------------------------------ experts


def rewritten(lora: str, change: Any, **config: Any) -> str:
    """Change an adapter's tensors and config on the disk."""
    file = Path(lora) / "adapter_model.safetensors"
    tensors = {k: t.contiguous() for k, t in change(load_file(file)).items()}
    save_file(tensors, file, {"format": "pt"})
    text = json.loads((Path(lora) / "adapter_config.json").read_text())
    (Path(lora) / "adapter_config.json").write_text(json.dumps({**text, **config}))
    return lora


def whole(model: Any) -> dict[str, torch.Tensor]:
    return {name: model.read(name) for name in model.specs}


def merged_answer(model_class: Any, base: str, lora: str, out: Path) -> torch.Tensor:
    tm.merge("task_arithmetic", base=base, experts={"a": f"{base}+{lora}"}, scale=1.0, progress=False).save(out)
    return answer(model_class.from_pretrained(out))


@pytest.mark.parametrize(
    ("family", "block", "names"),
    [
        ("mixtral", "block_sparse_moe", ["w1", "w2", "w3"]),
        pytest.param("qwen3", "mlp", ["gate_proj", "up_proj", "down_proj"], marks=pytest.mark.slow),
    ],
)
def test_experts_as_transformers_4_named_them(tmp_path: Path, family: str, block: str, names: list[str]) -> None:
    """A LoRA for each expert's own matrices; PEFT fuses them when it loads the file."""
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=["q_proj"])
    rng = torch.Generator().manual_seed(5)

    def more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for e in range(3):
            for name in names:
                m, n = (16, 24) if name in ("w2", "down_proj") else (24, 16)
                where = f"base_model.model.model.layers.0.{block}.experts.{e}.{name}"
                tensors[f"{where}.lora_A.weight"] = 0.1 * torch.randn(4, n, generator=rng)
                tensors[f"{where}.lora_B.weight"] = torch.randn(m, 4, generator=rng)
        return tensors

    rewritten(lora, more, target_modules=["q_proj", *names])
    want = answer(loaded(model_class, base, lora))
    assert (want - answer(model_class.from_pretrained(base))).abs().max() > 1e-3
    near(merged_answer(model_class, base, lora, tmp_path / "out"), want, 2e-5)
    rewritten(lora, dict, use_rslora=True)  # PEFT doubles rank and alpha of what it fuses, and √2r is not 2√r
    with pytest.raises(TwinmergeError, match="use_rslora"):
        open_model(f"{base}+{lora}")


def old_sides(tensors: dict[str, torch.Tensor], ranks: int = 12) -> dict[str, torch.Tensor]:
    """As PEFT 0.18 wrote experts (E, out, in): lora_A reads the output side, lora_B the input side."""
    found = dict(tensors)
    for key in [k for k in tensors if "experts" in k and "lora_A" in k]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        experts = 3
        found[key] = b.reshape(b.shape[0], -1, experts).permute(2, 1, 0).reshape(ranks, -1)
        found[other] = a.reshape(experts, -1, a.shape[1]).permute(2, 1, 0).reshape(-1, ranks)
    return found


def test_the_sides_of_experts_before_and_since_peft_0_19(tmp_path: Path) -> None:
    model_class, base = made("qwen3", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=[], target_parameters=EXPERTS)
    want = whole(open_model(f"{base}+{lora}"))
    rewritten(lora, old_sides, peft_version="0.18.1")
    for name, tensor in whole(open_model(f"{base}+{lora}")).items():
        near(tensor, want[name])
    rewritten(lora, dict, peft_version="0.19.0")
    with pytest.raises(TwinmergeError, match=r"by lora_A .* it is \[3,"):
        open_model(f"{base}+{lora}")


@pytest.mark.parametrize("version", ["0.18.0", "0.21.2", None])
def test_experts_with_equal_sides_need_the_version(tmp_path: Path, version: str | None) -> None:
    pair = torch.randn(6, 5), torch.randn(5, 6)
    config = checked_config({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "peft_version": version}, "a")
    if version is None:
        with pytest.raises(TwinmergeError, match="peft_version"):
            stack_of(*pair, 2.0, "w", (3, 5, 5), config, False)
        return
    got = stack_of(*pair, 2.0, "w", (3, 5, 5), config, False)
    order = "o r e, e r i -> e o i" if version > "0.19" else "o r e, e r i -> e i o"
    want = 2 * torch.einsum(order, pair[1].reshape(5, 2, 3), pair[0].reshape(3, 2, 5))
    near(got.entries(0, 75).reshape(3, 5, 5), want)
    for start, stop in ((0, 0), (24, 26), (3, 75), (49, 51)):
        near(got.entries(start, stop), want.flatten()[start:stop])


def test_unsloths_experts_are_refused(tmp_path: Path) -> None:
    model_class, base = made("mixtral", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=[], target_parameters=EXPERTS)
    rewritten(lora, dict, auto_mapping={"base_model_class": "MixtralForCausalLM", "unsloth_fixed": True})
    with pytest.raises(TwinmergeError, match="Unsloth wrote the adapter .*save_pretrained_merged"):
        open_model(f"{base}+{lora}")


def test_wrappers_that_the_config_does_not_name(tmp_path: Path) -> None:
    model_class, base = made("mixtral", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=[], target_parameters=EXPERTS)
    rewritten(lora, dict, target_parameters=["experts.down_proj"])
    with pytest.raises(TwinmergeError, match="wraps .* 2 times, but its target_parameters name 1"):
        open_model(f"{base}+{lora}")
    rewritten(lora, dict, target_parameters=None)
    with pytest.raises(TwinmergeError, match="experts"):
        open_model(f"{base}+{lora}")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mixtral", {"target_modules": QV, "modules_to_save": ["experts"]}),
        ("nomic", {"target_modules": ["q_proj", "down_proj"]}),
        ("nomic", {"target_modules": ["down_proj"], "modules_to_save": ["k_proj"]}),
    ],
)
def test_what_the_files_hold_in_another_form_is_no_head(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    with pytest.raises(TwinmergeError, match="(experts|q_proj|k_proj).* hold in another form"):
        open_model(f"{base}+{lora}")


# ------------------------------------------------------------------------------------------------ names and ties


def llava(folder: Path) -> tuple[Any, str]:
    torch.manual_seed(0)
    text = {**SMALL, "model_type": "llama"}
    vision = {**VIT, "model_type": "clip_vision_model", "projection_dim": 8}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return transformers.LlavaForConditionalGeneration, str(folder)


@pytest.mark.parametrize(
    "more", [slow({}), {"alpha_pattern": {"q_proj": 9}, "rank_pattern": {"v_proj": 2}}], ids=["plain", "patterns"]
)
def test_names_of_vision_language_models_before_transformers_4_52(tmp_path: Path, more: dict[str, Any]) -> None:
    model_class, base = llava(tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=r".*language_model.*(q_proj|v_proj)", **more)
    now = answer(loaded(model_class, base, lora))
    rewritten(lora, lambda t: {k.replace("model.language_model.", "language_model.model."): v for k, v in t.items()})
    near(answer(loaded(model_class, base, lora)), now)
    near(merged_answer(model_class, base, lora, tmp_path / "out"), now, 2e-5)
    rewritten(lora, dict, task_type="CAUSAL_LM")  # common; transformers has no causal class for it
    near(merged_answer(model_class, base, lora, tmp_path / "out2"), now, 2e-5)


def test_patterns_in_old_names(tmp_path: Path) -> None:
    model_class, base = llava(tmp_path / "base")
    pattern = {"^model.language_model.layers.0.self_attn.q_proj": 3}
    options = {
        "target_modules": r".*language_model.*(q_proj|v_proj)",
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    lora = trained(model_class, base, tmp_path / "lora", **options)
    want = whole(open_model(f"{base}+{lora}"))
    older = {"^language_model.model.layers.0.self_attn.q_proj": 3}

    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k.replace("model.language_model.", "language_model.model."): v for k, v in tensors.items()}

    rewritten(lora, old, rank_pattern=older, alpha_pattern=older)
    for name, tensor in whole(open_model(f"{base}+{lora}")).items():
        near(tensor, want[name])
    rewritten(lora, dict, alpha_pattern={"^language_model.model.layers.1.self_attn.q_proj": 3})
    with pytest.raises(TwinmergeError, match="alpha_pattern .* another alpha"):
        open_model(f"{base}+{lora}")


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
        ("t5", {"target_modules": ["q", "shared"]}),
        ("t5", {"target_modules": ["q", "shared"], "ensure_weight_tying": True}),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"], "ensure_weight_tying": True}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "ensure_weight_tying": True}),
        ("tied", {"target_modules": QV, "trainable_token_indices": {"lm_head": [3, 17], "embed_tokens": [5]}}),
        ("tied", {"target_modules": QV, "trainable_token_indices": {"lm_head": [3, 17]}}),
        ("tied", {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": "pissa"}),
    ],
)
def test_one_of_two_tied_tensors(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    """PEFT's model changes the one and not the other, so a tied model cannot hold what it computes."""
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    for model in (f"{base}+{lora}", loaded(model_class, base, lora)):
        with pytest.raises(TwinmergeError, match="ties|Untie"):
            open_model(model)


@pytest.mark.parametrize("family", ["tied", "gpt2", "t5"])
def test_embeddings_that_are_saved_beside_the_factors_go_into_all_that_share_them(tmp_path: Path, family: str) -> None:
    model_class, base = made(family, tmp_path / "base")
    options = {"target_modules": {"tied": QV, "gpt2": ["c_attn"], "t5": ["q"]}[family]}
    lora = trained(model_class, base, tmp_path / "lora", **options)
    grown = loaded(model_class, base, lora)
    with torch.no_grad():
        table = grown.get_base_model().get_input_embeddings().weight
        table.add_(0.01 * torch.randn_like(table))
    grown.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    want = answer(loaded(model_class, base, str(tmp_path / "saved")))
    near(want, answer(grown))
    near(merged_answer(model_class, base, str(tmp_path / "saved"), tmp_path / "out"), want, 2e-5)


def test_factors_of_modules_that_the_config_does_not_name(tmp_path: Path) -> None:
    """PEFT leaves them out, and says so in passing."""
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=["q_proj", "v_proj"])
    rewritten(lora, dict, target_modules=["q_proj", "o_proj"])
    with pytest.raises(TwinmergeError, match="factors of 'model.layers.0.self_attn.v_proj', which its target_modules"):
        open_model(f"{base}+{lora}")
    rewritten(lora, dict, target_modules=["self_attn.q_proj", "v_proj"])
    open_model(f"{base}+{lora}")


def test_the_class_of_an_adapter_without_a_task(tmp_path: Path) -> None:
    """An image classifier on the bare encoder: PEFT has no task for it, and notes the class."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    base = tmp_path / "base"
    transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(base)
    model_class = transformers.ViTForImageClassification
    experts = {}
    for name, labels in (("a", 3), ("b", 5)):
        inner = model_class.from_pretrained(base, num_labels=labels)
        model = peft.get_peft_model(
            inner,
            peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"], init_lora_weights=False),
        )
        model.save_pretrained(tmp_path / name)
        experts[name] = model.eval()
    twin = tm.Twin.build(str(base), {e: f"{base}+{tmp_path / e}" for e in experts}, rank=None, progress=False)
    pixels = torch.randn(2, 3, 8, 8)
    for name, model in experts.items():
        with torch.no_grad():
            want = model(pixel_values=pixels).logits
            got = twin(pixel_values=pixels, expert=name).logits[..., : want.shape[-1]]
        near(got, want, 1e-5)


def test_a_strong_adapter_on_its_own_base_is_no_stranger(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules="all-linear")
    rewritten(lora, lambda tensors: {k: 30 * t for k, t in tensors.items()})
    near(merged_answer(model_class, base, lora, tmp_path / "out"), answer(loaded(model_class, base, lora)), 1e-3)
    other = model_class.from_pretrained(base)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(TwinmergeError, match="does not come from the base"):
        tm.merge("average", base=base, experts={"a": f"{tmp_path / 'other'}+{lora}"}, progress=False).save(
            tmp_path / "no"
        )


def test_two_tied_tensors_with_one_product_in_other_factors(tmp_path: Path) -> None:
    model_class, base = made("tied", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=["lm_head", "embed_tokens"])

    def turned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {k: t for k, t in tensors.items() if "lm_head" not in k}
        a = next(t for k, t in tensors.items() if "embedding_A" in k)
        b = next(t for k, t in tensors.items() if "embedding_B" in k)
        q = torch.linalg.qr(torch.randn(4, 4))[0]
        head = "base_model.model.lm_head"
        return {**found, f"{head}.lora_A.weight": q @ b.T, f"{head}.lora_B.weight": a.T @ q.T}

    rewritten(lora, turned)
    near(merged_answer(model_class, base, lora, tmp_path / "out"), answer(loaded(model_class, base, lora)), 2e-5)


# ------------------------------------------------------------------------------------------------ modules


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3)
        self.two = nn.Conv2d(3, 4, (2, 3), stride=2, padding=1)
        self.three = nn.Conv3d(3, 4, (1, 2, 3))
        self.point = nn.Conv2d(3, 4, 1)


@pytest.mark.parametrize("target", ["one", "two", "three", "point"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_every_convolution(target: str, lora_bias: bool) -> None:
    torch.manual_seed(0)
    net = Convolutional()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    options = {"target_modules": [target], "lora_bias": lora_bias}
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=5, init_lora_weights=False, **options))
    adapter = adapter_of(model, "a")
    specs = {n: Spec(t.dtype, tuple(t.shape)) for n, t in before.items()}
    changes = placed(adapter, Base("b", None, specs, {n: n for n in specs}, {}, before.__getitem__))
    for name, want in model.merge_and_unload().state_dict().items():
        got = before[name].clone()
        if name in changes:
            changes[name].apply(before[name].flatten().clone(), 0, got.view(-1))
        near(got, want)
    assert set(changes) == {f"{target}.weight"} | ({f"{target}.bias"} if lora_bias else set())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 2}, "grouped"),
        ({"dilation": 2}, "dilation"),
        ({"padding_mode": "reflect", "padding": 1}, "padding_mode"),
    ],
)
def test_convolutions_whose_factors_are_no_sum(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    class Odd(transformers.ResNetForImageClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.resnet.embedder.embedder.convolution = nn.Conv2d(4, 8, 3, **options)

    transformers.Odd = Odd
    try:
        Odd(transformers.ResNetConfig(**RESNET, architectures=["Odd"])).save_pretrained(tmp_path / "base")
        target = r".*embedder\.embedder\.convolution"
        lora = trained(Odd, str(tmp_path / "base"), tmp_path / "lora", target_modules=target)
        with pytest.raises(TwinmergeError, match=text):
            open_model(f"{tmp_path / 'base'}+{lora}")
    finally:
        del transformers.Odd


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "case", ["pissa", *(slow(c) for c in ("plain", "olora", "both ends", "tokens", "gpt2 lora_bias"))]
)
def test_bases_of_16_bits(tmp_path: Path, case: str) -> None:
    """PEFT rounds what it takes from the base to the base's dtype, and the merged weights as well."""
    family, options = CASES[case]
    model_class, base = made(family, tmp_path / "base", torch.bfloat16)
    lora = trained(model_class, base, tmp_path / "lora", **options)
    ours = open_model(f"{base}+{lora}")
    merged = open_model(loaded(model_class, base, lora).merge_and_unload())
    for name in ours.specs:
        got, want = ours.read(name).bfloat16().float(), merged.read(name).float()
        assert (got - want).abs().max() <= 0.01 * want.abs().max()
        if case != "both ends":  # PEFT rounds a table's product before it adds it
            assert (got != want).float().mean() < 0.02


def test_nan_in_an_adapter_is_one_sentence(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=QV)

    def poisoned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        next(t for k, t in tensors.items() if "q_proj" in k)[0, 0] = float("nan")
        return tensors

    rewritten(lora, poisoned)
    with pytest.raises(TwinmergeError, match=r"q_proj.* 'a' holds NaN"):
        merged_answer(model_class, base, lora, tmp_path / "out")


def test_ranks_that_contradict_the_tensors(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=QV)
    for config, rank in (({"r": 8}, 8), ({"r": 4, "rank_pattern": {"q_proj": 2}}, 2)):
        rewritten(lora, dict, **config)
        with pytest.raises(TwinmergeError, match=f"rank 4 .* it is {rank}"):
            open_model(f"{base}+{lora}")


@pytest.mark.parametrize("rows", [[3, 17], [3, 17, 40], {"lm_head": [3, 17, 5]}, None])
def test_rows_that_contradict_the_config(tmp_path: Path, rows: Any) -> None:
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=QV, trainable_token_indices=[3, 17, 5])
    rewritten(lora, dict, trainable_token_indices=rows)
    with pytest.raises(TwinmergeError, match="trainable_token_indices"):
        open_model(f"{base}+{lora}")


# ------------------------------------------------------------------------------------------------ in memory


def test_models_in_memory_are_what_they_compute(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    one = trained(model_class, base, tmp_path / "one", target_modules=QV)
    two = trained(model_class, base, tmp_path / "two", target_modules=["up_proj"])
    model = loaded(model_class, base, one)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 3)
    want = open_model(copy.deepcopy(model).merge_and_unload())
    for name, tensor in whole(open_model(model)).items():
        near(tensor, want.read(name))
    model.load_adapter(two, "two")
    for name, tensor in whole(open_model(model)).items():
        near(tensor, want.read(name))
    model.base_model.set_adapter(["default", "two"])
    with pytest.raises(TwinmergeError, match="2 active adapters"):
        open_model(model)
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(TwinmergeError, match="disabled"):
        open_model(model)
    model.merge_adapter()
    with pytest.raises(TwinmergeError, match="merged into the base already"):
        open_model(model)
    plain = model_class.from_pretrained(base)
    plain.load_adapter(one)
    with pytest.raises(TwinmergeError, match="holds adapters inside"):
        open_model(plain)


# ------------------------------------------------------------------------------------------------ every command


@pytest.mark.parametrize("case", ["both ends", *(slow(c) for c in ("pissa", "tokens", "qwen3"))])
def test_every_command_sees_the_same_model(tmp_path: Path, case: str) -> None:
    family, options = CASES[case]
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    ref, full = f"{base}+{lora}", str(tmp_path / "full")
    loaded(model_class, base, lora).merge_and_unload().save_pretrained(full)
    ours, theirs = open_model(ref), open_model(full)
    assert ours.specs.keys() == theirs.specs.keys()
    for name in ours.specs:
        near(ours.read(name), theirs.read(name))
        near(torch.from_numpy(ours.beginning(name, 5)).view(torch.float32), theirs.read(name).flatten()[:5])

    if family != "qwen3":
        near(answer(Measured(ref).module), answer(model_class.from_pretrained(full)), 2e-5)
    said = tm.diff(ref, full, progress=False)
    assert said.total.relative < 1e-6

    for name, expert in (("adapter", ref), ("full", full)):
        state = tm.Continual.init(tmp_path / f"state of {name}", base, "task_arithmetic", scale=1.0)
        state.add("a", expert)
        state.materialise(tmp_path / f"out of {name}")
    one, two = (model_class.from_pretrained(tmp_path / f"out of {n}") for n in ("adapter", "full"))
    near(answer(one), answer(two), 2e-5)


@pytest.mark.parametrize("case", ["pissa", *(slow(c) for c in ("olora", "rslora", "both ends"))])
def test_a_merged_adapter_of_one_is_the_one(tmp_path: Path, case: str) -> None:
    """What PiSSA and OLoRA take from the base goes into the factors of the plain LoRA that comes out."""
    family, options = CASES[case]
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    merge_lora(base, {"a": lora}, tmp_path / "out", progress=False)
    want = answer(loaded(model_class, base, lora))
    near(answer(loaded(model_class, base, str(tmp_path / "out"))), want, 2e-5)
    near(merged_answer(model_class, base, str(tmp_path / "out"), tmp_path / "full"), want, 2e-5)


def test_rows_do_not_fit_into_a_merged_adapter(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=QV, trainable_token_indices=[3])
    with pytest.raises(TwinmergeError, match="embed_tokens.weight"):
        merge_lora(base, {"a": lora}, tmp_path / "out", progress=False)
    found = merge_lora(base, {"a": lora}, tmp_path / "out", drop_heads=True, progress=False)
    assert found.dropped == {"a": ["embed_tokens.weight"]}


@pytest.mark.parametrize("case", ["gpt2", *(slow(c) for c in ("plain", "pissa", "convolutions", "save"))])
def test_a_base_without_its_config(tmp_path: Path, case: str) -> None:
    """A bare checkpoint: names and shapes alone tell what the adapter changes."""
    family, options = CASES[case]
    model_class, base = made(family, tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", **options)
    merged = loaded(model_class, base, lora).merge_and_unload().state_dict()
    (tmp_path / "base" / "config.json").unlink()
    ours = open_model(f"{base}+{lora}")
    for name in ours.specs:
        near(ours.read(name), merged[name])


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    model_class, base = made("llama", tmp_path / "base")
    model = model_class.from_pretrained(base)
    model.resize_token_embeddings(44)
    for number, options in enumerate(({"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]})):
        config = peft.LoraConfig(**{"target_modules": ["q_proj"], **options}, r=2, init_lora_weights=False)
        lora = tmp_path / str(number)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(lora)
        with pytest.raises(TwinmergeError, match=r"as \[44, 16\], in its base .* it is \[40, 16\]"):
            merged_answer(model_class, base, str(lora), tmp_path / "out")


def test_a_head_that_the_class_does_not_have(tmp_path: Path) -> None:
    """Never "remove it, or name it as a head"."""
    model_class, base = made("llama", tmp_path / "base")
    lora = trained(model_class, base, tmp_path / "lora", target_modules=QV)
    for name in ("value_head.weight", "model.layers.0.mlp.gates.weight", "module.lm_head.weight"):
        rewritten(lora, lambda t, name=name: {**t, f"base_model.model.{name}": torch.ones(2, 16)})
        with pytest.raises(TwinmergeError, match=name.replace("model.", "")) as told:
            merged_answer(model_class, base, lora, tmp_path / "out")
        assert "--head" not in str(told.value)
        rewritten(lora, lambda t, name=name: {k: v for k, v in t.items() if name not in k})


def test_peft_around_other_models() -> None:
    net = peft.get_peft_model(Convolutional(), peft.LoraConfig(target_modules=["one"]))
    with pytest.raises(TwinmergeError, match="is a Convolutional, not a model of transformers"):
        open_model(net)
