"""What belongs to the body is merged or refused by name, in every family; what loading passes over is never a head."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import twinmerge as tm
from twinmerge.engine.merge import Merge
from twinmerge.errors import TwinmergeError
from twinmerge.models.matching import match
from twinmerge.models.opening import open_model
from twinmerge.recipes.recipe import Recipe

CLASSES = (
    "BertForSequenceClassification",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
    "ViTModel",
)
DEPTH = {"GPT2LMHeadModel": "n_layer", "T5ForConditionalGeneration": "num_layers"}
IN_BODY = {
    "BertForSequenceClassification": "encoder.layer.0.output.dense.weight",
    "GPT2LMHeadModel": "h.0.mlp.c_fc.bias",
    "LlamaForCausalLM": "layers.1.mlp.up_proj.weight",
    "T5ForConditionalGeneration": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "ViTModel": "layers.0.attention.q_proj.weight",
}


def rewrite(path: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    file = Path(path, "model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return path


def drop(path: str, canonical: str) -> str:
    stored = open_model(path).stored[canonical]
    return rewrite(path, lambda tensors: tensors.pop(stored))


def matched(base: Any, heads: tuple[str, ...] = (), **experts: Any) -> Any:
    return match(open_model(base, "the-base"), {n: open_model(m, n) for n, m in experts.items()}, heads)


@pytest.mark.few(5)
@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("name", CLASSES)
def test_another_depth_is_refused_with_both_numbers(build, name, change):
    base = build(name, **{DEPTH.get(name, "num_hidden_layers"): 2})
    expert = build(name, **{DEPTH.get(name, "num_hidden_layers"): 2 + change})
    with pytest.raises(TwinmergeError, match=rf"a and the base .* differ in size: .*is {2 + change} \(2 in the base\)"):
        matched(base, a=expert)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("LlamaForCausalLM", {"attention_bias": True}, "attention_bias"),
        ("LlamaForCausalLM", {"mlp_bias": True}, "mlp_bias"),
        ("LlamaForCausalLM", {"num_key_value_heads": 1}, "num_key_value_heads"),
        ("LlamaForCausalLM", {"intermediate_size": 20}, "intermediate_size"),
        ("BertForSequenceClassification", {"type_vocab_size": 3}, "type_vocab_size"),
        ("BertModel", {"add_cross_attention": True, "is_decoder": True}, "add_cross_attention"),
        ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj|is_gated_act"),
        ("ViTModel", {"qkv_bias": False}, "qkv_bias"),
        ("GPT2LMHeadModel", {"n_inner": 12}, "n_inner"),
    ],
)
def test_keys_that_change_shapes_are_refused_by_name(build, name, options, key):
    plain, other = build(name), build(name, **options)
    for base, expert in ((plain, other), (other, plain)):
        with pytest.raises(TwinmergeError, match=key):
            matched(base, a=expert)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        (
            "LlamaForCausalLM",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters.rope_theta",
        ),
        ("LlamaForCausalLM", {"rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "hidden_act"),
        ("LlamaForCausalLM", {"something_new": 3}, "something_new"),
        ("BertForSequenceClassification", {"num_attention_heads": 4}, "num_attention_heads"),
        ("BertForSequenceClassification", {"layer_norm_eps": 1e-3}, "layer_norm_eps"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("T5ForConditionalGeneration", {"relative_attention_max_distance": 9}, "relative_attention_max_distance"),
    ],
)
def test_keys_that_change_the_function_alone_are_told(build, tuned, save, tmp_path, name, options, key):
    base, expert = build(name), build(name, **options)
    expert.load_state_dict(tuned(base, 1).state_dict())
    recipe = Recipe("task_arithmetic", save(base, "base"), {"a": save(expert, "a")}, {})
    own = expert.config.to_dict()
    for part in key.split("."):
        own = own[part]
    assert Merge(recipe, progress=False).check()["configs"]["a"][key][0] == own
    with pytest.warns(UserWarning, match=f"'a' computes otherwise than the base .*{key} is "):
        Merge(recipe, progress=False).save(tmp_path / "out")


def test_keys_that_change_nothing_are_not_told(build, save):
    base = build("BertForSequenceClassification")
    expert = build(
        "BertForSequenceClassification",
        hidden_dropout_prob=0.3,
        use_cache=False,
        initializer_range=0.1,
        classifier_dropout=0.2,
        bos_token_id=5,
        id2label={0: "no", 1: "yes"},
    )
    expert.load_state_dict(base.state_dict())
    assert matched(base, a=save(expert)).configs == {"a": {}}


def edited(path: str, **keys: Any) -> str:
    config = Path(path, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **keys}))
    return path


@pytest.mark.parametrize("older", ["base", "expert"])
@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        ("BertForSequenceClassification", {"position_embedding_type": "absolute", "torch_dtype": "float32"}, []),
        ("BertForSequenceClassification", {"position_embedding_type": "relative_key"}, ["position_embedding_type"]),
        ("ViTModel", {"is_decoder": False, "pruned_heads": {}, "tf_legacy_loss": False, "output_past": True}, []),
        ("ViTModel", {"is_decoder": True}, ["is_decoder"]),
        ("LlamaForCausalLM", {"quantization_config": None, "pretraining_tp": 1, "rope_scaling": None}, []),
    ],
)
def test_keys_of_older_releases_are_told_where_they_say_something(build, tuned, save, name, keys, told, older):
    """transformers 4 wrote what every class did (`position_embedding_type: absolute`); 5 dropped the keys."""
    model = build(name)
    base, expert = save(model, "base"), save(tuned(model, 1), "a")
    edited(base if older == "base" else expert, **keys)
    assert list(matched(base, a=expert).configs["a"]) == told


def test_a_classifier_and_an_adapter_of_one_over_a_base_with_another_head(build, tuned, save, tmp_path):
    """The adapter's model still stores the masked language model's head, which the classifier's class does not have."""
    peft = pytest.importorskip("peft")
    model = build("RobertaForMaskedLM")
    base, whole = save(model, "base"), build("RobertaForSequenceClassification", seed=1)
    whole.roberta.load_state_dict(tuned(model.roberta, 1).state_dict())
    options = {"task_type": "SEQ_CLS", "target_modules": ["query"], "init_lora_weights": False, "r": 2}
    adapted = peft.get_peft_model(
        transformers.RobertaForSequenceClassification.from_pretrained(base), peft.LoraConfig(**options)
    )
    adapted.save_pretrained(tmp_path / "lora")
    found = matched(base, a=save(whole, "a"), b=f"{base}+{tmp_path / 'lora'}")
    assert found.heads["a"] == found.heads["b"] and "classifier.dense.weight" in found.heads["b"]
    assert not any("lm_head" in name for name in found.merged) and "lm_head.bias" in found.from_base


