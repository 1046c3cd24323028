"""Encoding: one maximum, padding on the tokenizer's side, honest counts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from twinmerge.errors import TwinmergeError
from twinmerge.tasks.encode import TextEncoder, batches
from twinmerge.tasks.suite import Row

WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5, "c": 6, "d": 7}


def bert(**options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(WORDS, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    words.enable_truncation(4)  # as all-MiniLM has in its file: what a file says about length does not count
    words.enable_padding(length=9)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    given = {"unk_token": "[UNK]", "pad_token": "[PAD]", "model_input_names": names, **options}
    return PreTrainedTokenizerFast(tokenizer_object=words, **given)


def gpt(**options: Any) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, model_input_names=["input_ids", "attention_mask"], **{"eos_token": "</s>", **options}
    )


def test_rows_pairs_and_texts_in_one_batch() -> None:
    out = TextEncoder(bert(), 7).encode([Row("a b", "c", 0), "a", ("d", "d"), Row("a b c d", None, 1)])
    assert out["input_ids"].tolist() == [[2, 4, 5, 3, 6, 3], [2, 4, 3, 0, 0, 0], [2, 7, 3, 7, 3, 0], [2, 4, 5, 6, 7, 3]]
    assert out["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6, [0, 0, 0, 1, 1, 0], [0] * 6]
    assert out["attention_mask"].sum(1).tolist() == [6, 3, 5, 6]


def test_cuts_are_counted_and_said_once() -> None:
    encoder = TextEncoder(bert(), 5)
    assert encoder.encode(["a b c d", "a b c", "a"])["input_ids"].tolist() == [
        [2, 4, 5, 6, 3],
        [2, 4, 5, 6, 3],
        [2, 4, 3, 0, 0],
    ]
    encoder.encode([("a a a", "b")])
    assert (encoder.truncated, encoder.seen) == (2, 4)
    with pytest.warns(
        UserWarning, match="2 of 4 texts were longer than the 5 tokens that the model takes and were cut"
    ):
        encoder.warn_truncated()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.warn_truncated()


@pytest.mark.parametrize(
    "given, positions, stated, expected",
    [(6, 512, 8, 6), (None, 512, 8, 8), (None, 7, 8, 7), (None, 512, int(1e30), 512), (None, None, int(1e30), None)],
)
def test_the_maximum(given: int | None, positions: int | None, stated: int, expected: int | None) -> None:
    encoder = TextEncoder(bert(model_max_length=stated), given, positions)
    assert encoder.max_tokens == expected
    assert encoder.encode(["a " * 600])["input_ids"].shape[1] == (expected or 602)


def test_without_a_pad_token_the_end_pads_on_the_tokenizers_side_and_the_tokenizer_stays() -> None:
    tokenizer = gpt(padding_side="left")
    out = TextEncoder(tokenizer).encode(["a b", "b", ""])
    assert out["input_ids"].tolist() == [[1, 2], [0, 2], [0, 0]]
    assert out["attention_mask"].tolist() == [[1, 1], [0, 1], [0, 1]]  # an empty text is one end token
    assert tokenizer.pad_token is None


def test_errors() -> None:
    with pytest.raises(TwinmergeError, match="neither a pad token nor an end token"):
        TextEncoder(gpt(eos_token=None))
    with pytest.raises(TwinmergeError, match="special tokens of a pair take 3. Give 4 or more"):
        TextEncoder(bert(), 3)
    with pytest.raises(TwinmergeError, match="the model takes 512"):
        TextEncoder(bert(), 513, 512)
    for wrong in ([], "a text"):
        with pytest.raises(TwinmergeError, match="Give a list"):
            TextEncoder(bert()).encode(wrong)


def test_from_a_folder(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    assert TextEncoder(tmp_path).encode(["a b c d d"])["input_ids"].tolist() == [[2, 4, 5, 6, 7, 7, 3]]


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "bert"}', '{"model_type": "gpt2"}'])
def test_a_folder_without_a_tokenizer(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(TwinmergeError, match="has no tokenizer.* Copy the tokenizer's files from the base"):
        TextEncoder(tmp_path)
    with pytest.raises(TwinmergeError, match="it is no folder"):
        TextEncoder(tmp_path / "none")


def test_batches() -> None:
    rows = [Row("ab", None, 0), Row("a", "bcd", 1), Row("cd", None, 0), Row("", None, 1)]
    assert list(batches(rows, 3)) == [([1, 0, 2], [rows[1], rows[0], rows[2]]), ([3], [rows[3]])]
    assert [at for at, _ in batches(rows, 2, "file")] == [[0, 1], [2, 3]]
    assert list(batches([], 2)) == []
    with pytest.raises(TwinmergeError, match="batch size is 0"):
        batches(rows, 0)
    with pytest.raises(TwinmergeError, match="order is 'random'"):
        batches(rows, 1, "random")  # type: ignore[arg-type]


def test_shuffled_batches_mix_tasks_and_have_every_row_once() -> None:
    texts = ["x"] * 500 + ["y"] * 500
    drawn = list(batches(texts, 50, "shuffled", seed=1))
    assert sorted(i for at, _ in drawn for i in at) == list(range(1000))
    assert all(10 < part.count("x") < 40 for _, part in drawn)
    assert drawn == list(batches(texts, 50, "shuffled", seed=1)) != list(batches(texts, 50, "shuffled", seed=2))
