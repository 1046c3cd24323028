"""One body, many heads: every row answered as the expert's own class answers it."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from twinmerge.errors import TwinmergeError
from twinmerge.models.head_files import HeadSpec, load_heads, save_heads
from twinmerge.models.headed import HeadedModel
from twinmerge.models.matching import match
from twinmerge.models.opening import open_model

LABELS = {"two": 2, "four": 4, "three": 3}
BASES = {
    "BertForSequenceClassification": "BertModel",
    "RobertaForSequenceClassification": "RobertaModel",
    "GPT2ForSequenceClassification": "GPT2Model",
    "ViTForImageClassification": "ViTModel",
    "BertForTokenClassification": "BertModel",
}
ROWS = ["four", "two", "four", "three", "two"]


def batch_for(name):
    torch.manual_seed(0)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(5, 3, 8, 8)}
    ids = torch.randint(2, 30, (5, 7))
    mask = torch.ones_like(ids)
    pad = 1 if name.startswith("Roberta") else 0
    for row, length in enumerate([7, 3, 5, 7, 1]):
        ids[row, length:], mask[row, length:] = pad, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def family(build, with_body_of):
    """family(class name) -> (the experts around one body, their HeadedModel)."""

    def make(name):
        base = build(BASES[name])
        models = {
            e: with_body_of(build(name, seed=i + 1, num_labels=n), base) for i, (e, n) in enumerate(LABELS.items())
        }
        opened = {e: open_model(model, e) for e, model in models.items()}
        found = match(open_model(base), opened)
        heads = {}
        for e, model in models.items():
            model.config.architectures = [name]
            heads[e] = HeadSpec(model.config, {n: opened[e].read(n).clone() for n in found.heads[e]})
        state = {n: open_model(base).read(n) for n in found.merged}
        return models, HeadedModel(opened["two"].architecture, state, heads)

    return make


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_mixed_batch_equals_each_experts_own_class(family, name):
    models, headed = family(name)
    batch = batch_for(name)
    logits = headed(batch, ROWS)["logits"]
    tokens = (7,) if "Token" in name else ()
    assert logits.shape == (5, *tokens, 4)
    for row, expert in enumerate(ROWS):
        want = models[expert](**batch).logits[row]
        torch.testing.assert_close(logits[row, ..., : LABELS[expert]], want, rtol=0, atol=1e-5)
        assert (logits[row, ..., LABELS[expert] :] == -torch.inf).all()
    assert not torch.allclose(logits[0, ..., :2], logits[1, ..., :2])


@torch.no_grad()
def test_gpt2_reads_the_last_token_before_the_pads(family):
    models, headed = family("GPT2ForSequenceClassification")
    batch = batch_for("GPT2")
    logits = headed(batch, ROWS)["logits"]
    alone = {k: v[1:2, :3] for k, v in batch.items()}
    torch.testing.assert_close(logits[1, :2], models["two"](**alone).logits[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_body_runs_once_for_all_heads(family):
    _, headed = family("BertForSequenceClassification")
    calls = []
    headed.body.register_forward_hook(lambda *args: calls.append(1))
    headed(batch_for("Bert"), ROWS)
    assert len(calls) == 1
    assert headed.port._output is None  # nothing of the batch is kept
    headed(batch_for("Bert"), ROWS)
    assert len(calls) == 2


@torch.no_grad()
def test_hidden_states_are_the_bodys(family):
    models, headed = family("BertForSequenceClassification")
    batch = batch_for("Bert")
    want = models["four"](**batch, output_hidden_states=True).hidden_states
    got = headed.hidden_states(batch)
    assert len(got) == 3 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("heads", [None, ["two"] * 4, ["two"] * 6])
def test_one_head_name_for_each_row(family, heads):
    _, headed = family("BertForSequenceClassification")
    with pytest.raises(TwinmergeError, match="5 rows need 5 head names"):
        headed(batch_for("Bert"), heads)


def test_labels_and_missing_tensors(family):
    _, headed = family("RobertaForSequenceClassification")
    assert headed.labels("three") == ["LABEL_0", "LABEL_1", "LABEL_2"]
    spec = headed.head_specs["two"]
    less = {n: t for n, t in spec.tensors.items() if n != "classifier.dense.bias"}
    state = {headed.canonical(n): t for n, t in headed.body.state_dict().items()}
    with pytest.raises(TwinmergeError, match="The head of 'two' lacks the tensor 'classifier.dense.bias'"):
        HeadedModel(headed.architecture, state, {"two": spec._replace(tensors=less)})
    del state["embeddings.LayerNorm.bias"]
    with pytest.raises(TwinmergeError, match="lack 1 tensors of Roberta.*'embeddings.LayerNorm.bias'"):
        HeadedModel(headed.architecture, state, headed.head_specs)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
@torch.no_grad()
def test_model_without_heads_is_its_class(build, name):
    model = build(name, tie_word_embeddings=True)
    opened = open_model(model)
    headed = HeadedModel(opened.architecture, {n: opened.read(n) for n in opened.specs})
    ids = batch_for("Llama")["input_ids"]
    batch = {"input_ids": ids, **({"decoder_input_ids": ids} if name.startswith("T5") else {})}
    assert torch.equal(headed(batch).logits, model(**batch).logits)


@torch.no_grad()
def test_what_a_file_need_not_hold_is_made_as_loading_makes_it(tmp_path):
    """transformers does not save Marian's sinusoidal places."""
    sizes = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in [("layers", 1), ("ffn_dim", 8)]}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 12}
    tokens = {"vocab_size": 20, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = transformers.MarianConfig(d_model=8, **sizes, **heads, **tokens)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    assert not opened.has("encoder.embed_positions.weight")
    headed = HeadedModel(opened.architecture, {n: opened.read(n) for n in opened.specs})
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 1, 0]])
    batch = {"input_ids": ids, "decoder_input_ids": ids}
    stock = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    assert torch.equal(headed(batch).logits, stock(**batch).logits)


