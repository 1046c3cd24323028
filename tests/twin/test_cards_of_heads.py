"""Cards of what has heads, or lacks them: their lines run, and stock transformers and PEFT answer as is said."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto import modeling_auto

import twinmerge as tm
from twinmerge.engine.usage import auto_class, task_of_class
from twinmerge.errors import TwinmergeError

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 12}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 12, "n_positions": 64}
VIT = {**{k: v for k, v in BERT.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}


def tokens() -> transformers.PreTrainedTokenizerFast:
    words = {w: i for i, w in enumerate(["<unk>", "</s>", "The", "film", "was", *"uvwxyz", "."])}
    own = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, model_input_names=["input_ids", "attention_mask"], **named
    )


CONFIGS = {
    "Bert": lambda n: transformers.BertConfig(**BERT, num_labels=n),
    "ViT": lambda n: transformers.ViTConfig(**VIT, num_labels=n),
    "GPT2": lambda n: transformers.GPT2Config(**GPT2, num_labels=n, pad_token_id=1),
}


def build(name: str, labels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    family = next(f for f in CONFIGS if name.startswith(f))
    model = getattr(transformers, name)(CONFIGS[family](labels)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def experts_of(base: Any, name: str, labels: dict[str, int]) -> dict[str, Any]:
    """Experts that moved matrices alone, which adapters carry."""
    found = {}
    for i, (expert, count) in enumerate(labels.items()):
        model = build(name, count, i + 1)
        body = copy.deepcopy(getattr(base, base.base_model_prefix, base)).state_dict()
        rng = torch.Generator().manual_seed(i)
        for key, tensor in body.items():
            if tensor.dim() == 2 and "embed" not in key and "wte" not in key and "wpe" not in key:
                tensor += 0.05 * torch.randn(tensor.shape, generator=rng)
        getattr(model, model.base_model_prefix).load_state_dict(body, strict=False)
        found[expert] = model
    return found


def batch_of(name: str) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=rng)}
    ids = torch.randint(2, 12, (3, 5), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def card(folder: Path) -> tuple[dict[str, Any], str]:
    found = huggingface_hub.ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


def ran(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the card's lines leave behind."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(card(folder)[1].split("## Use\n\n```python\n")[1].split("```")[0], "card", "exec"), names)
    return names


@pytest.mark.few(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("BertForSequenceClassification", "BertModel"),
        ("BertForSequenceClassification", "BertForSequenceClassification"),
        ("BertForTokenClassification", "BertModel"),
        ("BertForQuestionAnswering", "BertModel"),
        ("ViTForImageClassification", "ViTModel"),
        ("ViTForImageClassification", "ViTForImageClassification"),
        ("GPT2ForSequenceClassification", "GPT2Model"),
    ],
)
@torch.no_grad()
def test_adapters_with_and_without_a_head(
    name: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, counts = build(start, 2, 0), {"a": 1, "b": 3, "c": 4}
    if name.endswith("QuestionAnswering"):
        counts = dict.fromkeys(counts, 2)
    experts, batch = experts_of(base, name, counts), batch_of(name)
    built = tm.Twin.build(base, experts, 2, shared="task_arithmetic", progress=False)
    folder = built.save_pretrained(tmp_path / "twin")
    mixture = {"a": 0.3, "c": 0.7}
    for where, twin in (("read", tm.Twin.from_pretrained(folder)), ("built", built)):
        for head, asked in (("a", "a"), ("b", "b"), ("c", mixture)):
            given = {"head": head} if asked is mixture else {}
            out = twin.export(asked, tmp_path / where / head, lora=True, **given).folder
            model, stock = ran(out, monkeypatch)["model"], tmp_path / where / f"dense_{head}"
            twin.export(asked, stock, **given)
            want = type(experts[head]).from_pretrained(stock).eval()(**batch)
            got = model.eval()(**batch)
            for key in ("start_logits", "end_logits") if "Question" in name else ("logits",):
                torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-5)
            assert f"are those of `{head}`" in card(out)[1]
            body = getattr(type(experts[head]).from_pretrained(stock).eval(), experts[head].base_model_prefix)
        for server in ("peft", "vllm"):
            out = twin.export(mixture, tmp_path / where / server, lora=True, server=server).folder
            said = json.loads((out / "adapter_config.json").read_text())
            assert said["task_type"] is None and said["modules_to_save"] is None
            model, text = ran(out, monkeypatch)["model"].eval(), card(out)[1]
            assert type(model.get_base_model()).__name__ == type(body).__name__
            hidden, want = model(**batch)[0], body(**batch)[0]
            torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-5)
            assert "no output layers" in text and all(f"`{n}`" in text for n in "abc")
        with pytest.raises(TwinmergeError, match="vLLM takes no output layers"):
            twin.export(mixture, tmp_path / "no", lora=True, server="vllm", head="a")
        with pytest.raises(TwinmergeError, match="no expert 'x'"):
            twin.export(mixture, tmp_path / "no", lora=True, head="x")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["BertForSequenceClassification", "BertForTokenClassification", "ViTForImageClassification"]
)
@torch.no_grad()
def test_a_merge_with_a_head_for_each_expert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's lines open it with a head; the oracle is the expert's class with the merged body."""
    family = next(f for f in CONFIGS if name.startswith(f))
    base, counts = build(f"{family}Model", 2, 0), {"a": 2, "b": 3}
    experts, batch = experts_of(base, name, counts), batch_of(name)
    reads = transformers.ViTImageProcessor(size={"height": 8, "width": 8}) if family == "ViT" else tokens()
    base.save_pretrained(tmp_path / "base")
    reads.save_pretrained(tmp_path / "base")
    merge = tm.merge("task_arithmetic", str(tmp_path / "base"), experts, scale=0.4, progress=False)
    out = merge.save(tmp_path / "out")
    front, _ = card(out)
    tasks = {"Seq": "text-classification", "Tok": "token-classification", "Ima": "image-classification"}
    assert front["library_name"] == "twinmerge" and front["pipeline_tag"] == tasks[name.split("For")[1][:3]]
    found = ran(out, monkeypatch)
    state = transformers.AutoModel.from_pretrained(out).state_dict()
    opened = tm.load(out)
    for expert, own in experts.items():
        getattr(own, own.base_model_prefix).load_state_dict(state, strict=False)
        want = own(**batch).logits
        torch.testing.assert_close(opened(**batch, head=expert).logits, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(opened.head(expert)(**batch).logits, want, rtol=1e-5, atol=1e-5)
        if expert == "a":
            torch.testing.assert_close(found["model"](**batch).logits, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_load_opens_plain_folders_as_transformers_does(tmp_path: Path) -> None:
    base = build("GPT2LMHeadModel", 2, 0)
    other = copy.deepcopy(base)
    other.transformer.h[0].mlp.c_fc.weight += 0.01
    out = tm.merge("average", base, {"a": base, "b": other}, progress=False).save(tmp_path / "out")
    model, want, batch = tm.load(out), transformers.AutoModelForCausalLM.from_pretrained(out), batch_of("GPT2")
    assert type(model) is type(want) and model.name_or_path == want.name_or_path == str(out)
    assert torch.equal(model(**batch).logits, want(**batch).logits)
    twin = tm.Twin.build(base, {"a": base, "b": other}, 2, progress=False).save_pretrained(tmp_path / "twin")
    with pytest.raises(TwinmergeError, match="is a twin, and no model by itself"):
        tm.load(twin)
    with pytest.raises(TwinmergeError, match="neither a folder nor a hub id"):
        tm.load(tmp_path / "nothing")


def test_tasks_are_those_of_the_auto_classes() -> None:
    """Oracle: what transformers' own tables say of a class; a class that is in none of ours has no task."""
    tables = {
        "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "automatic-speech-recognition": {
            **modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
            **modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        },
        "zero-shot-image-classification": modeling_auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    of = {
        task: {n for own in t.values() for n in ([own] if isinstance(own, str) else own)} for task, t in tables.items()
    }
    known = set().union(*of.values())
    assert len(known) > 100
    for own in known:
        assert (task := task_of_class(own)) is None or own in of[task], own
    for own in of["audio-classification"]:
        assert (task_of_class(own), auto_class(own)) == ("audio-classification", "AutoModelForAudioClassification")
    for own in (
        "WhisperForConditionalGeneration",
        "Wav2Vec2ForCTC",
        "HubertForCTC",
        "Speech2TextForConditionalGeneration",
    ):
        assert task_of_class(own) == "automatic-speech-recognition"
    for own in ("CLIPModel", "SiglipModel", "Siglip2Model"):
        assert task_of_class(own) == "zero-shot-image-classification"
    for own in ("T5ForConditionalGeneration", "BartForConditionalGeneration", "BertModel"):  # of several tasks, or none
        assert task_of_class(own) is None
