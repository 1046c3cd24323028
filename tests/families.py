"""Tiny random models of the families that transformers has, and batches for them.

`FAMILIES["bert"].model()` is a model of some ten thousand parameters with every vector away from its start (0 or 1),
so that no bias, gain or scale can be lost unseen; `.batch(model, rows, length)` is what it takes. Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORDS, PAD, IMAGE = 64, 1, 60  # words: 3 to 59 are drawn; IMAGE stands where a picture's features go
Batch = dict[str, Tensor]
Maker = Callable[[Any, int, int, torch.Generator], Batch]


@dataclass(frozen=True)
class Family:
    """kind: "encoder", "decoder", "seq2seq", "vision", "audio" or "multimodal"; model_class, config_class: names in
    transformers;
    settings: of the config; make: (model, rows, length, generator) -> a batch."""

    name: str
    kind: str
    model_class: str
    config_class: str
    settings: dict[str, Any]
    make: Maker

    def config(self) -> Any:
        import transformers

        return getattr(transformers, self.config_class)(**self.settings)

    def model(self, seed: int = 0) -> Any:
        """In float32 and evaluation mode."""
        import transformers

        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config()).eval()
        generator = torch.Generator().manual_seed(seed + 9)
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point() and (p.dim() <= 1 or float(p.std()) == 0):
                    p.add_(0.2 * torch.randn(p.shape, generator=generator))
        return model

    def batch(self, model: Any, rows: int, length: int, seed: int = 0) -> Batch:
        """Rows of tokens (pictures, sounds) in the model's dtype; `length` counts tokens."""
        found = self.make(model, rows, length, torch.Generator().manual_seed(seed))
        return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in found.items()}


FAMILIES: dict[str, Family] = {}


def family(name: str, kind: str, model_class: str, config_class: str, make: Maker, **settings: Any) -> None:
    FAMILIES[name] = Family(name, kind, model_class, config_class, settings, make)


# ------------------------------------------------------------------------------------------------ batches


