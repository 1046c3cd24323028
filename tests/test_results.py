"""What public calls give, as text: JSON that every reader takes, rows that LaTeX keeps, files or a sentence."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twinmerge.cli.common import print_json
from twinmerge.errors import OutputError
from twinmerge.results import Listing, Record, Rows, json_text, plain

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


@pytest.mark.parametrize("write", ["to_csv", "to_latex"])
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
