"""A model is the same tensors from a folder, from memory, and as base+adapter."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn

from twinmerge.errors import TwinmergeError
from twinmerge.models.matching import match
from twinmerge.models.opening import open_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
LORA = {"r": 2, "lora_alpha": 3, "init_lora_weights": False}


def adapted(model, **options):
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{**LORA, **options}))
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            nn.init.normal_(parameter)
    return wrapped


def assert_same(got, want):
    assert got.specs == want.specs and want.specs
    for name in want.specs:
        torch.testing.assert_close(got.read(name), want.read(name), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("BertModel", {"target_modules": ["query", "dense"]}),
        ("BertForSequenceClassification", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("GPT2LMHeadModel", {"target_modules": ["wte"], "tie": False}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj", "lm_head"]}),
        ("T5ForConditionalGeneration", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
        ("ViTForImageClassification", {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:Model:UserWarning", "ignore:Setting `save_embedding:UserWarning")
def test_adapter_equals_the_materialised_model(build, save, name, options):
    options = dict(options)
    tie = options.pop("tie", name.startswith(("GPT2", "T5")))
    base = build(name, **({} if name.startswith(("Bert", "ViT")) else {"tie_word_embeddings": tie}))
    wrapped = adapted(base, **options)
    memory = open_model(wrapped)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    want = open_model(merged)
    assert any(not torch.equal(want.read(n), t) for n, t in ((n, open_model(base).read(n)) for n in want.specs))
    assert_same(memory, want)
    assert_same(open_model(f"{save(base, 'base')}+{save(wrapped, 'lora')}"), want)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning", "ignore:Setting `save_embedding:UserWarning")
@pytest.mark.parametrize("modules", [["c_attn", "c_proj", "lm_head"], ["lm_head", "c_fc"]])
def test_one_flag_for_linear_and_conv1d(build, save, modules):
    """PEFT keeps one fan_in_fan_out, the last module's; both kinds must still come out right, square ones too."""
    base = build("GPT2LMHeadModel", tie_word_embeddings=False)
    wrapped = adapted(base, target_modules=modules, fan_in_fan_out=True)
    paths = f"{save(base, 'base')}+{save(wrapped, 'lora')}"
    want = open_model(copy.deepcopy(wrapped).merge_and_unload())
    assert_same(open_model(wrapped), want)
    assert_same(open_model(paths), want)


def test_bare_base_with_a_classifier_adapter(build, save):
    """The adapter's own classifier becomes a head of the expert; its class has as many labels."""
    base = build("BertModel")
    full = build("BertForSequenceClassification", num_labels=5)
    full.bert.load_state_dict(base.state_dict())
    wrapped = adapted(full, target_modules=["query"], task_type="SEQ_CLS")
    expert = open_model(f"{save(base, 'base')}+{save(wrapped, 'lora')}", "a")
    assert expert.architecture.model_class.__name__ == "BertForSequenceClassification" and expert.config.num_labels == 5
    assert_same(expert, open_model(wrapped.merge_and_unload()))
    assert match(open_model(base), {"a": expert}).heads == {"a": ["classifier.bias", "classifier.weight"]}


def test_adapter_of_another_base(build, save):
    lora = save(adapted(build("BertModel"), target_modules=["query"]), "lora")
    with pytest.raises(TwinmergeError, match=r"changes 'encoder.layer.1[^']*', which its base .* does not have"):
        open_model(f"{save(build('BertModel', num_hidden_layers=1), 'short')}+{lora}")
    wide = save(build("BertModel", hidden_size=32), "wide")
    with pytest.raises(TwinmergeError, match=r"as \[16, 16\], in its base .* it is \[32, 32\]"):
        open_model(f"{wide}+{lora}")


def test_memory_route_follows_the_model(build):
    model = build("BertModel")
    opened = open_model(model, "mine")
    with torch.no_grad():
        model.pooler.dense.bias += 1
    assert opened.name == "mine" and torch.equal(opened.read("pooler.dense.bias"), model.pooler.dense.bias)


def test_fingerprint_is_that_of_the_tensors(build, save, tuned):
    model = build("BertForSequenceClassification")
    other = tuned(model, 1)
    assert open_model(save(model)).fingerprint() == open_model(model).fingerprint()
    assert open_model(model).fingerprint() != open_model(other).fingerprint()


@pytest.mark.parametrize("thing", [3, {"a": torch.ones(1)}, nn.Linear])
def test_what_is_no_model(thing):
    with pytest.raises(TwinmergeError, match=f"Cannot open a {type(thing).__name__} as a model"):
        open_model(thing)
