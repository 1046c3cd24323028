"""Numbers of tokens in configs, where the output's tokens have other numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twinmerge.errors import ModelError

ONE = ("_token_id", "_token_index", "_token_ids")
"""Ends of keys whose values are ids of tokens, or lists of them."""
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
PAIRS = ("forced_decoder_ids", "sequence_bias")
"""Keys of ids among other numbers."""


def renumbered(config: Mapping[str, Any], ids: Mapping[int, int | None] | None) -> tuple[dict[str, Any], list[str]]:
    """What a config says otherwise with other ids, and the keys that name a token which is not there any more.

    Args:
        config: of a model or of generation.
        ids: id -> the new one, None for a token that is not there any more; None where all stay.

    Raises:
        ModelError: a key whose ids are not understood.

    Example:
        >>> renumbered({"eos_token_id": [2, 5], "pad_token_id": 9, "bos_token_id": 1}, {1: 1, 2: 3, 5: None, 9: None})
        ({'eos_token_id': [3], 'pad_token_id': None}, ['eos_token_id', 'pad_token_id'])
    """
    found: dict[str, Any] = {}
    gone: list[str] = []
    if ids is None:
        return found, gone
    for key, value in config.items():
        if isinstance(value, dict):
            inner, lost = renumbered(value, ids)
            found |= {key: {**value, **inner}} if inner else {}
            gone += [f"{key}.{each}" for each in lost]
        elif not isinstance(key, str):  # of labels
            continue
        elif key in PAIRS and value:
            raise ModelError(f"The config's {key} names tokens by numbers that change here. Take it out of the config.")
        elif key.endswith(ONE) or key in LISTS:
            new, lost_any = _new(value, ids)
            if new != value:
                found[key] = new
            if lost_any:
                gone.append(key)
    return found, gone


def _new(value: Any, ids: Mapping[int, int | None]) -> tuple[Any, bool]:
    """The new ids of a value, and whether one is lost; a list of lists loses the lists that a lost one is in."""
    if isinstance(value, list):
        each = [_new(one, ids) for one in value]
        kept = [new for new, lost in each if not lost]
        return kept, len(kept) < len(each)
    if type(value) is not int or value not in ids:
        return value, False
    return ids[value], ids[value] is None