# ------------------------------------------------------------------------------------ heads on disk


@torch.no_grad()
def test_heads_round_trip(family, tmp_path):
    _, headed = family("RobertaForSequenceClassification")
    save_heads(tmp_path, headed.head_specs, "base", {"four": {"task": "t", "metric": "accuracy"}})
    table = json.loads((tmp_path / "heads.json").read_text(encoding="utf-8"))
    assert list(table) == list(LABELS)
    assert table["two"] == {"labels": ["LABEL_0", "LABEL_1"], "class": "RobertaForSequenceClassification"}
    assert table["four"].items() >= {"task": "t", "metric": "accuracy"}.items()
    loaded = load_heads(tmp_path, "base")
    assert list(loaded) == list(LABELS)
    state = {headed.canonical(n): t for n, t in headed.body.state_dict().items()}
    again = HeadedModel(headed.architecture, state, loaded)
    batch = batch_for("Roberta")
    assert torch.equal(again(batch, ROWS)["logits"], headed(batch, ROWS)["logits"])


def test_folder_without_heads(tmp_path):
    assert load_heads(tmp_path) == {}


def test_heads_of_another_base_are_refused(family, tmp_path):
    _, headed = family("BertForSequenceClassification")
    save_heads(tmp_path, headed.head_specs, "base", {})
    with pytest.raises(TwinmergeError, match="belongs to another base model"):
        load_heads(tmp_path, "other")
    (tmp_path / "heads" / "four" / "config.json").unlink()
    with pytest.raises(TwinmergeError, match="config.json is missing"):
        load_heads(tmp_path, "base")


@pytest.mark.parametrize("name", ["../x", "..", ".", "", "/etc", "a/b", "a\\b", "two\n"])
def test_expert_name_in_heads_json_is_never_a_path(family, tmp_path, name):
    _, headed = family("BertForSequenceClassification")
    folder = tmp_path / "model"
    folder.mkdir()
    save_heads(folder, headed.head_specs, "base", {})
    (folder / "heads" / "two").rename(tmp_path / "x")
    (folder / "heads.json").write_text(json.dumps({name: {}}))
    with pytest.raises(TwinmergeError, match="names the expert .*, which is no folder name"):
        load_heads(folder, "base")
