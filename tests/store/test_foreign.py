"""Files that somebody else made: links, pipes, devices, giants, and JSON that wants to hurt."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.store.foreign import check_settings, find, lines_of, parse_json, read_bytes, read_json, read_text


def made(folder: Path, kind: str) -> None:
    """Something of that kind at `folder / "x.json"`."""
    file = folder / "x.json"
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.json").write_text("{}")
    if kind == "link out":
        file.symlink_to(outside / "secret.json")
    elif kind == "relative link out":
        file.symlink_to("../outside/secret.json")
    elif kind == "link over a link":
        (folder / "way").symlink_to(outside)
        file.symlink_to("way/secret.json")
    elif kind == "self-link":
        file.symlink_to(file)
    elif kind == "broken link":
        file.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "link to a pipe":
        os.mkfifo(folder / "pipe")
        file.symlink_to("pipe")
    elif kind == "link to a device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    elif kind == "socket":
        here = os.getcwd()
        os.chdir(folder)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind("x.json")
        os.chdir(here)


SAYS = {
    "link out": "is a link to .*secret.json, outside its folder",
    "relative link out": "is a link to .*secret.json, outside its folder",
    "link over a link": "is a link to .*secret.json, outside its folder",
    "self-link": "cannot be followed: Too many levels of symbolic links",
    "broken link": "cannot be followed: No such file",
    "pipe": "is a pipe, where a file is expected",
    "link to a pipe": "is a pipe, where a file is expected",
    "link to a device": "is a link to /dev/zero, outside its folder",
    "folder": "is a folder, where a file is expected",
    "socket": "is a socket, where a file is expected",
}


@pytest.mark.parametrize(("kind", "says"), SAYS.items())
def test_what_is_no_file_of_the_folder_is_refused_by_name(tmp_path, kind, says):
    folder = tmp_path / "theirs"
    folder.mkdir()
    made(folder, kind)
    with pytest.raises(TwinmergeError, match=f"x.json {says}"):
        find(folder, "x.json")
    if kind != "folder":
        with pytest.raises(TwinmergeError, match=f"x.json {says}"):
            check_settings(folder)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "folder", "self-link", "broken link"])
def test_a_file_that_the_user_names_is_never_waited_for(tmp_path, kind):
    folder = tmp_path / "theirs"
    folder.mkdir()
    made(folder, kind)
    for read in (read_bytes, read_json, lambda file: list(lines_of(file))):
        with pytest.raises(TwinmergeError, match="x.json (is|cannot be read: )"):
            read(folder / "x.json")


def test_links_inside_and_of_the_hub_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    (snapshot / "heads" / "a").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("{}")
    (snapshot / "x.json").symlink_to("../../blobs/1")
    (snapshot / "heads" / "a" / "y.json").symlink_to("../../../../blobs/1")
    (snapshot / "z.json").symlink_to("x.json")
    (tmp_path / "link").symlink_to(snapshot)
    for home in (snapshot, tmp_path / "link"):
        assert find(home, "x.json") == home / "x.json" and find(home, "z.json") and find(home, "heads/a/y.json")
        assert find(home / "heads" / "a", "y.json")
    (blobs / "2").symlink_to("/etc/hostname")
    (snapshot / "w.json").symlink_to("../../blobs/2")
    with pytest.raises(TwinmergeError, match=r"w.json is a link to /etc/hostname, outside"):
        find(snapshot, "w.json")


@pytest.mark.parametrize("name", ["a", "a" * 300, "a\0b", "\ud800", "x.txt/y"])
def test_nothing_of_that_name(tmp_path, name):
    (tmp_path / "x.txt").write_text("")
    assert find(tmp_path, name) is None


def test_templates_in_a_folder_below(tmp_path):
    below = tmp_path / "additional_chat_templates"
    below.mkdir()
    (below / "a.jinja").symlink_to("/etc/hostname")
    with pytest.raises(TwinmergeError, match=r"a.jinja is a link to /etc/hostname"):
        check_settings(tmp_path)
    below.rename(tmp_path / "elsewhere")
    below.symlink_to("elsewhere")
    with pytest.raises(TwinmergeError, match="additional_chat_templates is a link"):
        check_settings(tmp_path)


def test_giants_are_refused_by_their_size(tmp_path):
    for name in ("tokenizer.json", "a.jinja", "tokenizer.model", "config.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        with (folder / name).open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(TwinmergeError, match=f"{name} has {1 << 40} bytes, more than the 64000000"):
            check_settings(folder)
        with pytest.raises(TwinmergeError, match=f"{name} has {1 << 40} bytes, more than the 32000000"):
            read_json(folder / name)
    (tmp_path / "trainer_state.json").touch()
    os.truncate(tmp_path / "trainer_state.json", 1 << 30)  # a long run's; nobody reads it
    check_settings(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice"),
        ("[" * 100_000, "nested deeper than 64 brackets"),
        ("[" * 65 + "]" * 65, "nested deeper than 64 brackets"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested deeper than 64 brackets"),
        ("[1e999999]", "the number 1e999999, which no float can hold"),
        ("[-1e400]", "the number -1e400, which no float can hold"),
        (f"[{'9' * 1_000_000}]", "a whole number of 1000000 digits"),
        (f"[{'9' * 41}]", "a whole number of 41 digits"),
        ("[NaN]", "it holds NaN, which is no JSON"),
        ("[-Infinity]", "it holds -Infinity, which is no JSON"),
        ('["\\ud800"]', "half of a surrogate pair"),
        ('{"\\uDC00": 1}', "half of a surrogate pair"),
        (b'["\xff"]', "invalid start byte"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b"\xef\xbb\xbf{}", "Expecting value"),
        ("[1,]", "Expecting value"),
        ("", "Expecting value"),
        ("{}{}", "Extra data"),
        ("[" + "[],[],[]," * 300_000 + "1]", "items, more than the 600000"),
        (" " * 33_000_000, "33000000 bytes, more than the 32000000"),
    ],
)
def test_json_that_is_refused(text, says):
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=says):
        parse_json(text)
    assert time.perf_counter() - began < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_configs_may_hold_infinity():
    found = parse_json(
        '{"time_step_limit": [0.0, Infinity], "model_max_length": 1000000000000000019884624838656}', finite=False
    )
    assert found == {"time_step_limit": [0.0, float("inf")], "model_max_length": 1000000000000000019884624838656}


@settings(max_examples=40)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**39), 10**39)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda x: st.lists(x) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), x),
    )
)
def test_what_is_not_refused_is_what_json_says(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False)):
        assert parse_json(text) == parse_json(text.encode()) == value


@pytest.mark.parametrize(("text", "kind"), [("[]", "a list"), ('"a"', "a text"), ("null", "null"), ("3", "a number")])
def test_no_object(tmp_path, text, kind):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(
        TwinmergeError, match=f"x.json cannot be read: it holds {kind}, expected an object. Restore it."
    ):
        read_json(tmp_path / "x.json")


def test_text_is_utf_8(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(TwinmergeError, match="x is not UTF-8: .*Mend it."):
        read_text(tmp_path / "x", advice="Mend it.")


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))))
def test_only_line_feeds_end_lines(tmp_path_factory, lines):
    file = tmp_path_factory.getbasetemp() / "lines"
    file.write_bytes("".join(f"{line}\n" for line in lines).encode())
    assert [(i, line.decode()) for i, line in lines_of(file)] == [(i, f"{line}\n") for i, line in enumerate(lines, 1)]


def test_a_line_without_end(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TwinmergeError, match="x, line 1 is longer than 16000000 bytes"):
        list(lines_of(tmp_path / "x"))


def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"a" * 11)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 5, *real(fd)[7:])))
    with pytest.raises(TwinmergeError, match="has 11 bytes, more than the 10"):
        read_bytes(tmp_path / "x", 10)


@pytest.mark.parametrize("key", ["vocab", "merges", "gguf_file"])
def test_a_tokenizer_that_reads_files_of_the_user(tmp_path, key):
    """transformers opens `vocab` of a tokenizer_config.json wherever it leads."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", key: "/etc/hostname"})
    )
    with pytest.raises(TwinmergeError, match=f"tokenizer_config.json names a file, '/etc/hostname', as its '{key}'"):
        check_settings(tmp_path)
