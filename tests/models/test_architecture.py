"""Canonical names: one tensor, one name, whatever class or age of transformers wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertConfig, BertModel

from twinmerge.errors import TwinmergeError
from twinmerge.models.opening import open_model
from twinmerge.models.transformers_class import TransformersArchitecture, class_of, labels_of, read_config

BODY = {
    "BertForSequenceClassification": ("bert.", "encoder.layer.0.attention.self.query.weight", "classifier.weight"),
    "RobertaForSequenceClassification": ("roberta.", "embeddings.LayerNorm.bias", "classifier.out_proj.weight"),
    "GPT2LMHeadModel": ("transformer.", "h.0.attn.c_attn.weight", "lm_head.weight"),
    "LlamaForCausalLM": ("model.", "layers.0.self_attn.q_proj.weight", "lm_head.weight"),
    "ViTForImageClassification": ("vit.", "embeddings.cls_token", "classifier.weight"),
}
BARE = {
    "BertForSequenceClassification": "BertModel",
    "RobertaForSequenceClassification": "RobertaModel",
    "GPT2LMHeadModel": "GPT2Model",
    "LlamaForCausalLM": "LlamaModel",
    "ViTForImageClassification": "ViTModel",
}


@pytest.mark.parametrize("name", BODY)
def test_class_around_a_body(build, name):
    prefix, inside, outside = BODY[name]
    model = build(name)
    architecture = TransformersArchitecture(model.config, type(model))
    assert architecture.prefix == prefix
    assert architecture.canonical(prefix + inside) == architecture.canonical(inside) == inside
    assert architecture.canonical(outside) == outside
    assert architecture.is_body(inside) and not architecture.is_body(outside)
    assert architecture.parameters[inside] == model.state_dict()[prefix + inside].shape
    assert not architecture.is_bare and TransformersArchitecture(model.config, type(model.base_model)).is_bare


@pytest.mark.parametrize("name", BODY)
def test_bare_model_and_task_model_share_their_names_on_disk(build, save, name):
    inner, outer = open_model(save(build(BARE[name]), "bare")), open_model(save(build(name), "task"))
    shared = inner.specs.keys() & outer.specs.keys()
    assert all(n.startswith("pooler.") for n in inner.specs.keys() - shared)
    assert not any(outer.architecture.is_body(n) for n in outer.specs.keys() - shared)


@pytest.mark.parametrize("name", [*BODY, "T5ForConditionalGeneration", "BertForMaskedLM"])
def test_folder_and_memory_are_the_same_tensors(build, save, name):
    model = build(name)
    disk, memory = open_model(save(model)), open_model(model)
    assert disk.specs == memory.specs and disk.specs
    assert all(torch.equal(disk.read(n), memory.read(n)) for n in disk.specs)
    assert sum(s.numel for s in disk.specs.values()) == sum(p.numel() for p in model.parameters())


def test_every_stored_vit_name_finds_its_parameter(build, save):
    model = build("ViTForImageClassification")
    path = save(model)
    stored = load_file(f"{path}/model.safetensors")
    of_value = {tensor.numpy().tobytes(): name for name, tensor in model.state_dict().items()}
    architecture = TransformersArchitecture(model.config, type(model))
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored  # what 5.23 still writes
    for name, tensor in stored.items():
        assert architecture.canonical(name) == of_value[tensor.numpy().tobytes()].removeprefix("vit.")


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_legacy_layer_norm_names(build, tmp_path, prefix):
    model = build("BertModel")
    old = {
        prefix + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in model.state_dict().items()
    }
    assert any(n.endswith("gamma") for n in old) and any(n.endswith("beta") for n in old)
    model.config.save_pretrained(tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    opened = open_model(tmp_path)
    assert opened.specs.keys() == model.state_dict().keys()
    name = "encoder.layer.1.output.LayerNorm.weight"
    assert torch.equal(opened.read(name), model.state_dict()[name])


def test_two_names_of_one_parameter_are_refused(build, tmp_path):
    model = build("BertModel")
    model.config.save_pretrained(tmp_path)
    twice = {**model.state_dict(), "embeddings.LayerNorm.gamma": torch.ones(16)}
    save_file(twice, tmp_path / "model.safetensors")
    with pytest.raises(TwinmergeError, match="'embeddings.LayerNorm.gamma'.* are one and the same parameter"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "tied", "aliases"),
    [
        ("LlamaForCausalLM", True, {"lm_head.weight": "embed_tokens.weight"}),
        ("LlamaForCausalLM", False, {}),
        ("GPT2LMHeadModel", True, {"lm_head.weight": "wte.weight"}),
        (
            "T5ForConditionalGeneration",
            True,
            dict.fromkeys(
                ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"
            ),
        ),
    ],
)
def test_ties(build, name, tied, aliases):
    opened = open_model(build(name, tie_word_embeddings=tied))
    assert opened.aliases == aliases and not aliases.keys() & opened.specs.keys()
    assert ("lm_head.weight" in opened.specs) is not tied
    assert opened.has("lm_head.weight") and opened.spec("lm_head.weight").shape == (30, 16)
    for alias, source in aliases.items():
        assert torch.equal(opened.read(alias), opened.read(source))


@pytest.mark.parametrize("stored", ["both", "alias only"])
def test_tied_output_layer_that_is_stored_counts_once(build, save, stored):
    model = build("LlamaForCausalLM", tie_word_embeddings=True)
    path = save(model)
    tensors = load_file(f"{path}/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "alias only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, f"{path}/model.safetensors", metadata={"format": "pt"})
    opened = open_model(path)
    assert "lm_head.weight" not in opened.specs
    assert torch.equal(opened.read("embed_tokens.weight"), model.model.embed_tokens.weight)
    assert torch.equal(opened.read("lm_head.weight"), model.lm_head.weight)


def test_labels_in_the_order_of_the_outputs():
    config = BertConfig(id2label={2: "c", 0: "a", 1: "b"})
    assert labels_of(config) == ["a", "b", "c"]


def test_class_comes_from_the_config_or_the_task(build):
    config = build("BertForMaskedLM").config
    assert class_of(config).__name__ == "BertModel"
    config.architectures = ["BertForMaskedLM"]
    assert class_of(config).__name__ == "BertForMaskedLM"
    assert class_of(config, "SEQ_CLS").__name__ == "BertForSequenceClassification"
    with pytest.raises(TwinmergeError, match="no AutoModelForSeq2SeqLM for Bert"):
        class_of(config, "SEQ_2_SEQ_LM")


def test_configs_that_cannot_be_used(tmp_path):
    assert read_config(tmp_path) is None
    for text, message in [
        ("{", "config.json cannot be read: Expecting property name"),
        ('{"model_type": "no-such-model"}', "is not a config that transformers"),
        (json.dumps({**BertConfig().to_dict(), "quantization_config": {}}), "is quantised.*dequantize"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(TwinmergeError, match=message):
            read_config(tmp_path)
    BertConfig(hidden_size=8).save_pretrained(tmp_path)
    assert read_config(tmp_path).hidden_size == AutoConfig.from_pretrained(tmp_path).hidden_size == 8


@pytest.mark.parametrize(
    ("name", "embedding"),
    [("BertModel", "embeddings.word_embeddings.weight"), ("T5ForConditionalGeneration", "shared.weight")],
)
def test_input_embedding(build, name, embedding):
    model = build(name)
    assert TransformersArchitecture(model.config, type(model)).embedding == embedding


@pytest.mark.parametrize(
    ("name", "sizes", "tables", "linear"),
    [
        (
            "T5ForConditionalGeneration",
            {"vocab_size": 8, "d_model": 4, "d_kv": 2, "d_ff": 4, "num_layers": 1, "num_heads": 2},
            {"shared.weight", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"},
            {"encoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"},
        ),
        (
            "GPTNeoXForCausalLM",  # its output layer was called embed_out before transformers renamed it
            {
                "vocab_size": 8,
                "hidden_size": 4,
                "num_hidden_layers": 1,
                "num_attention_heads": 1,
                "intermediate_size": 4,
            },
            {"embed_in.weight"},
            {"lm_head.weight", "layers.0.attention.dense.weight"},
        ),
        (
            "SwinModel",
            {"image_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [1], "num_heads": [1], "window_size": 2},
            {"encoder.layers.0.blocks.0.attention.relative_position_bias.relative_position_bias_table"},
            {"embeddings.patch_embeddings.projection.weight"},
        ),
    ],
)
def test_tables_are_told_by_class(name: str, sizes: dict[str, Any], tables: set[str], linear: set[str]) -> None:
    model_class = getattr(transformers, name)
    architecture = TransformersArchitecture(model_class.config_class(**sizes), model_class)
    assert tables <= architecture.tables
    assert linear <= set(architecture.parameters) - architecture.tables


def test_a_config_whose_keys_cannot_be_sorted_and_one_that_changes_afterwards() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    odd = BertConfig(**sizes)
    odd.notes = {0: "a", "b": 1}
    assert "pooler.dense.weight" in TransformersArchitecture(odd, BertModel).parameters
    config = BertConfig(**sizes)
    first = TransformersArchitecture(config, BertModel).parameters
    config.num_hidden_layers = 2
    second = TransformersArchitecture(config, BertModel).parameters
    assert len(second) > len(first) == len(TransformersArchitecture(BertConfig(**sizes), BertModel).parameters)
