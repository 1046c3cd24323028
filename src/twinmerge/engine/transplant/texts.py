"""What text a token stands for, whichever way its tokenizer writes spaces and bytes down."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from twinmerge.models.tokens import Tokens
from twinmerge.store.json_members import members

BYTES, SPACES, WORD_PIECES = "byte-level", "spaces", "word pieces"
KNOWN = (BYTES, SPACES, WORD_PIECES)
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Marks(NamedTuple):
    """How a tokenizer writes text into its tokens.

    Attributes:
        kind: "byte-level" (a letter for each byte, "Ġ" for a space, as GPT-2), "spaces" (a mark for each space, as
            SentencePiece), "word pieces" (a prefix where a word goes on, as BERT), or what else it is, in words.
        mark: of a space, or of what goes on.
    """

    kind: str
    mark: str = ""


def _byte_letters() -> dict[str, int]:
    """The letter of each byte in byte-level tokens: itself where it is printable, else the next one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


LETTERS = _byte_letters()


@dataclass(frozen=True)
class Texts:
    """The texts of a tokenizer's tokens.

    Attributes:
        tokens: of the tokenizer.
        marks: how it writes text into them.
    """

    tokens: Tokens
    marks: Marks

    @classmethod
    def of(cls, tokens: Tokens) -> Texts:
        """Of a tokenizer, as its tokenizer.json says; its merges are not read."""
        text = tokens.text.decode()
        found = members(text, "model", {"merges"})
        if "vocab" not in found["model"]:  # its merges come before
            found = members(text, "model", ())
        return cls(tokens, marks_of(found, tokens.kind))

    @property
    def known(self) -> bool:
        """Whether it is known what texts they stand for."""
        return self.marks.kind in KNOWN

    def text(self, token: str) -> bytes:
        """The bytes that a token stands for, with the space before them where it has one."""
        kind, mark = self.marks
        if token in self.tokens.added:
            return token.encode()
        if kind == BYTES:
            return bytes(map(LETTERS.__getitem__, token)) if LETTERS.keys() >= {*token} else token.encode()
        if kind == SPACES:
            byte = BYTE.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(mark, " ").encode()
        if token.startswith(mark) and token != mark:
            return token.removeprefix(mark).encode()
        return f"{' ' if token[:1].isalnum() else ''}{token}".encode()

    @cached_property
    def by_text(self) -> dict[bytes, int]:
        """Text -> id of its token; of several the one with the lowest id, those that stand for a byte last."""
        found: dict[bytes, int] = {}
        of_bytes = {token for token in self.tokens.ids if self.marks.kind == SPACES and BYTE.fullmatch(token)}
        for token, number in sorted(self.tokens.ids.items(), key=lambda item: (item[0] in of_bytes, item[1])):
            found.setdefault(self.text(token), number)
        return found


def marks_of(tokenizer: Mapping[str, Any], kind: str) -> Marks:
    """How a tokenizer writes text into its tokens.

    Args:
        tokenizer: what its tokenizer.json says.
        kind: of its model.

    Example:
        >>> marks_of({"model": {}, "pre_tokenizer": {"type": "ByteLevel"}}, "BPE")
        Marks(kind='byte-level', mark='')
        >>> marks_of({"model": {}, "decoder": {"type": "Metaspace", "replacement": "▁"}}, "Unigram")
        Marks(kind='spaces', mark='▁')
        >>> marks_of({"model": {"end_of_word_suffix": "</w>"}}, "BPE")
        Marks(kind='BPE with end_of_word_suffix </w>', mark='')
    """
    model = tokenizer["model"]
    parts = [part for key in ("pre_tokenizer", "decoder", "normalizer") for part in _parts(tokenizer.get(key))]
    if kind == "WordPiece":
        return Marks(WORD_PIECES, model.get("continuing_subword_prefix") or "##")
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if model.get(key):
            return Marks(f"{kind} with {key} {model[key]}")
    if any(part["type"] == "ByteLevel" for part in parts):
        return Marks(BYTES)
    marks = {part["replacement"] for part in parts if part["type"] == "Metaspace"}
    for part in parts:
        if part["type"] == "Replace" and part.get("content") == " " and isinstance(part.get("pattern"), dict):
            marks |= {each for each in [part["pattern"].get("String")] if isinstance(each, str) and each.strip()}
    if len(marks) == 1:
        return Marks(SPACES, marks.pop())
    return Marks(f"{kind} with {json.dumps(sorted({part['type'] for part in parts}))}")


def _parts(part: Any) -> Iterator[Mapping[str, Any]]:
    """A part of a tokenizer, and those that are in it."""
    if isinstance(part, Mapping) and isinstance(part.get("type"), str):
        yield part
        for value in part.values():
            for each in value if isinstance(value, list) else ():
                yield from _parts(each)
