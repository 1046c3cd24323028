"""Texts that somebody wrote: strictly read, and never at a price."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.recipes.documents import read_recipe
from twinmerge.recipes.plain_data import BYTES, documents_in, from_json, from_yaml, read_text, to_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, after in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
HUGE = {
    "bomb": BOMB,
    "bomb of mappings": BOMB.replace("[", "{x: [").replace("]", "]}"),
    "deep flow": "[" * 200_000,
    "deep flow of mappings": "{a: " * 60_000,
    "deep block": "\n".join(" " * i + "a:" for i in range(700)),
    "deep dashes": "- " * 100_000,
    "long": "- a\n" * 60_000,
    "many keys": "".join(f"k{i}: 1\n" for i in range(25_000)),
    "many anchors": "".join(f"- &a{i} x\n" for i in range(20_000)),
    "itself": "a: &a\n  b: *a",
    "merges": "b: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(20)),
    "too large": "a: " + "x" * BYTES["yaml"],
    "number": "a: " + "9" * 200_000,
    "comments": "#\n" * 100_000,
}
HUGE_JSON = {
    "deep": "[" * 2_000_000,
    "deep and closed": "[" * 60 + "]" * 60,
    "deep mapping": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "long": "[" + "1," * 500_000 + "1]",
    "number": '{"a": ' + "9" * 200_000 + "}",
    "too large": '"' + "x" * BYTES["json"] + '"',
}


TAKE_HALF_A_SECOND = {"long", "many keys", "many anchors", "comments", "too large"}


def cases() -> list[Any]:
    slow = pytest.mark.slow
    found = [("yaml", name, text) for name, text in HUGE.items()] + [
        ("json", name, text) for name, text in HUGE_JSON.items()
    ]
    return [
        pytest.param(
            kind, text, id=f"{kind} {name}", marks=slow if kind == "yaml" and name in TAKE_HALF_A_SECOND else ()
        )
        for kind, name, text in found
    ]


@pytest.mark.parametrize("kind, text", cases())
def test_huge_work_is_refused_at_once(tmp_path, kind, text):
    file = tmp_path / f"recipe.{kind}"
    file.write_text(text)
    begun = time.process_time()
    with pytest.raises(TwinmergeError, match="cannot be read|is no mapping|more than the") as caught:
        read_recipe(file)
    assert time.process_time() - begun < 1.5  # a second where nobody else is at work
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("text", [BOMB, "[" * 2_000, HUGE["merges"]], ids=["bomb", "deep", "merges"])
def test_nor_does_it_take_memory(text):
    tracemalloc.start()
    with pytest.raises(TwinmergeError):
        from_yaml(text, "it")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    "text, said",
    [
        ("a: 1\nb: 2\na: 3", "line 3 has the key 'a' a second time"),
        ("a: {b: 1, b: 1}", "line 1 has the key 'b' a second time"),
        ("1: a", "line 1 has the key 1, which is no text"),
        ("yes: a", "line 1 has the key True, which is no text"),
        ("? [a]\n: b", "which is no text"),
        ("a: !!python/object/apply:os.getcwd []", "line 1 has the tag 'tag:yaml.org,2002:python"),
        ("a: !!binary aGk=", "line 1 has the tag"),
        ("a: !mine {b: 1}", "line 1 has the tag '!mine'"),
        ("a: !!int x", "line 1 has 'x', which is no int"),
        ("a: {<<: [{b: 1}, 2]}", "line 1 has a merge key .<<. of what is no mapping"),
        ("a: {<<: {b: 1}, b: 2, b: 3}", "line 1 has the key 'b' a second time"),
        ("a: *x", "undefined alias"),
        ("a: [", "line 1, expected the node content"),
        ("a: b\n---\na: c", "several documents"),
        ('a: "\\0"', "has letters that no name or path has"),
        ('a: "\\ud800"', "has letters that no name or path has"),
        ("a: \x07", "unacceptable character"),
    ],
)
def test_yaml_is_strict(text, said):
    with pytest.raises(TwinmergeError, match=f"^it cannot be read: .*{said}") as caught:
        from_yaml(text, "it")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' stands twice"),
        ('{"a": NaN}', "it holds NaN, which is no JSON"),
        ('{"a": -Infinity}', "it holds -Infinity, which is no JSON"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ('{"a": 1', "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_json_is_strict(text, said):
    with pytest.raises(TwinmergeError, match=said):
        from_json(text, "it")


@pytest.mark.parametrize(
    "text, want",
    [
        ("1e-9", 1e-9),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("+2", 2),
        ("1.", 1.0),
        ("1:30", "1:30"),
        ("190:20:30.15", "190:20:30.15"),
        ("010", "010"),
        ("0o7", "0o7"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("off", False),
        ("~", None),
        ("'1'", "1"),
        ("", None),
    ],
)
def test_what_is_a_number(text, want):
    found = from_yaml(f"a: {text}", "it")["a"]
    assert found == want and type(found) is type(want)


TEXTS = st.one_of(
    st.sampled_from(
        ["1e5", "1:30", "010", "1_0", "yes", "~", "null", "", "<<", "=", ".inf", "0x1f", "2024-01-01", "- a", "a: b"]
    ),
    st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=12),
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        TEXTS.filter(lambda key: key != "<<"), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4
    )
)
def test_what_is_written_is_read_back_by_us_and_by_others(data: dict[str, Any]):
    text = to_yaml(data)
    assert repr(from_yaml(text, "it")) == repr(data)
    assert repr(yaml.safe_load(text)) == repr(data)


def read_plain(file):
    return documents_in(read_text(file, "recipe"), file.suffix == ".json", f"The recipe {file}")[0]


def test_files(tmp_path):
    (tmp_path / "a.yaml").write_bytes("\ufeffa: é\r\nb: 1\r\n".encode())
    assert read_plain(tmp_path / "a.yaml") == {"a": "é", "b": 1}
    (tmp_path / "a.json").write_bytes('\ufeff{"a": "é",\t"b": 1}'.encode())
    assert read_plain(tmp_path / "a.json") == {"a": "é", "b": 1}
    for name in ("gone.yaml", ".", "a\0b", "x" * 300):
        with pytest.raises(TwinmergeError, match="cannot be read: |is a folder, where a file is expected"):
            read_plain(tmp_path / name)
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TwinmergeError, match="a.yaml cannot be read: 'utf-8' codec"):
        read_plain(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3, z: 4}",
        "a: &a {x: 1, y: 2}\nb: {y: 3, <<: *a}",
        "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b], z: 1}\nd: {<<: [*b, *a]}",
        "a: &a {x: 1}\nb: &b {<<: *a, y: {<<: *a}}\nc: {<<: *b}",
        "a: {<<: []}\nb: {<<: {x: [1, 2]}}",
    ],
)
def test_merge_keys_are_those_of_yaml(text):
    """Against PyYAML: what a mapping says itself wins, then the first of several."""
    assert from_yaml(text, "it") == yaml.safe_load(text)


def test_a_merge_key_in_quotes_is_a_key():
    assert from_yaml("{'<<': 1}", "it") == {"<<": 1}
