"""What public calls give, as text: JSON that every reader takes, rows that LaTeX keeps, files or a sentence."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from rich.cells import cell_len

from twinmerge.cli.common import print_json
from twinmerge.errors import OutputError
from twinmerge.results import WIDTH, Described, Listing, Record, Rows, json_text, plain

ODD: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": [math.inf, -math.inf, {"a": math.nan}],
    "NumPy": [np.float64("nan"), np.float32(0.5), np.int64(3), np.bool_(True), np.arange(3)],
    "torch": torch.tensor(3.0),
    "sets": {1, "a", None, 2.5, (1, "b"), (1, 2), ("b", 1)},
    "frozen": frozenset({"b", "a"}),
    "paths": Path("x") / "y",
    "records": Record(a=math.nan, b=Rows([Record(c=math.inf)])),
    "keys": {1: 2, None: 3, Path("p"): 4},
    "bytes": b"x",
    "complex": 1 + 2j,
}


def strict(text: str) -> Any:
    """By the letter of RFC 8259, which knows no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_json_is_json_whatever_is_in_it(value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = Record(value=value)
    assert strict(found.to_json()) == strict(json_text(found)) == strict(json.dumps(found.to_dict(), allow_nan=False))
    print_json({"value": value})
    assert strict(capsys.readouterr().out) == found.to_dict()


def test_numbers_that_json_has_not_are_null_there_and_stay_in_tables() -> None:
    assert plain([math.nan, np.float32("inf"), 0.5, 2]) == [None, None, 0.5, 2]
    found = Rows([{"a": math.nan, "b": np.float64("inf"), "c": None}])
    assert found.to_csv() == "a,b,c\nnan,inf,\n"
    assert found.to_dict() == [{"a": None, "b": None, "c": None}]


def test_a_set_of_one_kind_is_in_its_order() -> None:
    assert plain({3, 1, 2}) == [1, 2, 3] and plain({"b", "a"}) == ["a", "b"] and plain({2, "a", 1.5}) == ["a", 1.5, 2]


def cells(tabular: str) -> list[list[str]]:
    """The rows as LaTeX reads them: `\\\\` takes a star and a length in brackets, after any blanks, for its own."""
    body = re.sub(r"\\begin\{tabular\}\{.*?\}|\\end\{tabular\}", "", tabular)
    rows = re.split(r"\\\\\s*(?:\*\s*)?(?:\[[^\]]*\])?", body)
    return [
        [c.strip() for c in re.split(r"(?<!\\)&", row.replace("\\hline", ""))]
        for row in rows
        if row.replace("\\hline", "").strip()
    ]


@pytest.mark.parametrize(
    "name", ["[2mm]", "*x", "[", "*", " [2mm]", "*[1mm] y", "plain", "a\nb", "a\n\nb", "<|>", "a\\b"]
)
def test_no_row_is_taken_for_an_argument_of_the_one_above(name: str) -> None:
    table = Rows([{"name": "a", "value": 1.0}, {"name": name, "value": 2.0}, {"name": "z", "value": 3.0}])
    found = cells(table.to_latex())
    assert [row[1] for row in found] == ["value", "1", "2", "3"] and len(found[2][0]) >= len(name.strip())
    assert "\n\n" not in table.to_latex() and not set("<|>") & set(table.to_latex())


def test_a_listing_and_titles_too() -> None:
    found = Listing({"[x]": {"[y]": "*", "z": "["}})
    assert [len(row) for row in cells(found.to_latex())] == [3, 3]


@pytest.mark.parametrize("write", ["to_csv", "to_markdown", "to_latex"])
def test_a_file_that_cannot_be_written_is_a_sentence(write: str, tmp_path: Path) -> None:
    table = Rows([{"name": "a"}])
    for place in (tmp_path / "missing" / "t.csv", tmp_path):
        with pytest.raises(OutputError, match=f"{re.escape(str(place))} cannot be written: .*Name a file in a folder"):
            getattr(table, write)(place)
    text = getattr(table, write)(tmp_path / "t")
    assert (tmp_path / "t").read_text(encoding="utf-8") == text


def test_csv_is_read_as_it_was_written() -> None:
    rows = [{"name": 'a,"b"\nc', "value": 0.1}, {"name": "[x]", "value": None}]
    assert list(csv.reader(io.StringIO(Rows(rows).to_csv()))) == [["name", "value"], ['a,"b"\nc', "0.1"], ["[x]", ""]]


STRANGE = [
    "a|b", "*x*", "_y_", "layers.0.q_proj", "__init__", "`code`", "<b>&amp;</b>", "[a](b)", "![i](j)", "~~no~~", "\\|",
    "a\\", "\\*", "&lt;", "$x$", "", " ", "a\nb", "# no title", "- no list", "1. none", "\x00\x1b[1m", "\ud800", "é 日本 🤗",
    'x"y\'z', "</td></table>", "http://x.y", "a  b",
]  # fmt: skip


def lost(text: str) -> str:
    """With the mark of what is lost in the place of what no page may hold."""
    return re.sub("[\x00-\x08\x0b-\x1f\ud800]", "\ufffd", text)


def test_a_markdown_table_is_read_as_it_was_written() -> None:
    """By markdown-it, which is a parser of CommonMark with GitHub's tables."""
    table = Rows([{"na|me": name, "value": 0.5} for name in STRANGE])
    tokens = MarkdownIt("commonmark").enable("table").parse(table.to_markdown())
    found = [token for token in tokens if token.type == "inline"]
    assert all(len(token.children) <= 1 and {c.type for c in token.children} <= {"text"} for token in found)
    cells = [token.children[0].content if token.children else "" for token in found]
    blank = [" ".join(lost(name).split()) for name in STRANGE]
    assert cells[::2] == ["na|me", *blank] and cells[1::2] == ["value", *["0.5"] * len(STRANGE)]
    sides = [token.attrs.get("style") for token in tokens if token.type == "td_open"]
    assert sides == [None, "text-align:right"] * len(STRANGE)


def test_a_page_is_well_formed_whatever_is_in_it() -> None:
    """By a parser of XML, which forgives nothing; no colour is set, so light and dark pages keep theirs."""
    page = Rows([{"<na&me>": name, "value": 1.5} for name in STRANGE])._repr_html_()
    root = ElementTree.fromstring(page)
    assert [cell.text for cell in root.iter("th")] == ["<na&me>", "value"]
    read = [row[0].text or "" for row in root.find("tbody")]
    assert read == [lost(name) for name in STRANGE] and "color" not in page and "background" not in page


def test_every_result_has_every_form() -> None:
    found = Record(a_b=0.123456, c="x | y")
    assert found.to_csv() == "what,value\na_b,0.123456\nc,x | y\n"
    assert found.to_markdown() == "| what | value |\n| --- | --- |\n| a_b | 0.1235 |\n| c | x \\| y |\n"
    assert cells(found.to_latex()) == [["what", "value"], ["a\\_b", "0.1235"], ["c", r"x \textbar{} y"]]
    assert Rows().to_markdown() == "|  |\n|  |\n"


def test_what_holds_much_prints_in_lines_that_fit() -> None:
    class Box(Described):
        def _summary(self) -> str:
            return "of two"

        def _about(self) -> dict[str, Any]:
            return {"names": ", ".join(f"expert-{i}" for i in range(40)), "one": "x" * 200, "none": None, "n": 3}

    lines = str(Box()).splitlines()
    assert lines[0] == "Box(of two)" == repr(Box()) and max(map(len, lines)) <= WIDTH
    assert lines[-2:] == ["  none   -", "  n      3"] and lines[1].startswith("  names  expert-0, ")
    assert all(line.startswith("         ") for line in lines[2:6]) and "".join(lines).count("x") >= 200


@pytest.mark.parametrize("columns, count", [(1, 1), (2, 20), (3, 21), (9, 3), (40, 45)])
@pytest.mark.parametrize("value", [1 / 3, 7, None, True, "a", "漢字" * 60, "x" * 300, "a\nb\tc\x1b[1m", ["a", "b"]])
def test_a_table_that_is_printed_fits(columns: int, count: int, value: Any) -> None:
    found = Rows([{f"column{i}": value for i in range(columns)}] * count)
    first, titles, *lines = str(found).split("\n")
    assert first == repr(found) and titles.split()[0].startswith("column0")
    assert all(cell_len(line) < 80 and line == line.rstrip() for line in (titles, *lines)), lines
    shown = len(titles.split())
    left = [f"{count - 20} more row"] * (count > 20) + [f"{columns - shown} more column"] * (columns > shown)
    assert len(lines) == min(count, 20) + bool(left) and all(each in lines[-1] for each in left)


def test_only_a_table_is_printed_as_one() -> None:
    assert str(Rows()) == repr(Rows()) and str(Record(a=1)) == repr(Record(a=1))
    found = Rows([{"name": "a", "share": 0.123456}, {"name": "bcdef", "share": 12.5}])
    assert str(found) == "Rows(2 rows)\nname    share\na      0.1235\nbcdef    12.5"
    assert "\n" not in repr(found) and "\n" not in f"{[found]}"