@pytest.mark.few(5)
@pytest.mark.parametrize("holes", ["base", "expert", pytest.param("both", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CLASSES)
def test_a_hole_in_the_body_is_refused_by_name(build, tuned, save, name, holes):
    base, expert = save(build(name), "base"), save(tuned(build(name), 1), "a")
    for path in {"base": [base], "expert": [expert], "both": [base, expert]}[holes]:
        drop(path, IN_BODY[name])
    with pytest.raises(TwinmergeError, match=f"lacks the tensor '{IN_BODY[name]}'"):
        matched(base, a=expert)
    with pytest.raises(TwinmergeError, match="lacks the tensor"):  # whatever path the command takes
        Merge(Recipe("average", base, {"a": expert}, {}), progress=False).check()


@pytest.mark.parametrize("name", CLASSES)
def test_a_tensor_that_its_class_has_not_is_refused_and_never_a_head(build, tuned, save, name):
    base = build(name)
    extra = next(n for n in open_model(base).stored.values() if n.endswith("weight") and ".0." in n)
    extra = extra.replace(".0.", ".7.")
    path = rewrite(save(tuned(base, 1)), lambda tensors: tensors.update({extra: torch.ones(3)}))
    for heads in ((), (extra,)) if name != "ViTModel" else ((),):  # beside a bare model a part of one's own is kept
        with pytest.raises(TwinmergeError, match=r"nor a part of .* transformers does not load it either"):
            matched(base, heads, a=path)


IGNORED = [
    ("LlamaForCausalLM", "model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
    ("LlamaForCausalLM", "model.rotary_emb.inv_freq", torch.ones(4)),
    ("GPT2LMHeadModel", "transformer.h.0.attn.masked_bias", torch.tensor(-1e4)),
    ("GPT2LMHeadModel", "h.0.attn.masked_bias", torch.tensor(-1e4)),
    ("GPT2LMHeadModel", "transformer.h.1.attn.bias", torch.ones(1, 1, 4, 4)),
    ("BertForSequenceClassification", "bert.embeddings.position_ids", torch.arange(16.0)[None]),
    ("RobertaForSequenceClassification", "roberta.embeddings.position_ids", torch.arange(16)[None]),
    (
        "T5ForConditionalGeneration",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        torch.ones(32, 2),
    ),
]


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "extra", "value"), IGNORED)
@pytest.mark.parametrize("where", ["expert", *(pytest.param(w, marks=pytest.mark.slow) for w in ("base", "both"))])
def test_what_loading_passes_over_is_ignored_and_changes_nothing(build, tuned, save, name, extra, value, where):
    base, expert = save(build(name), "base"), save(tuned(build(name), 1), "a")
    clean = Merge(Recipe("task_arithmetic", base, {"a": expert}, {}), progress=False, architecture=True).state_dict()
    for path in {"base": [base], "expert": [expert], "both": [base, expert]}[where]:
        rewrite(path, lambda tensors: tensors.update({extra: value}))
        _, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
        assert not info["unexpected_keys"] or "masked_bias" in extra, "transformers would warn of it"
    for heads in ((), (extra,), (extra.rpartition(".")[2],) if "inv_freq" in extra or "masked" in extra else ("*ids",)):
        merge = Merge(
            Recipe("task_arithmetic", base, {"a": expert}, {}, None, heads), progress=False, architecture=True
        )
        assert merge.matched.heads == {"a": []}
        said = merge.check()
        assert bool(said["ignored"]) is (where == "expert") and bool(said["from_base"]) is (where != "expert")
        state = merge.state_dict()
        assert all(torch.equal(state[n], t) for n, t in clean.items()) and state.keys() - clean.keys() <= {extra}


# --------------------------------------------------------------------------------------------- what must go on


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("base", "expert", "head"),
    [
        ("BertModel", "BertForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("BertModel", "BertForTokenClassification", {"classifier.weight", "classifier.bias"}),
        ("BertModel", "BertForQuestionAnswering", {"qa_outputs.weight", "qa_outputs.bias"}),
        (
            "BertForMaskedLM",
            "BertForSequenceClassification",
            {"classifier.weight", "classifier.bias", "pooler.dense.weight", "pooler.dense.bias"},
        ),
        ("BertForPreTraining", "BertForSequenceClassification", {"classifier.weight", "classifier.bias"}),
        ("GPT2LMHeadModel", "GPT2ForSequenceClassification", {"score.weight"}),
        ("LlamaForCausalLM", "LlamaForSequenceClassification", {"score.weight"}),
        ("LlamaModel", "LlamaForCausalLM", {"lm_head.weight"}),
        ("T5Model", "T5ForConditionalGeneration", set()),
        ("ViTModel", "ViTForImageClassification", {"classifier.weight", "classifier.bias"}),
        ("BertForMaskedLM", "BertModel", {"pooler.dense.weight", "pooler.dense.bias"}),
        ("BertForMaskedLM", "BertForMaskedLM", set()),
    ],
)
def test_parts_that_only_the_class_of_one_side_has(build, base, expert, head):
    origin, tuned_model = build(base), build(expert, seed=1)
    found = matched(origin, a=tuned_model)
    assert set(found.heads["a"]) == head
    opened = open_model(origin)
    rest = {n for n in opened.specs if not open_model(tuned_model).has(n)}
    assert set(found.from_base) == rest and set(found.merged) == set(opened.specs) - rest


def test_encoders_that_were_saved_without_their_pooler(build, tuned, save):
    base = transformers.BertModel(build("BertModel").config, add_pooling_layer=False)
    found = matched(save(base, "base"), a=save(tuned(base, 1), "a"))
    assert found.heads == {"a": []} and len(found.merged) == len(base.state_dict())


def test_a_bare_checkpoint_is_merged_by_names_alone(tmp_path):
    def bare(name: str, **tensors: torch.Tensor) -> str:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return str(tmp_path / name)

    w, v = torch.ones(2, 2), torch.ones(2, 2)
    base = bare("base", w=w, v=v)
    assert matched(base, a=bare("same", w=w, v=v)).merged == ["v", "w"]
    with pytest.raises(TwinmergeError, match="lacks the tensor 'v'"):
        matched(base, a=bare("less", w=w))
    more = bare("more", w=w, v=v, head=torch.ones(2))
    with pytest.raises(TwinmergeError, match=r"Tensor 'head' of a is not in the base .* a has no config\.json"):
        matched(base, a=more)
    assert matched(base, ("head",), a=more).heads == {"a": ["head"]}
    with pytest.raises(TwinmergeError, match="The base the-base lacks|'head' of a is not in the base"):
        matched(base, a=more)


def test_labels_of_the_base_count(build, tuned):
    """Its config travels with the merged model: experts with other labels keep their own output layer."""
    base = build("BertForSequenceClassification", id2label={0: "neg", 1: "pos"})
    expert = tuned(base, 1)
    assert matched(base, a=expert).heads == {"a": []}
    expert.config.id2label = {0: "pos", 1: "neg"}
    assert matched(base, a=expert).heads == {"a": ["classifier.bias", "classifier.weight"]}


@pytest.mark.parametrize(
    ("base", "expert"),
    [
        ("BertForSequenceClassification", "BertForTokenClassification"),
        ("BertForSequenceClassification", "BertForMultipleChoice"),
        ("LlamaForTokenClassification", "LlamaForSequenceClassification"),
        ("GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    ],
)
def test_classifiers_of_another_kind_keep_their_output_layer(build, base, expert):
    """Of texts and of tokens: one name, one shape and the same label names make no one layer of them."""
    origin = build(base, num_labels=1 if expert.endswith("Choice") else 2)
    known = {n for n in open_model(build(expert)).specs if n.startswith(("classifier.", "score."))}
    found = matched(origin, a=build(expert, seed=1), b=build(expert, seed=2))
    assert known and all(known <= set(found.heads[e]) for e in "ab") and not known & set(found.merged)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "base", ["BertModel", "BertForPreTraining", "BertForSequenceClassification", "BertForMaskedLM"]
)
@pytest.mark.parametrize("order", ["text token", "token text"])
def test_experts_with_and_without_a_pooler(build, tuned, save, tmp_path, base, order):
    """The pooler of those that have one is their own, and each answers in a twin as it does alone, in any order."""
    whole = build("BertForPreTraining")
    folder = save(whole, "whole")
    kinds = {"text": transformers.BertForSequenceClassification, "token": transformers.BertForTokenClassification}
    paths = {e: save(tuned(kinds[e].from_pretrained(folder, num_labels=3), i), e) for i, e in enumerate(order.split())}
    origin = save(getattr(transformers, base).from_pretrained(folder), "base")
    twin = tm.Twin.build(origin, paths, rank=None, progress=False)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert {e: pooler <= set(head.tensors) for e, head in twin.model.head_specs.items()} == {
        "text": True,
        "token": False,
    }
    batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}
    for e, kind in kinds.items():
        with torch.no_grad():
            want, got = kind.from_pretrained(paths[e])(**batch).logits, twin(**batch, expert=e).logits
        assert torch.allclose(got, want, atol=1e-5)
    with pytest.raises(TwinmergeError, match="answer in different shapes"):
        twin(**batch, expert=["text", "token"])


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["auto", "rebuild"])
def test_question_answerers_in_one_batch(build, tuned, save, strategy):
    base = build("BertModel")
    folder = save(base, "base")
    kind = transformers.BertForQuestionAnswering
    paths = {e: save(tuned(kind.from_pretrained(folder), i), e) for i, e in enumerate("ab")}
    other = transformers.BertForSequenceClassification.from_pretrained(folder)
    twin = tm.Twin.build(folder, {**paths, "c": save(tuned(other, 3), "c")}, rank=None, progress=False)
    batch = {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8], [9, 3, 2]])}
    got = twin(**batch, expert=["b", "a", "b"], strategy=strategy)
    assert got.logits is None
    for row, e in enumerate("bab"):
        want = kind.from_pretrained(paths[e])(**batch)
        assert torch.allclose(got.output.start_logits[row], want.start_logits[row], atol=1e-5)
        assert torch.allclose(got.output.end_logits[row], want.end_logits[row], atol=1e-5)
    with pytest.raises(TwinmergeError, match="answer in different shapes"):
        twin(**batch, expert=["b", "a", "c"], strategy=strategy)


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize("kind", ["Qwen3", "Gemma2"])
def test_another_depth_where_the_config_lists_the_layers(save, kind, change):
    """Such configs check their keys against each other, so none of them fits by itself."""

    def model(depth):
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 30, **heads}
        config = getattr(transformers, f"{kind}Config")(num_hidden_layers=depth, **sizes)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    with pytest.raises(TwinmergeError, match=f"num_hidden_layers is {2 + change} \\(2 in the base\\)"):
        matched(save(model(2), "base"), a=save(model(2 + change), "a"))


