"""What has a row for each token is what transformers resizes with the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as t
from torch import nn

from twinmerge.errors import ModelError
from twinmerge.models.by_token import by_token, resized, vocabulary_size
from twinmerge.models.opening import open_model
from twinmerge.models.plain import open_plain

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
TIED = {"tie_word_embeddings": True}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
BART = {
    "d_model": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 1,
    "decoder_attention_heads": 1,
}
BART |= {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 16}
GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 30}  # as many places as tokens
MODELS = {
    "bert": lambda n: t.BertForMaskedLM(t.BertConfig(vocab_size=n, **SMALL)),
    "bert untied": lambda n: t.BertForMaskedLM(t.BertConfig(vocab_size=n, tie_word_embeddings=False, **SMALL)),
    "roberta": lambda n: t.RobertaForMaskedLM(t.RobertaConfig(vocab_size=n, **SMALL)),
    "gpt2": lambda n: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=n, **GPT2)),
    "t5": lambda n: t.T5ForConditionalGeneration(t.T5Config(vocab_size=n, **T5)),
    "t5 untied": lambda n: t.T5ForConditionalGeneration(t.T5Config(vocab_size=n, tie_word_embeddings=False, **T5)),
    "bart": lambda n: t.BartForConditionalGeneration(t.BartConfig(vocab_size=n, pad_token_id=1, **BART)),
    "llama": lambda n: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=n, **SMALL)),
    "qwen2": lambda n: t.Qwen2ForCausalLM(t.Qwen2Config(vocab_size=n, num_key_value_heads=1, **TIED, **SMALL)),
    "classifier": lambda n: t.BertForSequenceClassification(t.BertConfig(vocab_size=n, **SMALL)),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(MODELS))
def test_it_is_what_transformers_resizes(kind: str) -> None:
    model: Any = MODELS[kind](30)
    opened = open_model(model)
    rows = by_token(opened)
    found = {opened.stored[name] for name in rows}
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.resize_token_embeddings(37)
    changed = {name for name, tensor in model.state_dict().items() if tensor.shape != before[name]}
    assert found == changed & {*opened.stored.values()} and set(rows.values()) == {30}


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_plain_models_are_told_without_their_class(tmp_path: Path, kind: str) -> None:
    MODELS[kind](30).save_pretrained(tmp_path)
    plain = open_plain([tmp_path])
    assert plain is not None and by_token(plain[0]) == by_token(open_model(tmp_path))


def test_plain_models_may_differ_in_their_vocabulary_alone(tmp_path: Path) -> None:
    for n in (30, 31):
        MODELS["llama"](n).save_pretrained(tmp_path / str(n))
    both = [tmp_path / "30", tmp_path / "31"]
    assert open_plain(both) is None and open_plain(both, vocabularies=True) is not None
    t.LlamaForCausalLM(t.LlamaConfig(vocab_size=30, **{**SMALL, "intermediate_size": 6})).save_pretrained(
        tmp_path / "x"
    )
    assert open_plain([both[0], tmp_path / "x"], vocabularies=True) is None


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match="so nothing says which of its tensors have a row for each token"):
        by_token(open_model(nn.Embedding(3, 2)))
    with pytest.raises(ModelError, match=r"several sizes of vocabularies \(vocab_size 8, inner.vocab_size_too 9\)"):
        vocabulary_size({"vocab_size": 8, "inner": {"vocab_size_too": 9}}, "it")
    with pytest.raises(ModelError, match="names no vocab_size"):
        vocabulary_size({"hidden_size": 8, "id2label": {0: "a"}}, "it")
    assert resized({"text": {"vocab_size": 8, "n": 1}, "vision": {"n": 2}}, 9) == {"text": {"vocab_size": 9, "n": 1}}
