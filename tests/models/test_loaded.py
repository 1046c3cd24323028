"""A merged model in memory is used as the model of transformers that it is; the oracle is the folder, opened by stock
transformers, or the expert's own class with the merged body."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from transformers import GenerationConfig

import twinmerge as tm
from twinmerge.errors import UsageError
from twinmerge.models.loaded import LoadedModel

LABELS = {"two": 2, "four": 4, "three": 3}
HEADS = {
    "BertForSequenceClassification": "BertModel",
    "RobertaForSequenceClassification": "RobertaModel",
    "GPT2ForSequenceClassification": "GPT2Model",
    "ViTForImageClassification": "ViTModel",
    "BertForTokenClassification": "BertModel",
    "GPT2LMHeadModel": "GPT2Model",
}
ROWS = ["four", "two", "four", "three", "two"]


def batch_of(name: str) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(5, 3, 8, 8, generator=rng)}
    ids = torch.randint(2, 30, (5, 7), generator=rng)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def merged(name: str, build: Any, tuned: Any, with_body_of: Any) -> tuple[tm.Merge, dict[str, Any]]:
    """A merge of three experts around one base, and the experts' own classes with the merged body in them."""
    base = build(HEADS[name])
    options = {e: {} if name == "GPT2LMHeadModel" else {"num_labels": n} for e, n in LABELS.items()}
    experts = {e: with_body_of(build(name, seed=i + 1, **options[e]), tuned(base, i)) for i, e in enumerate(LABELS)}
    if name == "GPT2LMHeadModel":  # output layers of their own, which are the experts' heads
        for i, expert in enumerate(experts.values()):
            expert.config.tie_word_embeddings = False
            expert.lm_head.weight = torch.nn.Parameter(torch.randn(30, 16, generator=torch.Generator().manual_seed(i)))
    merge = tm.merge("task_arithmetic", base, experts, scale=0.4, progress=False)
    state = merge.state_dict()
    by_hand = {}
    for expert, model in experts.items():
        by_hand[expert] = copy.deepcopy(model)
        getattr(by_hand[expert], model.base_model_prefix).load_state_dict(state, strict=False)
    return merge, by_hand


@pytest.mark.few(3)
@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_heads_are_chosen_by_name(name: str, build: Any, tuned: Any, with_body_of: Any, tmp_path: Path) -> None:
    merge, by_hand = merged(name, build, tuned, with_body_of)
    model, batch = merge.load(), batch_of(name)
    assert isinstance(model, LoadedModel) and model.heads == list(LABELS) and not model.training
    mixed = model(**batch, head=ROWS)
    assert mixed["logits"] is mixed.logits
    for row, expert in enumerate(ROWS):
        want = by_hand[expert](**batch).logits[row]
        torch.testing.assert_close(mixed.logits[row, ..., : want.shape[-1]], want, rtol=1e-5, atol=1e-5)
        assert bool((mixed.logits[row, ..., want.shape[-1] :] == -torch.inf).all())
    for expert, want_model in by_hand.items():
        want = want_model(**batch).logits
        torch.testing.assert_close(model(**batch, head=expert).logits, want, rtol=1e-5, atol=1e-5)
        one = model.head(expert)
        assert type(one) is type(want_model) and one.config.id2label == want_model.config.id2label
        torch.testing.assert_close(one(**batch).logits, want, rtol=1e-5, atol=1e-5)
        one.save_pretrained(tmp_path / expert)
        stock = type(want_model).from_pretrained(tmp_path / expert).eval()
        torch.testing.assert_close(stock(**batch).logits, want, rtol=1e-5, atol=1e-5)
        if name == "GPT2LMHeadModel":
            how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
            assert torch.equal(model.generate(**batch, head=expert, **how), want_model.generate(**batch, **how))


@torch.no_grad()
def test_a_head_shares_the_weights_and_follows_them(build: Any, tuned: Any, with_body_of: Any) -> None:
    merge, _ = merged("BertForSequenceClassification", build, tuned, with_body_of)
    model, batch = merge.load(), batch_of("Bert")
    one = model.head("two")
    body = model.headed.body.state_dict()
    shared = {k.removeprefix("bert."): t for k, t in one.state_dict().items() if k.startswith("bert.")}
    assert {t.data_ptr() for t in body.values()} == {t.data_ptr() for t in shared.values()}
    half = model.to(torch.float64)
    assert half.dtype == torch.float64 == half.head("two").dtype and half.device.type == "cpu"
    torch.testing.assert_close(half(**batch, head="two").logits.float(), one(**batch).logits, rtol=1e-4, atol=1e-5)
    assert model.config.model_type == "bert" and model.labels("three") == [f"LABEL_{i}" for i in range(3)]