@pytest.mark.parametrize("integers", ["base", "a"])
def test_whole_numbers_where_the_other_side_has_fractions(build, tuned, save, integers):
    paths = {"base": save(build("BertModel"), "base"), "a": save(tuned(build("BertModel"), 1), "a")}
    name = IN_BODY["BertForSequenceClassification"]
    rewrite(paths[integers], lambda tensors: tensors.update({name: torch.ones(tensors[name].shape, dtype=torch.int8)}))
    with pytest.raises(TwinmergeError, match=f"{name}.*I8.*do not merge"):
        matched(paths["base"], a=paths["a"])


def test_keys_that_transformers_4_wrote_say_nothing_new(build, tuned, save):
    base = build("BertModel")
    paths = [save(base, "base"), save(tuned(base, 1), "a")]
    file = Path(paths[1], "config.json")
    old = {"position_embedding_type": "absolute", "quantization_config": None}
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    assert matched(paths[0], a=paths[1]).configs == {"a": {}}
    old["position_embedding_type"] = "relative_key"
    file.write_text(json.dumps({**json.loads(file.read_text()), **old}))
    assert set(matched(paths[0], a=paths[1]).configs["a"]) == {"position_embedding_type"}


def test_an_output_layer_that_is_missing_and_not_tied(build, tuned, save):
    model = build("LlamaForCausalLM", tie_word_embeddings=True)
    base, expert = save(model, "base"), save(tuned(model, 1), "a")
    config = Path(expert, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    with pytest.raises(TwinmergeError, match=r"a lacks the tensor 'lm_head.weight'"):
        matched(base, a=expert)
