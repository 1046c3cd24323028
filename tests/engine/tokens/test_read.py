"""Tokens are those that the tokenizers library and transformers load, in every form of file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from twinmerge.engine.tokens.read import named_in, read_tokens
from twinmerge.errors import TwinmergeError


def written(folder: Path, raw: Any, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
def test_ids_and_settings_are_the_librarys(lab: SimpleNamespace, tmp_path: Path, kind: str) -> None:
    odd = AddedToken('a "quoted"\n\u2028 text {', single_word=True, rstrip=True, normalized=False)
    tokenizer = lab.with_added(lab.trained(kind, "one"), "<|a|>", odd, "bee", "cat")
    found = read_tokens(written(tmp_path, tokenizer.to_str()))
    assert found is not None and found.ids == tokenizer.get_vocab() and found.kind == kind and found.fits
    settings = {each.content: each for each in tokenizer.get_added_tokens_decoder().values()}
    assert found.added.keys() == settings.keys()
    for content, each in found.added.items():
        assert all(getattr(settings[content], key) == value for key, value in each._asdict().items())
    assert found.next_id == tokenizer.get_vocab_size() and found.text == tokenizer.to_str().encode()
    tokenizer.add_tokens(["one more"])
    assert tokenizer.token_to_id("one more") == found.next_id


def test_equal_files_are_taken_apart_once(lab: SimpleNamespace, tmp_path: Path) -> None:
    text = lab.trained("BPE", "one").to_str()
    seen: dict[bytes, Any] = {}
    one, two = (read_tokens(written(tmp_path / name, text), seen) for name in "ab")
    assert one is not None and two is not None and one.ids is two.ids and two.folder == tmp_path / "b"


def test_no_tokenizer_is_none(tmp_path: Path) -> None:
    assert read_tokens(tmp_path) is None


def test_merges_before_the_vocabulary(lab: SimpleNamespace, tmp_path: Path) -> None:
    raw = json.loads(lab.trained("BPE", "one").to_str())
    raw = {"model": dict(reversed(raw["model"].items())), "added_tokens": raw["added_tokens"]}
    found = read_tokens(written(tmp_path, raw))
    assert found is not None and found.ids == lab.trained("BPE", "one").get_vocab()


def test_other_forms_are_read_as_transformers_reads_them(lab: SimpleNamespace, tmp_path: Path) -> None:
    """The files of GPT-2 and of BERT, which hold no tokenizer.json; oracle: the tokenizer that transformers makes."""
    from transformers import AutoTokenizer

    bpe = json.loads(lab.trained("BPE", "one").to_str())["model"]
    gpt, bert = tmp_path / "gpt", tmp_path / "bert"
    for folder in (gpt, bert):
        folder.mkdir()
    (gpt / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (gpt / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(each) for each in bpe["merges"]))
    (gpt / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}))
    (bert / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "cat"]))
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    for folder in (gpt, bert):
        (folder / "config.json").write_text(json.dumps({"model_type": "gpt2" if folder == gpt else "bert"}))
        found = read_tokens(folder)
        assert (
            found is not None
            and found.ids == AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()
        )
        assert Tokenizer.from_str(found.text.decode()).get_vocab() == found.ids


def test_tokens_that_only_the_config_names_are_added_as_loading_adds_them(lab: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config = {"tokenizer_class": "TokenizersBackend", "pad_token": "<pad>", "unk_token": "<unk>"}
    folder = written(tmp_path, lab.trained("BPE", "one").to_str(), config)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = read_tokens(folder)
    assert found is not None and "<pad>" in found.ids
    assert found.ids == AutoTokenizer.from_pretrained(folder, trust_remote_code=False).get_vocab()


def test_named_in() -> None:
    config = {
        "eos_token": {"content": "</s>"},
        "extra_special_tokens": {"image_token": "<i>"},
        "additional_special_tokens": ["<a>", {"content": "<b>"}],
        "added_tokens_decoder": {"7": {"content": "<c>"}},
        "unk_token": "",
        "pad_token": None,
        "model_max_length": 5,
    }
    assert sorted(named_in(config)) == ["</s>", "<a>", "<b>", "<c>", "<i>"]
    assert named_in({"extra_special_tokens": ["<i>"]}) == ["<i>"] and named_in({}) == []
    assert named_in({"extra_special_tokens": "<i>", "additional_special_tokens": 3, "eos_token": {}}) == ["<i>"]


WORDS = {"a": 0, "b": 1, "c": 2}


def words(*added: tuple[str, int], vocabulary: dict[str, int] | None = None) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(Tokenizer(models.WordLevel(WORDS, "a")).to_str())
    raw["model"]["vocab"] = WORDS if vocabulary is None else vocabulary
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    raw["added_tokens"] = [{"id": number, "content": token, **flags} for token, number in added]
    return raw


@pytest.mark.parametrize(
    "added", [[("x", 3), ("y", 4)], [("b", 1), ("x", 3)], [("x", 3), ("b", 1), ("y", 4)], [("", 9), ("x", 3)]]
)
def test_ids_that_loading_gives_are_believed(tmp_path: Path, added: list[tuple[str, int]]) -> None:
    raw = words(*added)
    found = read_tokens(written(tmp_path, raw))
    assert found is not None and found.fits
    assert found.ids == Tokenizer.from_str(json.dumps(raw)).get_vocab()


@pytest.mark.parametrize("added", [[("x", 7)], [("x", 4), ("y", 3)]])
def test_ids_that_loading_does_not_give_are_read_as_it_gives_them(tmp_path: Path, added: list[tuple[str, int]]) -> None:
    raw = words(*added)
    folder = written(tmp_path, raw, {"tokenizer_class": "TokenizersBackend"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    found = read_tokens(folder)
    assert found is not None and found.ids == Tokenizer.from_str(json.dumps(raw)).get_vocab()


@pytest.mark.parametrize(
    "raw, said",
    [
        ("{", "cannot be read"),
        ("[]", "Expecting an object"),
        ({"tiny": True}, "its form is not known"),
        (words(vocabulary={"a": 0, "b": 0}), "two tokens have one id"),
        (words(("x", 1)), "two tokens have one id"),
        (words(vocabulary={"a": -1}), "no whole number from 0 on"),
        (words(vocabulary={}), "no whole number from 0 on"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0], ["a", 1.0]]}}, "stands twice"),
    ],
)
def test_damage_is_named(tmp_path: Path, raw: Any, said: str) -> None:
    with pytest.raises(TwinmergeError, match=said):
        read_tokens(written(tmp_path, raw))
