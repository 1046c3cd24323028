"""Tokenizers that give a row of the embeddings another meaning are found, in every form that they are stored in."""

from __future__ import annotations

import json
import os

import pytest
from tokenizers import Tokenizer, models

from twinmerge.errors import TwinmergeError
from twinmerge.models.vocabulary import other_tokens

WORDS = {"[UNK]": 0, "cat": 1, "dog": 2, "é": 3}
TURNED = {"[UNK]": 0, "cat": 2, "dog": 1, "é": 3}


def folder(root, file, content):
    root.mkdir()
    (root / file).write_text(content, encoding="utf-8")
    return root


def stored(kind, words):
    names = sorted(words, key=words.__getitem__)
    if kind == "vocab.txt":
        return kind, "\n".join(names)
    if kind == "vocab.json":
        return kind, json.dumps(words)
    model = {
        "word level": lambda: models.WordLevel(words, "[UNK]"),
        "word piece": lambda: models.WordPiece(words, unk_token="[UNK]"),
        "unigram": lambda: models.Unigram([(name, -1.0) for name in names], 0, False),
        "bpe": lambda: models.BPE(words, []),
    }[kind]()
    tokenizer = Tokenizer(model)
    tokenizer.add_tokens(["<extra>"])
    return "tokenizer.json", tokenizer.to_str()


@pytest.mark.parametrize("kind", ["vocab.txt", "vocab.json", "word level", "word piece", "unigram", "bpe"])
def test_same_and_turned(tmp_path, kind):
    base = folder(tmp_path / "base", *stored(kind, WORDS))
    file, content = stored(kind, WORDS)
    spaced = content + "\n" if file == "tokenizer.json" else content  # other bytes, the same meaning
    assert other_tokens(base, folder(tmp_path / "same", file, spaced)) is None
    said = other_tokens(base, folder(tmp_path / "turned", *stored(kind, TURNED)))
    assert said is not None and said.startswith("2 of its ") and "'dog' (1, in the base 2)" in said


def test_a_token_that_the_base_lacks(tmp_path):
    base = folder(tmp_path / "base", "vocab.txt", "a\nb")
    more = folder(tmp_path / "more", "vocab.txt", "a\nb\nc")
    said = other_tokens(base, more)
    assert said is not None and "1 of its 3 tokens" in said and "'c' (2, not in the base)" in said
    assert other_tokens(more, base) is None  # a shorter list uses fewer rows, all of them alike


def test_files_that_cannot_be_read_as_tokens(tmp_path):
    base = folder(tmp_path / "base", "tokenizer.model", "one")
    assert other_tokens(base, folder(tmp_path / "same", "tokenizer.model", "one")) is None
    said = other_tokens(base, folder(tmp_path / "other", "tokenizer.model", "two"))
    assert said == "its tokenizer.model is another file than the base's"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {}}', '{"model": {"vocab": 3}}', "\xff"])
def test_nothing_is_said_of_what_is_not_known(tmp_path, content):
    base = folder(tmp_path / "base", *stored("word level", WORDS))
    assert other_tokens(base, folder(tmp_path / "strange", "tokenizer.json", content)) is None
    (tmp_path / "empty").mkdir()
    assert other_tokens(base, tmp_path / "empty") is None and other_tokens(None, base) is None


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_are_those_that_transformers_reads(tmp_path, end):
    """Oracle: the ids of transformers' own reader, of tokens that hold what `str.splitlines` splits at."""
    from transformers.models.bert.tokenization_bert import load_vocab

    words = ["[PAD]", "a\u2028b", "c\u0085d", "e\x0cf", "\x1cg", "h\x0b", "[UNK]", "i"]
    turned = [*words[:6], "i", "[UNK]"]
    folders = []
    for name, tokens in (("base", words), ("turned", turned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_bytes("".join(f"{token}{end}" for token in tokens).encode())
        folders.append(tmp_path / name)
        assert load_vocab(tmp_path / name / "vocab.txt") == {token: i for i, token in enumerate(tokens)}
    said = other_tokens(*folders)
    assert said == "2 of its 8 tokens have another id than in the base or none there, such as 'i' (6, in the base 7)"


def test_a_tokenizer_that_leads_out_of_its_folder(tmp_path):
    base = folder(tmp_path / "base", *stored("word level", WORDS))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").symlink_to(base / "tokenizer.json")
    with pytest.raises(TwinmergeError, match=r"other/tokenizer.json is a link to .*, outside its folder"):
        other_tokens(base, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    (tmp_path / "other" / "tokenizer.json").touch()
    os.truncate(tmp_path / "other" / "tokenizer.json", 1 << 40)
    with pytest.raises(TwinmergeError, match=r"tokenizer.json has 1099511627776 bytes, more than"):
        other_tokens(base, tmp_path / "other")


@pytest.mark.parametrize("inside", ["\u2028", "\u0085", "\x0c", "\x1c", "\u00a0"])
def test_a_token_that_holds_another_line_break_is_one_token(tmp_path, inside):
    for name, tokens in (("base", ["[PAD]", f"a{inside}b", "cat"]), ("expert", ["[PAD]", f"a{inside}b", "cat", "dog"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    said = other_tokens(tmp_path / "base", tmp_path / "expert")
    assert said is not None and said.startswith("1 of its 4 tokens") and "'dog' (3, not in the base)" in said
