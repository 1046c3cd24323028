"""Which tokens two tokenizers share, and which special ones do the same work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twinmerge.engine.sides import json_in
from twinmerge.engine.tokens.ids import ONE
from twinmerge.engine.tokens.read import config_of
from twinmerge.engine.transplant.texts import Texts
from twinmerge.errors import ModelError
from twinmerge.models.tokens import Tokens

ROLES = ("eos", "bos", "unk", "sep", "cls", "mask", "pad")
"""What special tokens are for; a token of several takes the row of the first."""
EOS = "eos_token_id"


@dataclass(frozen=True)
class Shared:
    """The tokens of a donor that a model has too.

    Attributes:
        rows: (size,) for each id of the donor the model's row of that token, −1 where it has none.
        kept: (size,) bool, the ids whose token itself is shared.
        roles: token of the donor that the model lacks -> the model's token that does the same work (ends a text, pads).
        of: how many tokens the donor has.
    """

    rows: NDArray[np.int32]
    kept: NDArray[np.bool_]
    roles: Mapping[str, str]
    of: int

    @property
    def count(self) -> int:
        """How many tokens are shared."""
        return int(self.kept.sum())

    @property
    def overlap(self) -> float:
        """The share of the donor's tokens that the model has."""
        return self.count / self.of


def shared_tokens(model: Texts, donor: Texts, rows: int, special: Mapping[str, int], own: Mapping[str, int]) -> Shared:
    """What both have: tokens of one name where both write text alike, else of one text.

    Args:
        model, donor: their tokens.
        rows: of the model's tables; a token whose id is not below has none.
        special: what it is for -> id, of the donor's special tokens (`special_ids`).
        own: the same of the model's.

    Raises:
        ModelError: they write text in different ways, and of one it is not known which.
    """
    ids = donor.tokens.ids
    found = np.full(max(ids.values()) + 1, -1, np.int32)
    if model.marks == donor.marks:
        same = {number: model.tokens.ids.get(token, -1) for token, number in ids.items()}
    else:
        for each in (model, donor):
            require_known(each)
        same = {number: model.by_text.get(text, -1) for text, number in donor.by_text.items()}
    for number, row in same.items():
        found[number] = row if row < rows else -1
    kept = found >= 0
    roles = {}
    for role in ROLES:
        number, row = special.get(role, -1), own.get(role, -1)
        if number >= 0 and 0 <= row < rows and found[number] < 0 and row in model.tokens.by_id:
            found[number] = row
            roles[donor.tokens.by_id[number]] = model.tokens.by_id[row]
    return Shared(found, kept, roles, len(ids))


def require_known(texts: Texts) -> None:
    """Refuse a tokenizer of whose tokens the texts are not known.

    Raises:
        ModelError: it is one.
    """
    if not texts.known:
        raise ModelError(
            f"The tokenizer in {texts.tokens.folder} is {texts.marks.kind}, of which it is not known what text a token "
            "stands for. Take a donor that is byte-level, SentencePiece or WordPiece."
        )


def special_ids(folder: Path | None, config: Mapping[str, Any], tokens: Tokens) -> dict[str, int]:
    """What it is for -> id of the special tokens of a model: as its tokenizer's settings name them, else as its config
    does.

    Args:
        folder: of the tokenizer's settings.
        config: of the model.
        tokens: of its tokenizer.
    """
    settings = {} if folder is None else {**json_in(folder, "special_tokens_map.json"), **config_of(folder)}
    found = {}
    for role in ROLES:
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and named in tokens.ids:
            found[role] = tokens.ids[named]
        elif known := ids_in(config.get(f"{role}_token_id"), tokens):
            found[role] = known[0]
    return found


def end_ids(generation: Mapping[str, Any], config: Mapping[str, Any], tokens: Tokens) -> list[int]:
    """The ids of all tokens that end a text of a model, as its generation settings say, else its config."""
    return ids_in(generation.get(EOS), tokens) or ids_in(config.get(EOS), tokens)


def ids_in(value: Any, tokens: Tokens) -> list[int]:
    """The ids that a value of a config names, as far as a tokenizer has them.

    Example:
        >>> from types import SimpleNamespace
        >>> ids_in([2, 7], SimpleNamespace(by_id={2: "</s>"})), ids_in(None, SimpleNamespace(by_id={}))
        ([2], [])
    """
    listed = value if isinstance(value, list) else [value]
    return [each for each in listed if type(each) is int and each in tokens.by_id]


def with_special(config: Mapping[str, Any], special: Mapping[str, int], ends: Sequence[int]) -> dict[str, Any]:
    """What a config says otherwise where its special tokens are those of another tokenizer.

    Args:
        config: of a model, or of generation.
        special: what it is for -> its id.
        ends: all ids that end a text, for a config that lists them.

    Example:
        >>> with_special({"eos_token_id": 2, "text_config": {"pad_token_id": 0}}, {"eos": 7, "pad": 8, "bos": 6}, [7])
        {'eos_token_id': 7, 'text_config': {'pad_token_id': 8}}
        >>> with_special({"eos_token_id": [2, 3]}, {"eos": 7}, [7, 9])
        {'eos_token_id': [7, 9]}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        role = key.removesuffix(ONE[0]) if isinstance(key, str) and key.endswith(ONE[0]) else ""
        if role in special:
            found[key] = list(ends) if key == EOS and isinstance(value, list) else special[role]
        elif isinstance(value, dict) and (inner := with_special(value, special, ends)):
            found[key] = {**value, **inner}
    return found
