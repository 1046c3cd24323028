"""One adapter at weight 1 is merge_and_unload of the PeftModel that stock PEFT loads, however it is read.

The oracle of every case is PEFT alone: the adapter is trained (its tensors are filled at random), saved, and loaded by
`PeftModel.from_pretrained` on the base's folder; its logits and the weights that it merges to are what must come out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

import twinmerge as tm
from twinmerge.models.opened import open_model
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
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "vit": ("ViTConfig", "ViTForImageClassification", {**VIT, "num_labels": 3}),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", RESNET),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**MOE, "num_local_experts": 3}),
    "qwen3": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**MOE, "num_experts": 3, "head_dim": 8}),
    "gpt-oss": ("GptOssConfig", "GptOssForCausalLM", {**MOE, "num_local_experts": 3, "head_dim": 8}),
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


@pytest.mark.parametrize("case", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
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
    twice = case == "tied together"  # PEFT merges one product into the one tensor for each of its two names
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
