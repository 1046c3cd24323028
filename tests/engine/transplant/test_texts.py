"""What tokens stand for, and how texts are split, against the tokenizers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from twinmerge.engine.tokens.read import read_tokens
from twinmerge.engine.transplant.pieces import pieces
from twinmerge.engine.transplant.texts import LETTERS, Texts

SAMPLES = ["the cat sat on the hat", "a rat and a mat", "hat", "the rats", "sit, naïve é 漢"]


def texts(lab: SimpleNamespace, folder: Path, tokenizer: Tokenizer) -> Texts:
    lab.put_tokenizer(folder, tokenizer, {})
    found = read_tokens(folder)
    assert found is not None
    return Texts.of(found)


def test_the_letters_of_bytes_are_those_of_the_library() -> None:
    by_library = pre_tokenizers.ByteLevel.alphabet()
    assert {*LETTERS} == {*by_library} and sorted(LETTERS.values()) == list(range(256))
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for letter, byte in LETTERS.items():
        if byte < 128:
            assert pre.pre_tokenize_str(chr(byte))[0][0] == letter


@pytest.mark.parametrize("kind, size", [("byte", 320), ("unigram", 70), ("llama", 120), ("wordpiece", 90)])
def test_the_texts_of_the_tokens_of_a_text_make_it_up(
    lab: SimpleNamespace, tmp_path: Path, kind: str, size: int
) -> None:
    tokenizer = lab.with_added(lab.trained(kind, "one", size), "<|a|>")
    found = texts(lab, tmp_path, tokenizer)
    assert found.known
    for text in (*SAMPLES, "hat<|a|>rat"):
        tokens = tokenizer.encode(text).tokens
        if "<unk>" in tokens:
            continue
        said = b"".join(map(found.text, tokens)).decode()
        assert said.replace(" ", "") == text.replace(" ", "")
        if kind != "wordpiece" and "<|a|>" not in text:
            assert said.removeprefix(" ") == text


def test_two_tokens_of_one_text_and_bytes(lab: SimpleNamespace, tmp_path: Path) -> None:
    found = texts(lab, tmp_path, lab.trained("llama"))
    ids = found.tokens.ids
    assert (
        found.by_text[b"a"] == ids["a"]
        and found.by_text[b"\n"] == ids["<0x0A>"]
        and found.by_text[b"\xc3"] == ids["<0xC3>"]
    )
    word = texts(lab, tmp_path / "w", lab.trained("wordpiece"))
    assert word.text("##at") == b"at" and word.text("the") == b" the" and word.text("[") == b"["


def test_what_is_not_known(lab: SimpleNamespace, tmp_path: Path) -> None:
    clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
    clip.pre_tokenizer = pre_tokenizers.ByteLevel()
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<s>": 2}, "<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    lab.put_tokenizer(tmp_path / "c", clip, dict.fromkeys(("bos_token", "eos_token", "unk_token")))
    read = read_tokens(tmp_path / "c")
    assert read is not None and not Texts.of(read).known
    found = texts(lab, tmp_path / "d", words)
    assert not found.known and found.marks.kind == 'WordLevel with ["Fuse", "Whitespace"]'


@pytest.mark.parametrize("kind, size", [("byte", 320), ("unigram", 70), ("llama", 120), ("wordpiece", 90)])
def test_texts_are_split_as_in_the_middle_of_others(lab: SimpleNamespace, tmp_path: Path, kind: str, size: int) -> None:
    tokenizer = lab.trained(kind, "one", size)
    found, ids = texts(lab, tmp_path, tokenizer), tokenizer.get_vocab()
    rows, unknown = len(ids), ids["<unk>"]
    whole = ids[{"byte": "Ġthe", "wordpiece": "the"}.get(kind, "▁the")]
    assert pieces(found, [b" the"], rows, unknown) == [[whole]]
    for text in (" cat", "at", " hathat", " sat on", "h"):
        (split,) = pieces(found, [text.encode()], rows, unknown)
        said = b"".join(found.text(found.tokens.by_id[each]) for each in split).decode()
        assert said.replace(" ", "") == text.replace(" ", "")
        if kind != "wordpiece":
            assert said == text
    if kind == "wordpiece":
        (split,) = pieces(found, [b"at"], rows, unknown)
        assert found.tokens.by_id[split[0]].startswith("##")
    odd = pieces(found, [b"\xc3", " é".encode(), "漢".encode(), b""], rows, unknown)
    if kind in ("byte", "llama"):
        assert [len(each) for each in odd] == [1, 3, 3, 0]
    else:
        assert odd[0] == [] and odd[2] == [] and odd[3] == []
    assert pieces(found, [b" the"], whole, unknown) == [[]]


def test_a_tokenizer_that_cuts_and_pads_does_neither(lab: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = lab.with_added(lab.trained("byte", "one", 320))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    found = texts(lab, tmp_path, tokenizer)
    assert json.loads(found.tokens.text)["padding"] is not None
    assert [len(each) for each in pieces(found, [b"qz", b"q"], 320, None)] == [2, 1]