def words(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {"input_ids": torch.randint(3, IMAGE - 1, (rows, length), generator=generator)}


def both_sides(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    found = words(model, rows, length, generator)
    return {**found, "decoder_input_ids": torch.randint(3, IMAGE - 1, (rows, 4), generator=generator)}


def pixels(side: int, channels: int = 3) -> Maker:
    def make(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
        return {"pixel_values": torch.randn(rows, channels, side, side, generator=generator)}

    return make


def frames(count: int, side: int) -> Maker:
    def make(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
        return {"pixel_values": torch.randn(rows, count, 3, side, side, generator=generator)}

    return make


def wave(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {"input_values": torch.randn(rows, 40 * length + 100, generator=generator)}


def spectrum(name: str, bins: int, last: bool = True, count: int | None = None, decoder: bool = False) -> Maker:
    """last: the bins are the last axis; count: frames, 8 for each token where None."""

    def make(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
        steps = count or 8 * length
        shape = (rows, steps, bins) if last else (rows, bins, steps)
        found = {name: torch.randn(shape, generator=generator)}
        if decoder:
            found["decoder_input_ids"] = torch.randint(3, IMAGE - 1, (rows, 4), generator=generator)
        return found

    return make


def series(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    return {"past_values": torch.randn(rows, 16, 2, generator=generator)}


def words_and_pixels(side: int) -> Maker:
    def make(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
        found = words(model, rows, length, generator)
        found["input_ids"][:, -1] = 63  # CLIP's kind reads the last word's state
        return {**found, "pixel_values": torch.randn(rows, 3, side, side, generator=generator)}

    return make


def words_with_image(side: int, features: int) -> Maker:
    """Every row has one picture, of `features` places among the words."""

    def make(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
        ids = torch.randint(3, IMAGE - 1, (rows, length + features), generator=generator)
        ids[:, 1 : 1 + features] = IMAGE
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(rows, 3, side, side, generator=generator),
        }

    return make


def boxes(model: Any, rows: int, length: int, generator: torch.Generator) -> Batch:
    corner = torch.randint(0, 500, (rows, length, 2), generator=generator)
    size = torch.randint(1, 400, (rows, length, 2), generator=generator)
    return {**words(model, rows, length, generator), "bbox": torch.cat([corner, corner + size], 2)}


# ------------------------------------------------------------------------------------------------ encoders of text

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": WORDS, "pad_token_id": PAD}
PLACED = {**TEXT, "max_position_embeddings": 64}


def encoder(name: str, model_class: str, config_class: str, make: Maker = words, **settings: Any) -> None:
    family(name, "encoder", model_class, config_class, make, **settings)


encoder("bert", "BertModel", "BertConfig", **PLACED)
encoder("roberta", "RobertaModel", "RobertaConfig", **PLACED)
encoder("xlm_roberta", "XLMRobertaModel", "XLMRobertaConfig", **PLACED)
encoder("xlm_roberta_xl", "XLMRobertaXLModel", "XLMRobertaXLConfig", **PLACED)
encoder("roberta_prelayernorm", "RobertaPreLayerNormModel", "RobertaPreLayerNormConfig", **PLACED)
encoder("camembert", "CamembertModel", "CamembertConfig", **PLACED)
encoder("data2vec_text", "Data2VecTextModel", "Data2VecTextConfig", **PLACED)
encoder("xmod", "XmodModel", "XmodConfig", languages=["en_XX"], default_language="en_XX", **PLACED)
encoder("ernie", "ErnieModel", "ErnieConfig", **PLACED)
encoder("megatron_bert", "MegatronBertModel", "MegatronBertConfig", **PLACED)
encoder("mpnet", "MPNetModel", "MPNetConfig", **PLACED)
encoder("electra", "ElectraModel", "ElectraConfig", embedding_size=8, **PLACED)
encoder("albert", "AlbertModel", "AlbertConfig", embedding_size=8, **PLACED)
encoder("convbert", "ConvBertModel", "ConvBertConfig", embedding_size=16, head_ratio=1, **PLACED)
encoder("rembert", "RemBertModel", "RemBertConfig", input_embedding_size=8, output_embedding_size=8, **PLACED)
encoder("roformer", "RoFormerModel", "RoFormerConfig", embedding_size=16, **PLACED)
encoder("nystromformer", "NystromformerModel", "NystromformerConfig", segment_means_seq_len=64, **PLACED)
encoder("ibert", "IBertModel", "IBertConfig", **PLACED)
encoder("splinter", "SplinterModel", "SplinterConfig", **PLACED)
encoder("esm", "EsmModel", "EsmConfig", mask_token_id=4, position_embedding_type="rotary", **PLACED)
encoder("deberta", "DebertaModel", "DebertaConfig", relative_attention=True, pos_att_type=["p2c", "c2p"], **PLACED)
encoder(
    "deberta_v2",
    "DebertaV2Model",
    "DebertaV2Config",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
    norm_rel_ebd="layer_norm",
    share_att_key=True,
    **PLACED,
)
encoder("longformer", "LongformerModel", "LongformerConfig", attention_window=[4, 4], **PLACED)
encoder(
    "big_bird",
    "BigBirdModel",
    "BigBirdConfig",
    attention_type="block_sparse",
    block_size=2,
    num_random_blocks=1,
    **PLACED,
)
encoder("fnet", "FNetModel", "FNetConfig", **{k: v for k, v in PLACED.items() if k != "num_attention_heads"})
encoder(
    "modernbert",
    "ModernBertModel",
    "ModernBertConfig",
    eos_token_id=2,
    bos_token_id=0,
    cls_token_id=0,
    sep_token_id=2,
    **PLACED,
)
encoder(
    "eurobert",
    "EuroBertModel",
    "EuroBertConfig",
    num_key_value_heads=2,
    mask_token_id=4,
    bos_token_id=0,
    eos_token_id=2,
    **PLACED,
)
encoder("nomic_bert", "NomicBertModel", "NomicBertConfig", **PLACED)
encoder(
    "mobilebert",
    "MobileBertModel",
    "MobileBertConfig",
    embedding_size=8,
    true_hidden_size=8,
    intra_bottleneck_size=8,
    num_feedforward_networks=2,
    **PLACED,
)
encoder(
    "squeezebert",
    "SqueezeBertModel",
    "SqueezeBertConfig",
    embedding_size=16,
    q_groups=2,
    k_groups=2,
    v_groups=2,
    post_attention_groups=1,
    intermediate_groups=2,
    output_groups=2,
    **PLACED,
)
encoder("mra", "MraModel", "MraConfig", **PLACED)
encoder("yoso", "YosoModel", "YosoConfig", use_expectation=True, **PLACED)
encoder("luke", "LukeModel", "LukeConfig", entity_vocab_size=10, entity_emb_size=8, **PLACED)
encoder(
    "distilbert",
    "DistilBertModel",
    "DistilBertConfig",
    vocab_size=WORDS,
    dim=16,
    n_layers=2,
    n_heads=2,
    hidden_dim=24,
    max_position_embeddings=64,
    pad_token_id=PAD,
)
encoder(
    "xlm",
    "XLMModel",
    "XLMConfig",
    vocab_size=WORDS,
    emb_dim=16,
    n_layers=2,
    n_heads=2,
    max_position_embeddings=64,
    pad_index=PAD,
    pad_token_id=PAD,
)
encoder(
    "flaubert",
    "FlaubertModel",
    "FlaubertConfig",
    vocab_size=WORDS,
    emb_dim=16,
    n_layers=2,
    n_heads=2,
    max_position_embeddings=64,
    pad_index=PAD,
    pad_token_id=PAD,
)
encoder("xlnet", "XLNetModel", "XLNetConfig", vocab_size=WORDS, d_model=16, n_layer=2, n_head=2, d_inner=24)
encoder(
    "funnel",
    "FunnelModel",
    "FunnelConfig",
    vocab_size=WORDS,
    block_sizes=[1, 1],
    num_decoder_layers=1,
    d_model=16,
    n_head=2,
    d_head=8,
    d_inner=24,
)
encoder(
    "canine",
    "CanineModel",
    "CanineConfig",
    num_hash_buckets=16,
    num_hash_functions=2,
    downsampling_rate=2,
    local_transformer_stride=4,
    **SIZES,
    max_position_embeddings=64,
)
encoder("layoutlm", "LayoutLMModel", "LayoutLMConfig", boxes, max_2d_position_embeddings=1024, **PLACED)
encoder(
    "lilt",
    "LiltModel",
    "LiltConfig",
    boxes,
    channel_shrink_ratio=2,
    max_2d_position_embeddings=1024,
    **{**PLACED, "hidden_size": 24},
)
encoder(
    "bros",
    "BrosModel",
    "BrosConfig",
    lambda m, r, n, g: {**words(m, r, n, g), "bbox": torch.rand(r, n, 8, generator=g)},
    **{**PLACED, "hidden_size": 64},
)
encoder("tapas", "TapasModel", "TapasConfig", type_vocab_sizes=[3, 8, 8, 2, 8, 8, 10], **PLACED)
encoder(
    "perceiver",
    "PerceiverForMaskedLM",
    "PerceiverConfig",
    lambda m, r, n, g: {**words(m, r, n, g), "attention_mask": torch.ones(r, n)},
    num_latents=4,
    d_latents=16,
    d_model=16,
    num_blocks=1,
    num_self_attends_per_block=2,
    num_self_attention_heads=2,
    num_cross_attention_heads=2,
    vocab_size=WORDS,
    max_position_embeddings=64,
)

# ------------------------------------------------------------------------------------------------ decoders

LLAMA = {**PLACED, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 2}
LLAMA2 = {**LLAMA, "head_dim": 8}
MOE = {"num_experts_per_tok": 2}


def decoder(name: str, model_class: str, config_class: str, make: Maker = words, **settings: Any) -> None:
    family(name, "decoder", model_class, config_class, make, **settings)


decoder("gpt2", "GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=64)
decoder(
    "gpt_bigcode",
    "GPTBigCodeForCausalLM",
    "GPTBigCodeConfig",
    vocab_size=WORDS,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
)
decoder(
    "gpt_neo",
    "GPTNeoForCausalLM",
    "GPTNeoConfig",
    vocab_size=WORDS,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    attention_types=[[["global", "local"], 1]],
    window_size=4,
    max_position_embeddings=64,
)
decoder("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", **PLACED)
decoder(
    "gpt_neox_japanese",
    "GPTNeoXJapaneseForCausalLM",
    "GPTNeoXJapaneseConfig",
    intermediate_multiple_size=2,
    **{k: v for k, v in PLACED.items() if k != "intermediate_size"},
)
decoder(
    "gptj",
    "GPTJForCausalLM",
    "GPTJConfig",
    vocab_size=WORDS,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
    rotary_dim=4,
)
decoder(
    "codegen",
    "CodeGenForCausalLM",
    "CodeGenConfig",
    vocab_size=WORDS,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_positions=64,
    rotary_dim=4,
)
decoder(
    "openai_gpt",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTConfig",
    vocab_size=WORDS,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
)
decoder(
    "ctrl", "CTRLLMHeadModel", "CTRLConfig", vocab_size=WORDS, n_embd=16, dff=24, n_layer=2, n_head=2, n_positions=64
)
decoder("biogpt", "BioGptForCausalLM", "BioGptConfig", **PLACED)
decoder(
    "opt",
    "OPTForCausalLM",
    "OPTConfig",
    vocab_size=WORDS,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    word_embed_proj_dim=8,
    max_position_embeddings=64,
    pad_token_id=PAD,
)
decoder(
    "xglm",
    "XGLMForCausalLM",
    "XGLMConfig",
    vocab_size=WORDS,
    d_model=16,
    num_layers=2,
    attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=64,
)
decoder("bloom", "BloomForCausalLM", "BloomConfig", vocab_size=WORDS, hidden_size=16, n_layer=2, n_head=2)
decoder("mpt", "MptForCausalLM", "MptConfig", vocab_size=WORDS, d_model=16, n_layers=2, n_heads=2, max_seq_len=64)
decoder(
    "falcon",
    "FalconForCausalLM",
    "FalconConfig",
    vocab_size=WORDS,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
)
decoder(
    "falcon_new",
    "FalconForCausalLM",
    "FalconConfig",
    vocab_size=WORDS,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_kv_heads=1,
    new_decoder_architecture=True,
    bias=True,
)
decoder("llama", "LlamaForCausalLM", "LlamaConfig", **LLAMA)
decoder("mistral", "MistralForCausalLM", "MistralConfig", **LLAMA2)
decoder("ministral", "MinistralForCausalLM", "MinistralConfig", **LLAMA2)
decoder("qwen2", "Qwen2ForCausalLM", "Qwen2Config", **LLAMA)
decoder("qwen3", "Qwen3ForCausalLM", "Qwen3Config", **LLAMA2)
decoder("gemma", "GemmaForCausalLM", "GemmaConfig", **LLAMA2)
decoder("gemma2", "Gemma2ForCausalLM", "Gemma2Config", query_pre_attn_scalar=8, sliding_window=4, **LLAMA2)
decoder("gemma3_text", "Gemma3ForCausalLM", "Gemma3TextConfig", query_pre_attn_scalar=8, sliding_window=4, **LLAMA2)
decoder("phi", "PhiForCausalLM", "PhiConfig", **{**LLAMA, "num_key_value_heads": 2})
decoder("phi3", "Phi3ForCausalLM", "Phi3Config", **LLAMA)
decoder("stablelm", "StableLmForCausalLM", "StableLmConfig", **LLAMA)
decoder("stablelm_qk", "StableLmForCausalLM", "StableLmConfig", qk_layernorm=True, use_parallel_residual=True, **LLAMA)
decoder("cohere", "CohereForCausalLM", "CohereConfig", **LLAMA)
decoder("cohere_qk", "CohereForCausalLM", "CohereConfig", use_qk_norm=True, **LLAMA)
decoder("cohere2", "Cohere2ForCausalLM", "Cohere2Config", sliding_window=4, **LLAMA)
decoder("olmo", "OlmoForCausalLM", "OlmoConfig", **LLAMA)
decoder("olmo2", "Olmo2ForCausalLM", "Olmo2Config", **LLAMA)
decoder("olmo3", "Olmo3ForCausalLM", "Olmo3Config", sliding_window=4, **LLAMA)
decoder("granite", "GraniteForCausalLM", "GraniteConfig", **LLAMA)
decoder("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", **LLAMA)
decoder("persimmon", "PersimmonForCausalLM", "PersimmonConfig", **PLACED)
decoder("nemotron", "NemotronForCausalLM", "NemotronConfig", **LLAMA2)
decoder("glm", "GlmForCausalLM", "GlmConfig", **LLAMA2)
decoder("glm4", "Glm4ForCausalLM", "Glm4Config", **LLAMA2)
decoder("smollm3", "SmolLM3ForCausalLM", "SmolLM3Config", **LLAMA)
decoder("helium", "HeliumForCausalLM", "HeliumConfig", **LLAMA2)
decoder("exaone4", "Exaone4ForCausalLM", "Exaone4Config", sliding_window=4, **LLAMA)
decoder("seed_oss", "SeedOssForCausalLM", "SeedOssConfig", **LLAMA2)
decoder("ernie4_5", "Ernie4_5ForCausalLM", "Ernie4_5Config", **LLAMA2)
decoder("hunyuan_dense", "HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", **LLAMA2)
decoder("apertus", "ApertusForCausalLM", "ApertusConfig", **LLAMA)
decoder("arcee", "ArceeForCausalLM", "ArceeConfig", **LLAMA2)
decoder("diffllama", "DiffLlamaForCausalLM", "DiffLlamaConfig", **{**LLAMA, "num_key_value_heads": 2})
decoder("bitnet", "BitNetForCausalLM", "BitNetConfig", **LLAMA)
decoder("cwm", "CwmForCausalLM", "CwmConfig", **LLAMA2)
decoder("nanochat", "NanoChatForCausalLM", "NanoChatConfig", **LLAMA)
decoder("vaultgemma", "VaultGemmaForCausalLM", "VaultGemmaConfig", query_pre_attn_scalar=8, sliding_window=4, **LLAMA2)
decoder(
    "modernbert_decoder",
    "ModernBertDecoderForCausalLM",
    "ModernBertDecoderConfig",
    eos_token_id=2,
    bos_token_id=0,
    cls_token_id=0,
    sep_token_id=2,
    **PLACED,
)
decoder("mixtral", "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **MOE, **LLAMA)
decoder(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    num_experts=4,
    moe_intermediate_size=12,
    shared_expert_intermediate_size=12,
    **MOE,
    **LLAMA,
)
decoder("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, moe_intermediate_size=12, **MOE, **LLAMA2)
decoder("olmoe", "OlmoeForCausalLM", "OlmoeConfig", num_experts=4, **MOE, **LLAMA)
decoder("granitemoe", "GraniteMoeForCausalLM", "GraniteMoeConfig", num_local_experts=4, **MOE, **LLAMA)
decoder("phimoe", "PhimoeForCausalLM", "PhimoeConfig", num_local_experts=4, **MOE, **LLAMA)
decoder(
    "dbrx",
    "DbrxForCausalLM",
    "DbrxConfig",
    vocab_size=WORDS,
    d_model=16,
    n_heads=2,
    n_layers=2,
    max_seq_len=64,
    attn_config={"kv_n_heads": 1, "rope_theta": 10000.0, "clip_qkv": 8.0},
    ffn_config={"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
)
decoder(
    "jetmoe",
    "JetMoeForCausalLM",
    "JetMoeConfig",
    num_local_experts=4,
    kv_channels=8,
    **MOE,
    **{k: v for k, v in LLAMA.items() if k != "num_attention_heads"},
)
decoder(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "DeepseekV2Config",
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
    topk_method="greedy",
    **MOE,
    **{**LLAMA, "num_key_value_heads": 2},
)
decoder(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "DeepseekV3Config",
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    **MOE,
    **{**LLAMA, "num_key_value_heads": 2},
)
decoder("gpt_oss", "GptOssForCausalLM", "GptOssConfig", num_local_experts=4, sliding_window=4, **MOE, **LLAMA2)
decoder("mamba", "MambaForCausalLM", "MambaConfig", vocab_size=WORDS, hidden_size=16, state_size=4, num_hidden_layers=2)
decoder(
    "mamba2",
    "Mamba2ForCausalLM",
    "Mamba2Config",
    vocab_size=WORDS,
    hidden_size=16,
    state_size=4,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=8,
    n_groups=1,
    chunk_size=4,
)
decoder(
    "recurrent_gemma",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaConfig",
    lru_width=16,
    attention_window_size=8,
    **{**LLAMA2, "num_hidden_layers": 3},
)
decoder(
    "rwkv",
    "RwkvForCausalLM",
    "RwkvConfig",
    vocab_size=WORDS,
    hidden_size=16,
    attention_hidden_size=16,
    num_hidden_layers=2,
    context_length=64,
)
decoder(
    "lfm2",
    "Lfm2ForCausalLM",
    "Lfm2Config",
    layer_types=["conv", "full_attention"],
    conv_L_cache=3,
    block_multiple_of=4,
    **LLAMA,
)
decoder(
    "bamba",
    "BambaForCausalLM",
    "BambaConfig",
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_d_state=4,
    mamba_n_groups=1,
    mamba_chunk_size=4,
    attn_layer_indices=[1],
    **LLAMA,
)
decoder(
    "jamba",
    "JambaForCausalLM",
    "JambaConfig",
    num_experts=2,
    mamba_d_state=4,
    mamba_dt_rank=4,
    attn_layer_period=2,
    attn_layer_offset=1,
    expert_layer_period=2,
    expert_layer_offset=1,
    use_mamba_kernels=False,
    **MOE,
    **LLAMA,
)

# ------------------------------------------------------------------------------------------------ encoder and decoder

SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
    "pad_token_id": PAD,
    "eos_token_id": 2,
}


def seq2seq(name: str, model_class: str, config_class: str, make: Maker = both_sides, **settings: Any) -> None:
    family(name, "seq2seq", model_class, config_class, make, **settings)


seq2seq("t5", "T5ForConditionalGeneration", "T5Config", **T5)
seq2seq("mt5", "MT5ForConditionalGeneration", "MT5Config", feed_forward_proj="gated-gelu", **T5)
seq2seq("umt5", "UMT5ForConditionalGeneration", "UMT5Config", **T5)
seq2seq("longt5_local", "LongT5ForConditionalGeneration", "LongT5Config", local_radius=3, **T5)
seq2seq(
    "longt5_global",
    "LongT5ForConditionalGeneration",
    "LongT5Config",
    local_radius=3,
    global_block_size=4,
    encoder_attention_type="transient-global",
    **T5,
)
seq2seq(
    "switch_transformers",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    num_experts=4,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    **T5,
)
seq2seq("bart", "BartForConditionalGeneration", "BartConfig", **SEQ2SEQ)
seq2seq("mbart", "MBartForConditionalGeneration", "MBartConfig", **SEQ2SEQ)
seq2seq("marian", "MarianMTModel", "MarianConfig", **SEQ2SEQ)
seq2seq("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", **SEQ2SEQ)
seq2seq("pegasus_x", "PegasusXForConditionalGeneration", "PegasusXConfig", block_size=4, num_global_tokens=2, **SEQ2SEQ)
seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "BlenderbotConfig", **SEQ2SEQ)
seq2seq("blenderbot_small", "BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", **SEQ2SEQ)
seq2seq("m2m_100", "M2M100ForConditionalGeneration", "M2M100Config", **SEQ2SEQ)
seq2seq("plbart", "PLBartForConditionalGeneration", "PLBartConfig", **SEQ2SEQ)
seq2seq("mvp", "MvpForConditionalGeneration", "MvpConfig", **SEQ2SEQ)
seq2seq(
    "nllb_moe",
    "NllbMoeForConditionalGeneration",
    "NllbMoeConfig",
    num_experts=4,
    encoder_sparse_step=2,
    decoder_sparse_step=2,
    **SEQ2SEQ,
)
seq2seq(
    "bigbird_pegasus",
    "BigBirdPegasusForConditionalGeneration",
    "BigBirdPegasusConfig",
    block_size=2,
    num_random_blocks=1,
    **SEQ2SEQ,
)
seq2seq(
    "led",
    "LEDForConditionalGeneration",
    "LEDConfig",
    attention_window=4,
    max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
    **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
)
seq2seq(
    "fsmt",
    "FSMTForConditionalGeneration",
    "FSMTConfig",
    langs=["en", "de"],
    src_vocab_size=WORDS,
    tgt_vocab_size=WORDS,
    **{k: v for k, v in SEQ2SEQ.items() if k != "vocab_size"},
)
seq2seq(
    "prophetnet",
    "ProphetNetForConditionalGeneration",
    "ProphetNetConfig",
    vocab_size=WORDS,
    hidden_size=16,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_encoder_attention_heads=2,
    num_decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=64,
    num_buckets=8,
    relative_max_distance=16,
    decoder_start_token_id=0,
)
seq2seq("encoder_decoder_bert", "BertGenerationDecoder", "BertGenerationConfig", words, is_decoder=True, **PLACED)

# ------------------------------------------------------------------------------------------------ pictures

VISION = {**SIZES, "image_size": 8, "patch_size": 4}


def vision(
    name: str, model_class: str, config_class: str, side: int = 8, make: Maker | None = None, **settings: Any
) -> None:
    family(name, "vision", model_class, config_class, make or pixels(side), **settings)


vision("vit", "ViTModel", "ViTConfig", **VISION)
vision("vit_msn", "ViTMSNModel", "ViTMSNConfig", **VISION)
vision("deit", "DeiTModel", "DeiTConfig", **VISION)
vision("beit", "BeitModel", "BeitConfig", use_relative_position_bias=True, layer_scale_init_value=0.1, **VISION)
vision(
    "data2vec_vision",
    "Data2VecVisionModel",
    "Data2VecVisionConfig",
    use_shared_relative_position_bias=True,
    layer_scale_init_value=0.1,
    **VISION,
)
vision(
    "dinov2",
    "Dinov2Model",
    "Dinov2Config",
    **{k: v for k, v in VISION.items() if k != "intermediate_size"},
    mlp_ratio=2,
)
vision(
    "dinov2_with_registers",
    "Dinov2WithRegistersModel",
    "Dinov2WithRegistersConfig",
    **{k: v for k, v in VISION.items() if k != "intermediate_size"},
    mlp_ratio=2,
)
vision("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **VISION, num_register_tokens=2)
vision("ijepa", "IJepaModel", "IJepaConfig", **VISION)
vision(
    "hiera",
    "HieraModel",
    "HieraConfig",
    32,
    embed_dim=8,
    image_size=[32, 32],
    depths=[1, 1],
    num_heads=[1, 2],
    masked_unit_size=[4, 4],
    num_query_pool=1,
    query_stride=[2, 2],
    patch_size=[3, 3],
    patch_stride=[4, 4],
    patch_padding=[1, 1],
)
vision(
    "swin",
    "SwinModel",
    "SwinConfig",
    16,
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=2,
)
vision(
    "swinv2",
    "Swinv2Model",
    "Swinv2Config",
    16,
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=2,
)
vision(
    "donut_swin",
    "DonutSwinModel",
    "DonutSwinConfig",
    16,
    image_size=16,
    patch_size=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=2,
)
vision(
    "pvt",
    "PvtModel",
    "PvtConfig",
    64,
    image_size=64,
    depths=[1, 1, 1, 1],
    hidden_sizes=[8, 8, 16, 16],
    num_attention_heads=[1, 1, 2, 2],
)
vision(
    "segformer",
    "SegformerModel",
    "SegformerConfig",
    64,
    num_encoder_blocks=2,
    depths=[1, 1],
    sr_ratios=[2, 1],
    hidden_sizes=[8, 16],
    patch_sizes=[7, 3],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
)
vision(
    "convnext",
    "ConvNextModel",
    "ConvNextConfig",
    32,
    depths=[1, 1],
    hidden_sizes=[8, 16],
    num_stages=2,
    layer_scale_init_value=0.1,
)
vision("convnextv2", "ConvNextV2Model", "ConvNextV2Config", 32, depths=[1, 1], hidden_sizes=[8, 16], num_stages=2)
vision("resnet", "ResNetModel", "ResNetConfig", 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
vision(
    "regnet", "RegNetModel", "RegNetConfig", 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4
)
vision("bit", "BitModel", "BitConfig", 32, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2)
vision("mobilenet_v1", "MobileNetV1Model", "MobileNetV1Config", 32, depth_multiplier=0.25, min_depth=4)
vision(
    "mobilenet_v2",
    "MobileNetV2Model",
    "MobileNetV2Config",
    32,
    depth_multiplier=0.25,
    min_depth=4,
    depth_divisible_by=4,
)
vision(
    "mobilevit",
    "MobileViTModel",
    "MobileViTConfig",
    64,
    hidden_sizes=[8, 8, 8],
    neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
    num_attention_heads=2,
    image_size=64,
)
vision(
    "efficientnet",
    "EfficientNetModel",
    "EfficientNetConfig",
    32,
    width_coefficient=0.25,
    depth_coefficient=0.1,
    hidden_dim=320,
)
vision(
    "poolformer",
    "PoolFormerModel",
    "PoolFormerConfig",
    64,
    num_encoder_blocks=2,
    depths=[1, 1],
    hidden_sizes=[8, 16],
    patch_sizes=[7, 3],
    strides=[4, 2],
    padding=[2, 1],
    mlp_ratio=2.0,
)
vision(
    "focalnet",
    "FocalNetModel",
    "FocalNetConfig",
    32,
    image_size=32,
    patch_size=2,
    embed_dim=8,
    hidden_sizes=[8, 16],
    depths=[1, 1],
    focal_levels=[1, 1],
    focal_windows=[3, 3],
)
vision(
    "levit",
    "LevitModel",
    "LevitConfig",
    64,
    image_size=64,
    hidden_sizes=[16, 16, 16],
    num_attention_heads=[1, 1, 1],
    depths=[1, 1, 1],
    key_dim=[8, 8, 8],
    attention_ratio=[2, 2, 2],
    mlp_ratio=[2, 2, 2],
    down_ops=[["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 2, 4, 2, 2]],
)
vision("cvt", "CvtModel", "CvtConfig", 32, embed_dim=[8, 8, 16], num_heads=[1, 1, 2], depth=[1, 2, 3])
vision(
    "vit_mae",
    "ViTMAEModel",
    "ViTMAEConfig",
    make=lambda m, r, n, g: {**pixels(8)(m, r, n, g), "noise": torch.rand(r, 4, generator=g)},
    decoder_hidden_size=16,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=16,
    **VISION,
)
vision(
    "yolos", "YolosForObjectDetection", "YolosConfig", 16, **{**VISION, "image_size": [16, 16]}, num_detection_tokens=3
)
vision("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", **VISION)
vision("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", **VISION)
vision(
    "imagegpt",
    "ImageGPTModel",
    "ImageGPTConfig",
    make=words,
    vocab_size=WORDS,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=64,
)
vision(
    "vivit", "VivitModel", "VivitConfig", make=frames(4, 8), image_size=8, num_frames=4, tubelet_size=[2, 4, 4], **SIZES
)
vision("timesformer", "TimesformerModel", "TimesformerConfig", make=frames(4, 8), num_frames=4, **VISION)
vision("videomae", "VideoMAEModel", "VideoMAEConfig", make=frames(4, 8), num_frames=4, tubelet_size=2, **VISION)
vision(
    "dpt",
    "DPTModel",
    "DPTConfig",
    16,
    **{**VISION, "image_size": 16},
    is_hybrid=False,
    backbone_out_indices=[0, 1],
    neck_hidden_sizes=[8, 8],
    reassemble_factors=[1, 1],
)

# ------------------------------------------------------------------------------------------------ sounds and series

SOUND = {
    **SIZES,
    "conv_dim": [8, 8],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": WORDS,
}


def audio(name: str, model_class: str, config_class: str, make: Maker = wave, **settings: Any) -> None:
    family(name, "audio", model_class, config_class, make, **settings)


audio("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", **SOUND)
audio(
    "wav2vec2_stable", "Wav2Vec2Model", "Wav2Vec2Config", do_stable_layer_norm=True, feat_extract_norm="layer", **SOUND
)
audio("wav2vec2_conformer", "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", **SOUND)
audio("hubert", "HubertModel", "HubertConfig", **SOUND)
audio("unispeech", "UniSpeechModel", "UniSpeechConfig", **SOUND)
audio("unispeech_sat", "UniSpeechSatModel", "UniSpeechSatConfig", **SOUND)
audio("wavlm", "WavLMModel", "WavLMConfig", num_buckets=8, **SOUND)
audio(
    "data2vec_audio",
    "Data2VecAudioModel",
    "Data2VecAudioConfig",
    **{k: v for k, v in SOUND.items() if k != "num_conv_pos_embeddings"},
    conv_pos_kernel_size=3,
    num_conv_pos_embeddings=2,
)
audio("sew", "SEWModel", "SEWConfig", squeeze_factor=2, **SOUND)
audio(
    "wav2vec2_bert",
    "Wav2Vec2BertModel",
    "Wav2Vec2BertConfig",
    spectrum("input_features", 8),
    feature_projection_input_dim=8,
    **SIZES,
)
audio(
    "audio_spectrogram_transformer",
    "ASTModel",
    "ASTConfig",
    spectrum("input_values", 16, count=24),
    num_mel_bins=16,
    max_length=24,
    patch_size=4,
    frequency_stride=4,
    time_stride=4,
    **SIZES,
)
audio(
    "whisper",
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    spectrum("input_features", 8, last=False, count=16, decoder=True),
    num_mel_bins=8,
    max_source_positions=8,
    max_target_positions=32,
    **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
)
audio(
    "speech_to_text",
    "Speech2TextForConditionalGeneration",
    "Speech2TextConfig",
    spectrum("input_features", 8, decoder=True),
    input_feat_per_channel=8,
    input_channels=1,
    conv_channels=8,
    max_source_positions=128,
    max_target_positions=32,
    **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
)
audio(
    "moonshine",
    "MoonshineForConditionalGeneration",
    "MoonshineConfig",
    lambda m, r, n, g: {
        "input_values": torch.randn(r, 1200, generator=g),
        "decoder_input_ids": torch.randint(3, 50, (r, 4), generator=g),
    },
    vocab_size=WORDS,
    hidden_size=16,
    intermediate_size=24,
    encoder_num_hidden_layers=2,
    decoder_num_hidden_layers=2,
    encoder_num_attention_heads=2,
    decoder_num_attention_heads=2,
    max_position_embeddings=64,
)
audio(
    "patchtst",
    "PatchTSTModel",
    "PatchTSTConfig",
    series,
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    num_hidden_layers=2,
    d_model=16,
    num_attention_heads=2,
    ffn_dim=24,
)
audio(
    "patchtsmixer",
    "PatchTSMixerModel",
    "PatchTSMixerConfig",
    series,
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    num_layers=2,
    d_model=16,
)

# ------------------------------------------------------------------------------------------------ several kinds of input

CLIP_TEXT = {
    **SIZES,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "eos_token_id": 63,
    "bos_token_id": 0,
    "pad_token_id": PAD,
}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
LLAVA_VISION = {"model_type": "clip_vision_model", **VISION}


def multimodal(name: str, model_class: str, config_class: str, make: Maker, **settings: Any) -> None:
    family(name, "multimodal", model_class, config_class, make, **settings)


multimodal(
    "clip",
    "CLIPModel",
    "CLIPConfig",
    words_and_pixels(8),
    text_config=CLIP_TEXT,
    vision_config=VISION,
    projection_dim=8,
)
multimodal(
    "siglip",
    "SiglipModel",
    "SiglipConfig",
    words_and_pixels(8),
    text_config={**CLIP_TEXT, "projection_size": 16},
    vision_config=VISION,
)
multimodal(
    "chinese_clip",
    "ChineseCLIPModel",
    "ChineseCLIPConfig",
    words_and_pixels(8),
    text_config=PLACED,
    vision_config=VISION,
    projection_dim=8,
)
multimodal(
    "blip",
    "BlipModel",
    "BlipConfig",
    words_and_pixels(8),
    text_config={**PLACED, "encoder_hidden_size": 16},
    vision_config=VISION,
    projection_dim=8,
)
multimodal("clap", "ClapTextModel", "ClapTextConfig", words, **PLACED)
multimodal(
    "vilt",
    "ViltModel",
    "ViltConfig",
    lambda m, r, n, g: {**words(m, r, n, g), **pixels(8)(m, r, n, g)},
    vocab_size=WORDS,
    max_position_embeddings=64,
    **VISION,
)
multimodal(
    "visual_bert",
    "VisualBertModel",
    "VisualBertConfig",
    lambda m, r, n, g: {**words(m, r, n, g), "visual_embeds": torch.randn(r, 3, 8, generator=g)},
    visual_embedding_dim=8,
    **PLACED,
)
multimodal(
    "lxmert",
    "LxmertModel",
    "LxmertConfig",
    lambda m, r, n, g: {
        **words(m, r, n, g),
        "visual_feats": torch.randn(r, 3, 8, generator=g),
        "visual_pos": torch.rand(r, 3, 4, generator=g),
    },
    vocab_size=WORDS,
    hidden_size=16,
    num_attention_heads=2,
    intermediate_size=24,
    l_layers=1,
    x_layers=1,
    r_layers=1,
    visual_feat_dim=8,
    max_position_embeddings=64,
)
multimodal("git", "GitForCausalLM", "GitConfig", words_and_pixels(8), vision_config=VISION, **PLACED)
multimodal(
    "llava",
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    words_with_image(8, 4),
    text_config={"model_type": "llama", **LLAMA},
    vision_config=LLAVA_VISION,
    image_token_index=IMAGE,
    vision_feature_layer=-1,
    vision_feature_select_strategy="default",
)
multimodal(
    "paligemma",
    "PaliGemmaForConditionalGeneration",
    "PaliGemmaConfig",
    lambda m, r, n, g: {
        **words_with_image(8, 4)(m, r, n, g),
        "token_type_ids": torch.zeros(r, n + 4, dtype=torch.long),
    },
    text_config={"model_type": "gemma", **LLAMA2},
    vision_config=SIGLIP,
    image_token_index=IMAGE,
    projection_dim=16,
    hidden_size=16,
)
multimodal(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    "Gemma3Config",
    lambda m, r, n, g: {
        **words_with_image(8, 4)(m, r, n, g),
        "token_type_ids": torch.zeros(r, n + 4, dtype=torch.long),
    },
    text_config={"model_type": "gemma3_text", "query_pre_attn_scalar": 8, "sliding_window": 4, **LLAMA2},
    vision_config=SIGLIP,
    mm_tokens_per_image=4,
    image_token_index=IMAGE,
    boi_token_index=61,
    eoi_token_index=62,
)
multimodal(
    "blip_2",
    "Blip2ForConditionalGeneration",
    "Blip2Config",
    words_with_image(8, 3),
    text_config={
        "model_type": "opt",
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
    },
    vision_config=VISION,
    qformer_config={**SIZES, "encoder_hidden_size": 16, "vocab_size": WORDS},
    num_query_tokens=3,
    image_token_index=IMAGE,
)