def test_heads_that_cannot_be_are_refused(build: Any, tuned: Any, with_body_of: Any, tmp_path: Path) -> None:
    merge, _ = merged("BertForSequenceClassification", build, tuned, with_body_of)
    model, batch = merge.load(), batch_of("Bert")
    for call, says in (
        (lambda: model(**batch), "Say which head answers: two, four, three. For example head='two'."),
        (lambda: model(batch), r"by name: model\(\*\*batch, head="),
        (lambda: model(**batch, head="tow"), "no head 'tow'. Did you mean 'two'"),
        (lambda: model(**batch, head=["two", "x", "two", "two", "two"]), "no head 'x'"),
        (lambda: model(**batch, head=["two"] * 4), "5 rows need 5 head names, got 4"),
        (lambda: model.generate(**batch), "Say which head"),
        (lambda: model.generate(**batch, head="two"), "writes no text"),
        (lambda: model(**batch, head="two", labels=torch.zeros(5, dtype=torch.int64)), "A loss is one head's"),
        (lambda: model.save_pretrained(tmp_path / "out"), r"holds one. Save one with model.head\('two'\)"),
    ):
        with pytest.raises(UsageError, match=says):
            call()
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_one_head_needs_no_name(build: Any, tuned: Any, with_body_of: Any) -> None:
    base = build("BertModel")
    expert = with_body_of(build("BertForSequenceClassification", num_labels=3), tuned(base, 1))
    model, batch = tm.merge("average", base, {"only": expert}, progress=False).load(), batch_of("Bert")
    torch.testing.assert_close(model(**batch).logits, model.head()(**batch).logits)
    torch.testing.assert_close(model(**batch).logits, expert(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertModel"])
@torch.no_grad()
def test_without_heads_it_is_the_class_that_stock_transformers_opens(
    name: str, build: Any, tuned: Any, tmp_path: Path
) -> None:
    base = build(name)
    if base.can_generate():
        base.generation_config = GenerationConfig(
            max_new_tokens=3, eos_token_id=[1, 7], pad_token_id=0, bos_token_id=1, decoder_start_token_id=0
        )
    base.save_pretrained(tmp_path / "base")
    for i in (1, 2):
        tuned(base, i).save_pretrained(tmp_path / f"e{i}")
    merge = tm.merge("average", str(tmp_path / "base"), {e: str(tmp_path / e) for e in ("e1", "e2")}, progress=False)
    model = merge.load()
    stock = getattr(transformers, name).from_pretrained(merge.save(tmp_path / "out")).eval()
    assert type(model) is type(stock) and not model.training
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in stock.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in stock.parameters()]
    ids = batch_of(name)["input_ids"]
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if name.startswith("T5") else {})}
    first = model(**batch)
    assert all(torch.equal(first[k], stock(**batch)[k]) for k in first if isinstance(first[k], torch.Tensor))
    assert (model.device, model.dtype) == (stock.device, stock.dtype)
    if base.can_generate():
        assert model.generation_config.to_diff_dict() == stock.generation_config.to_diff_dict()
        assert torch.equal(model.generate(ids), stock.generate(ids))
    model.save_pretrained(tmp_path / "again")
    again = getattr(transformers, name).from_pretrained(tmp_path / "again")
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in stock.state_dict().items())


def names_in(model: Any) -> set[tuple[str, str | None]]:
    """What the models inside a model, and all of their configs, call their folder and its commit."""
    configs, found = [m.config for m in model.modules() if isinstance(m, transformers.PreTrainedModel)], set()
    while configs:
        config = configs.pop()
        found.add((config._name_or_path, getattr(config, "_commit_hash", None)))
        configs += [part for key in config.sub_configs if (part := getattr(config, key, None)) is not None]
    return found | {(m.name_or_path, None) for m in model.modules() if isinstance(m, transformers.PreTrainedModel)}


def test_what_is_made_in_memory_names_no_folder(build: Any, tuned: Any, with_body_of: Any, tmp_path: Path) -> None:
    """PEFT writes that name into an adapter, which would open on the base; stock transformers names a new model ""."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    towers = {"text_config": {**sizes, "vocab_size": 30}, "vision_config": {**sizes, "image_size": 8, "patch_size": 4}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=8))
    for name, base in {"llama": build("LlamaForCausalLM"), "clip": clip, "bert": build("BertModel")}.items():
        makes = (lambda m: m) if name != "bert" else lambda m: with_body_of(build("BertForSequenceClassification"), m)
        base.save_pretrained(tmp_path / name)
        for i in range(2):
            makes(tuned(base, i)).save_pretrained(tmp_path / f"{name}{i}")
        given = {"base": tmp_path / name, "experts": {e: tmp_path / f"{name}{e}" for e in "01"}}
        read = type(base).from_pretrained(tmp_path / name)
        for start in (given["base"], read):
            merge = tm.merge("average", start, given["experts"], progress=False)
            model = merge.load()
            twin = [] if name == "clip" else [tm.Twin.build(start, given["experts"], 2, progress=False).model]
            plain = [model.head("0"), model.head("1")] if name == "bert" else [model]
            for one in (*plain, model, *twin):
                assert names_in(one) == {("", None)}
        assert read.config._name_or_path == str(tmp_path / name)  # somebody's own model keeps its name
        if name == "llama":
            made = [peft.get_peft_model(m, peft.LoraConfig(target_modules=["q_proj"])) for m in (plain[0], base)]
            said = [m.peft_config["default"].base_model_name_or_path for m in made]
            assert said[0] == said[1] != str(tmp_path / name)  # `base` was made in memory
            plain[0] = made[0].unload()
        plain[0].save_pretrained(tmp_path / f"{name}out")
        again = type(plain[0]).from_pretrained(tmp_path / f"{name}out")
        assert again.config._name_or_path == str(tmp_path / f"{name}out")
