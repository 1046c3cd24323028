"""Which tokens the output has, and by which ids."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from json.encoder import encode_basestring as quoted
from typing import Any

from twinmerge.engine.tokens.read import FILE
from twinmerge.errors import ModelError
from twinmerge.models.tokens import PLAIN, Added, Tokens
from twinmerge.recipes.tokenizer import TokenizerChoice
from twinmerge.store.foreign import VOCABULARY, parse_json
from twinmerge.store.json_members import span


@dataclass(frozen=True)
class Held:
    """A model's tokenizer, and how many rows its tables have: a token whose id is not below has none.

    Attributes:
        tokens: of the tokenizer.
        rows: of the tables.
    """

    tokens: Tokens
    rows: int


@dataclass(frozen=True)
class Order:
    """The tokens of the output.

    Attributes:
        tokens: with the text of the tokenizer.json that is written.
        size: rows of its tables.
        whole: model -> how many ordinary tokens of it are added as whole texts.
        settings: added tokens that models have with other settings than the output.
    """

    tokens: Tokens
    size: int
    whole: Mapping[str, int] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


def ordered(choice: TokenizerChoice, donor: Held, models: Mapping[str, Held], padded: int) -> Order:
    """The tokens of a choice.

    A union has the donor's tokens with their ids, then the ordinary tokens that the other models have besides, then the
    added tokens of all, with the settings of the first that has them. All are added as whole texts: what a tokenizer
    merges or scores is the donor's alone. Tokens that only the recipe names come last.

    Args:
        choice: of the recipe.
        donor: whose tokens come first, with their ids.
        models: name -> tokenizer of every model, in their order; used for a union.
        padded: rows of the base's tables, for `keep_padding`.

    Raises:
        ModelError: tokens of the donor that have no row and cannot be taken out; ids with holes.
    """
    tokens = _cut(donor.tokens, donor.rows)
    ids, new, others = dict(tokens.ids), dict[str, Added](), dict[str, int]()
    at = tokens.next_id

    def add(token: str, settings: Added) -> None:
        nonlocal at
        if token not in ids:
            ids[token] = at
            at += 1
        new[token] = settings

    differing: dict[str, None] = {}
    if choice.source == "union":
        for name, held in models.items():
            if held.tokens.ids is donor.tokens.ids:
                continue
            own, rows = held.tokens.added, held.rows
            lacking = [i for token, i in held.tokens.ids.items() if token not in ids and i < rows and token not in own]
            by_id = held.tokens.by_id
            ids |= zip([by_id[i] for i in sorted(lacking)], range(at, at + len(lacking)), strict=True)
            at += len(lacking)
            if lacking:
                others[name] = len(lacking)
        for held in models.values():
            for content, settings in held.tokens.added.items():
                known = tokens.added.get(content, new.get(content))
                if held.tokens.ids[content] >= held.rows:
                    continue
                if known is None:
                    add(content, settings)
                elif known != settings:
                    differing[content] = None
    for content in choice.tokens:
        if content not in ids:
            add(content, PLAIN)
    if at != tokens.next_id and len({*ids.values()}) < len(ids):
        raise ModelError(
            f"The ids in {tokens.folder / FILE} have holes, so no token can be added. Take another tokenizer for "
            "source."
        )
    if at != tokens.next_id or new:
        tokens = with_added(tokens, ids, new)
    size = max(ids.values()) + 1
    size = max(size, padded) if choice.keep_padding else size
    multiple = choice.pad_to_multiple_of or 1
    return Order(tokens, -(-size // multiple) * multiple, others, tuple(differing))


def with_added(tokens: Tokens, ids: Mapping[str, int], new: Mapping[str, Added]) -> Tokens:
    """The same tokenizer with more added tokens; all else in its text stays as it is.

    Args:
        tokens: of the tokenizer.
        ids: token -> id, with the new ones after the others, in their order.
        new: token -> settings, of those that are not plain, or that the vocabulary has.
    """
    own = sorted(
        {**tokens.added, **{token: each for token, each in new.items() if token in tokens.ids}}, key=ids.__getitem__
    )
    added = {token: new.get(token, PLAIN) for token in islice(ids, len(tokens.ids), None)}
    added = {**{token: new[token] if token in new else tokens.added[token] for token in own}, **added}
    return replace(tokens, write=partial(_with_list, tokens, ids, added), ids=ids, added=added, made=True)


def _with_list(tokens: Tokens, ids: Mapping[str, int], added: Mapping[str, Added]) -> bytes:
    """The text of a tokenizer with another list of added tokens."""
    said = {settings: json.dumps(settings._asdict())[1:] for settings in {*added.values()}}
    listed = (f'{{"id":{ids[token]},"content":{quoted(token)},{said[each]}' for token, each in added.items())
    text, whole = tokens.text.decode(), f"[{','.join(listed)}]"
    found = span(text, "added_tokens")
    if found is None:
        return f'{{"added_tokens":{whole},{text.lstrip()[1:]}'.encode()
    return f"{text[: found[0]]}{whole}{text[found[1] :]}".encode()


def _cut(tokens: Tokens, rows: int) -> Tokens:
    """A tokenizer without the tokens that have no row.

    Raises:
        ModelError: ordinary ones of another model than BPE, whose pieces depend on each other.
    """
    gone = {token for token, number in tokens.ids.items() if number >= rows}
    if not gone:
        return tokens
    raw: dict[str, Any] = parse_json(tokens.text, VOCABULARY)
    raw["added_tokens"] = [each for each in raw.get("added_tokens") or () if each["content"] not in gone]
    vocabulary = raw["model"]["vocab"]
    names = vocabulary if isinstance(vocabulary, dict) else {piece[0] for piece in vocabulary}
    if ordinary := [token for token in gone if token in names]:
        if tokens.kind != "BPE":
            raise ModelError(
                f"{len(ordinary)} ordinary tokens of the tokenizer in {tokens.folder}, such as {min(ordinary)!r}, have "
                f"ids from {rows} on, which the model has no rows for, and a {tokens.kind} tokenizer cannot be cut. "
                "Give the model rows for all of them (resize_token_embeddings)."
            )
        raw["model"]["vocab"] = {token: number for token, number in vocabulary.items() if token not in gone}
        prefix = raw["model"].get("continuing_subword_prefix") or ""
        raw["model"]["merges"] = [each for each in raw["model"]["merges"] if not _touches(each, gone, prefix)]
    left = {token: settings for token, settings in tokens.added.items() if token not in gone}
    ids = {token: number for token, number in tokens.ids.items() if token not in gone}
    text = json.dumps(raw, ensure_ascii=False).encode()
    return replace(tokens, write=lambda: text, size=len(raw["model"]["vocab"]), ids=ids, added=left, made=True)


def _touches(merge: Any, gone: Collection[str], prefix: str) -> bool:
    """Whether a merge of BPE takes or makes a token that is gone."""
    one, other = merge if isinstance(merge, list) else merge.split(" ")
    return one in gone or other in gone or one + other.removeprefix(prefix) in gone
