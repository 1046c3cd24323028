"""What the configs of two models say differently, as far as it says what their tensors mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    (
        # names, versions, where it came from
        *(
            "_name_or_path",
            "name_or_path",
            "architectures",
            "auto_map",
            "model_name",
            "tokenizer_class",
            "prefix",
            "language",
        ),
        *(
            "transformers_version",
            "_commit_hash",
            "unsloth_version",
            "unsloth_fixed",
            "finetuning_task",
            "task_specific_params",
            "output_past",
            "predict_special_tokens",
            "tie_weights_",
        ),
        # how it is run
        *("dtype", "torch_dtype", "torchscript", "use_cache", "use_return_dict", "return_dict", "output_hidden_states"),
        *("cache_implementation", "reference_compile", "repad_logits_with_grad"),
        *(
            "output_attentions",
            "output_router_logits",
            "_attn_implementation",
            "_attn_implementation_autoset",
            "attn_implementation",
        ),
        *(
            "_attn_implementation_internal",
            "_experts_implementation",
            "_experts_implementation_internal",
            "experts_implementation",
        ),
        *("chunk_size_feed_forward", "pretraining_tp", "gradient_checkpointing", "is_encoder_decoder", "use_bfloat16"),
        # labels, which the heads keep, and tokens, whose meaning the tokenizers are asked for
        *("id2label", "label2id", "num_labels", "_num_labels", "problem_type"),
        *(f"{token}_token_id" for token in ("bos", "eos", "pad", "sep", "unk", "cls", "mask", "decoder_start")),
        *("forced_bos_token_id", "forced_eos_token_id"),
        # what the tensors themselves tell
        *("vocab_size", "tie_word_embeddings", "tie_encoder_decoder"),
        # training
        *(
            "initializer_range",
            "initializer_factor",
            "init_std",
            "init_xavier_std",
            "classifier_dropout",
            "attention_dropout",
        ),
        *(
            "hidden_dropout",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "dropout",
            "dropout_rate",
            "activation_dropout",
        ),
        *(
            "resid_pdrop",
            "embd_pdrop",
            "attn_pdrop",
            "embd_dropout",
            "embedding_dropout",
            "resid_dropout",
            "attn_dropout",
        ),
        *(
            "summary_first_dropout",
            "seq_classif_dropout",
            "qa_dropout",
            "classif_dropout",
            "pooler_dropout",
            "drop_path_rate",
        ),
        *(
            "layerdrop",
            "encoder_layerdrop",
            "decoder_layerdrop",
            "feat_proj_dropout",
            "final_dropout",
            "classifier_dropout_prob",
        ),
        *("router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef", "aux_loss_alpha", "label_smoothing"),
        *("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks", "ctc_loss_reduction"),
        *("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks", "ctc_zero_infinity"),
        # generation, which old configs hold
        *(
            "max_length",
            "min_length",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
            "diversity_penalty",
        ),
        *("temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size"),
        *(
            "encoder_no_repeat_ngram_size",
            "bad_words_ids",
            "num_return_sequences",
            "output_scores",
            "return_dict_in_generate",
        ),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
    )
)
"""Keys that two models of one base may differ in. Every other key, known or not, counts as one that changes what is
computed."""


FORMER = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "tf_legacy_loss": False,
}
"""What releases of transformers wrote into configs until they dropped the key: a config without it means the same."""


def differing(base: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every key that says something else in two configs and is not harmless -> (the expert's value, the base's), None
    where there is none. Keys of configs inside configs are joined by dots.

    Example:
        >>> base = {"rope_parameters": {"rope_theta": 1e4}, "num_hidden_layers": 2, "use_cache": True}
        >>> differing(base, {"rope_parameters": {"rope_theta": 5e5}, "num_hidden_layers": 2, "use_cache": False})
        {'rope_parameters.rope_theta': (500000.0, 10000.0)}
        >>> differing({"num_hidden_layers": 2}, {"num_hidden_layers": 2, "position_embedding_type": "absolute"})
        {}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*base, *expert} - HARMLESS):
        own, other = (config.get(key, FORMER.get(key)) for config in (expert, base))
        if own == other:
            continue
        if isinstance(own, Mapping) and isinstance(other, Mapping):
            found |= {f"{key}.{inner}": values for inner, values in differing(other, own).items()}
        else:
            found[key] = own, other
    return found


def replaced(config: Mapping[str, Any], other: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A config with one key, dots and all, as another config has it.

    Example:
        >>> replaced({"vision": {"depth": 3}, "width": 4}, {"vision": {"depth": 2}}, "vision.depth")
        {'vision': {'depth': 2}, 'width': 4}
    """
    first, _, rest = key.partition(".")
    if rest and isinstance(config.get(first), Mapping) and isinstance(other.get(first), Mapping):
        return {**config, first: replaced(config[first], other[first], rest)}
    if first not in other:
        return {k: v for k, v in config.items() if k != first}
    return {**config, first: other[first]}


def said(differences: Mapping[str, tuple[Any, Any]], other: str = "the base") -> str:
    """The differences in words.

    Example:
        >>> said({"num_hidden_layers": (3, 2), "hidden_act": ("gelu", "relu")})
        "num_hidden_layers is 3 (2 in the base), hidden_act is 'gelu' ('relu' in the base)"
    """
    return ", ".join(f"{key} is {_short(own)} ({_short(base)} in {other})" for key, (own, base) in differences.items())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
