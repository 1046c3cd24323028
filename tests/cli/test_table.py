"""Tables fit the terminal: names are cut in the middle, numbers stay whole."""

from __future__ import annotations

from typing import Any

import pytest

from twinmerge.cli.table import cut, print_table

NAMES = [f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 12)]
TABLES = {
    "names": (["tensor", "change", "cosine"], [[name, "0.1234", "-0.99999"] for name in NAMES]),
    "prose": (["name", "meaning"], [["a", "one word after the other " * 6], ["b" * 60, "few words"]]),
    "many numbers": (["task", *(f"scale {i}" for i in range(30))], [["sst2", *(f"9{i}.5 *" for i in range(10, 40))]]),
    "long titles": (["expert", "share of the squared norm of all", "rank"], [["a", "12.5 %", "3"]]),
    "nothing": (["task", "score"], []),
    "one word": (["what"], [["x" * 200]]),
}


@pytest.mark.parametrize("width", [50, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_no_wider_than_the_terminal_and_keeps_its_numbers(
    name: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    columns, rows = TABLES[name]
    print_table("A title", columns, rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    cells = [cell for row in rows for cell in row]
    assert all(f" {cell} " in out for cell in cells if cell[:1] in "-0123456789")
    words = set(out.replace("│", " ").replace("┃", " ").split())
    assert all(set(cell.split()) <= words for cell in cells if " " in cell and cell[0].isalpha())
    assert all(set(title.split()) <= words for title in columns)
    layers = [f"{number}{mark}" for number in ("3", "12") for mark in "…."]
    assert name != "names" or sum(each in out for each in layers) >= 2


def test_a_wide_terminal_shows_names_in_full(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_table("", *TABLES["names"])
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES)


@pytest.mark.parametrize("width", range(6, 44))
@pytest.mark.parametrize("name", [*NAMES, "no_dots_in_this_name_at_all", "ends.with.9", "0.1.2.3.4.5.6.7.8.9.10.11.12"])
def test_a_cut_name_is_short_enough_and_keeps_its_end_and_its_layer(name: str, width: int) -> None:
    short = cut(name, width)
    assert len(short) <= max(width, 0) and (short == name) == (len(name) <= width)
    assert name.endswith(short.rpartition("…")[2]) and name.startswith(short.partition("…")[0])
    if width >= 12 and name in NAMES:
        assert name.split(".")[2] in short and short.endswith("weight"[-(width // 3) :])


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\u202ec\x9bd"
    print_table("", ["text", "n"], [[hostile, "1"]])
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(shown) and "a\ufffd[2J" in shown
    print_table("", ["text", "n"], [[hostile, "1"]], short=True)
    assert "\x1b" not in capsys.readouterr().out
