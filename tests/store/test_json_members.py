"""The members of an object are those that the json module finds, as far as they are read."""

from __future__ import annotations

import json

import pytest

from twinmerge.store.json_members import members, span

CASES = [
    {},
    {"a": 1},
    {"a": {"b": [1, {"c": "}"}], "long": [0], "d": 2}, "e": '"\\u00e9\\', "f": None},
    {"model": {}, "x": [[], {}, ""]},
    {"model": {"vocab": {'"': 0, "{": 1, "é": 2, "\n": 3}, "merges": [["a", "b"]]}},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("value", CASES)
def test_whole_objects(value: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = f" {json.dumps(value, indent=indent, ensure_ascii=ascii_only)}\n"
    assert members(text, "model", ()) == value and members(text, "none", ()) == value
    for key, inner in value.items():
        found = span(text, key)
        assert found is not None and json.loads(text[slice(*found)]) == inner
    assert span(text, "none") is None


def test_reading_ends_at_what_is_not_wanted() -> None:
    assert members('{"x": 1, "model": {"vocab": {"a": 0}, "merges": no JSON', "model", {"merges"}) == {
        "x": 1,
        "model": {"vocab": {"a": 0}},
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "7", "{", '{"a"', '{"a" 1}', '{"a": 1', '{"a": 1 "b": 2}', '{"a": }', "{a: 1}", '{"a": 1, "a": 2}'),
        *('{"a": {"b": 1, "b": 2}}', '{"m": 1}', '{"m": {"a": 1, "a": 2}}', '{"a": ' + "[" * 100_000),
    ],
)
def test_what_is_no_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        members(text, "m", ())
    if '"m"' not in text and '"a": 2' not in text:
        with pytest.raises(ValueError):  # noqa: PT011
            span(text, "z")
