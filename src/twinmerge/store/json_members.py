"""Some members of a large JSON object, without the rest: the tokens of a tokenizer lie before its merges, which are as
many again and take longer to read."""

from __future__ import annotations

import json
from collections.abc import Collection
from json.decoder import WHITESPACE, JSONDecodeError, scanstring  # type: ignore[attr-defined]
from typing import Any

from twinmerge.store.foreign import no_key_twice

_DECODER = json.JSONDecoder(object_pairs_hook=no_key_twice)


def members(text: str, inside: str, until: Collection[str]) -> dict[str, Any]:
    """The members of an object, those of one member in it beside them, up to the first that is not wanted.

    Args:
        text: of the whole object.
        inside: the key of a member that is an object, whose own members are read one by one.
        until: keys of that one; reading ends at the first of them.

    Returns:
        key -> value; under `inside` what was read of it.

    Raises:
        ValueError: no JSON up to there; a key twice.

    Example:
        >>> members('{"a": [1], "m": {"x": 2, "y": {"z": 3}, "long": [0, 0], "w": 4}, "b": 5}', "m", {"long"})
        {'a': [1], 'm': {'x': 2, 'y': {'z': 3}}}
    """
    try:
        return _object(text, _token(text, 0), inside, until)[0]
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def span(text: str, key: str) -> tuple[int, int] | None:
    """Where the value of a member of an object begins and ends; None where there is no such member.

    Args:
        text: of the whole object.
        key: of the member.

    Raises:
        ValueError: no JSON up to there.

    Example:
        >>> text = '{"a": {"b": 1}, "b": [2, 3]}'
        >>> text[slice(*span(text, "b"))], span(text, "c")
        ('[2, 3]', None)
    """
    try:
        at = _token(text, _opened(text, _token(text, 0)))
        while text[at : at + 1] != "}":
            found, at = _key(text, at)
            end = _DECODER.raw_decode(text, at)[1]
            if found == key:
                return at, end
            at = _next(text, end)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return None


def _object(text: str, at: int, inside: str | None, until: Collection[str]) -> tuple[dict[str, Any], int | None]:
    """The members of the object that begins at `at`, and where it ends; None where reading ended before."""
    found: dict[str, Any] = {}
    at = _token(text, _opened(text, at))
    while text[at : at + 1] != "}":
        key, at = _key(text, at)
        if key in found:
            raise ValueError(f"the key {key!r:.80} stands twice")
        if inside is None and key in until:
            return found, None
        end: int | None
        if inside is not None and key == inside:
            found[key], end = _object(text, at, None, until)
        else:
            found[key], end = _DECODER.raw_decode(text, at)
        if end is None:
            return found, None
        at = _next(text, end)
    return found, at + 1


def _opened(text: str, at: int) -> int:
    """The place after the bracket that opens an object."""
    if text[at : at + 1] != "{":
        raise JSONDecodeError("Expecting an object", text, at)
    return at + 1


def _key(text: str, at: int) -> tuple[str, int]:
    """The key that stands here, and where its value begins."""
    if text[at : at + 1] != '"':
        raise JSONDecodeError("Expecting a key", text, at)
    key, at = scanstring(text, at + 1, True)
    at = _token(text, at)
    if text[at : at + 1] != ":":
        raise JSONDecodeError("Expecting ':'", text, at)
    return key, _token(text, at + 1)


def _next(text: str, at: int) -> int:
    """Where the next key stands after a value, or the bracket that closes the object."""
    at = _token(text, at)
    if text[at : at + 1] == ",":
        return _token(text, at + 1)
    if text[at : at + 1] != "}":
        raise JSONDecodeError("Expecting ',' or '}'", text, at)
    return at


def _token(text: str, at: int) -> int:
    """Where the next thing that is no white space stands."""
    found = WHITESPACE.match(text, at)
    return at if found is None else int(found.end())
