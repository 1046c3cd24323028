"""Suites: read strictly, drawn without order bias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from twinmerge.errors import TwinmergeError
from twinmerge.tasks.suite import Row, Task, open_suite

GOOD = {"sst2": {"labels": ["neg", "pos"], "metric": "accuracy", "test": 2}, "sick": {"labels": ["n"], "metric": "f1"}}


def suite(
    folder: Path, tasks: Any = GOOD, test: str = '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n'
) -> Path:
    (folder / "tasks.json").write_text(json.dumps(tasks))
    (folder / "sst2").mkdir()
    (folder / "sst2" / "test.jsonl").write_text(test, encoding="utf-8")
    return folder


def test_tasks_and_rows(tmp_path: Path) -> None:
    tasks = open_suite(suite(tmp_path))
    assert list(tasks) == ["sst2", "sick"] and list(open_suite(tmp_path, ["sick"])) == ["sick"]
    assert tasks["sst2"] == Task("sst2", ("neg", "pos"), "accuracy", tmp_path / "sst2")
    assert tasks["sst2"].rows("test") == [Row("a", None, 1), Row("b", None, 0)]


def test_pairs_blank_lines_crlf_line_separators_and_other_fields(tmp_path: Path) -> None:
    lines = '\n{"text": "a\u2028b", "text_pair": "é", "label": 0, "id": 7}\r\n  \n{"text": "", "text_pair": null, "label": 1}'
    task = open_suite(suite(tmp_path, test=lines))["sst2"]
    assert task.rows("test") == [Row("a\u2028b", "é", 0), Row("", None, 1)]


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "test.jsonl, line 2 is no JSON"),
        ("[1]", "test.jsonl, line 2 is no JSON object"),
        ('{"txt": "a", "label": 0}', "line 2 has no field 'text'. Did you mean 'txt'?"),
        ('{"text": "a"}', "line 2 has no field 'label'"),
        ('{"text": 3, "label": 0}', "line 2: field 'text' is 3. Give a string"),
        ('{"text": "a", "text_pair": 1, "label": 0}', "line 2: field 'text_pair' is 1"),
        ('{"text": "a", "label": 2}', "line 2: field 'label' is 2, .*'sst2' has 2 labels. Give an integer from 0 to 1"),
        ('{"text": "a", "label": -1}', "field 'label' is -1"),
        ('{"text": "a", "label": true}', "field 'label' is True"),
        ('{"text": "a", "label": "pos"}', "field 'label' is 'pos'"),
        ('{"text": "\\ud800", "label": 0}', "a text in it has half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    task = open_suite(suite(tmp_path, test=f'{{"text": "a", "label": 1}}\n{line}\n'))["sst2"]
    with pytest.raises(TwinmergeError, match=said):
        task.rows("test")


def test_bytes_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    task = open_suite(suite(tmp_path))["sst2"]
    (tmp_path / "sst2" / "test.jsonl").write_bytes(b'{"text": "\xff", "label": 0}\n')
    with pytest.raises(TwinmergeError, match="line 1 is no JSON"):
        task.rows("test")


def test_missing_short_and_empty_splits(tmp_path: Path) -> None:
    tasks = open_suite(suite(tmp_path))
    with pytest.raises(TwinmergeError, match="no split 'tets', it has test. Did you mean 'test'"):
        tasks["sst2"].rows("tets")
    with pytest.raises(TwinmergeError, match="it has no .jsonl file"):
        tasks["sick"].rows("test")
    (tmp_path / "sst2" / "test.jsonl").write_text('{"text": "a", "label": 1}')
    with pytest.raises(TwinmergeError, match="has 1 rows, but tasks.json states 2"):
        tasks["sst2"].rows("test")
    (tmp_path / "sst2" / "test.jsonl").write_text("\n")
    with pytest.raises(TwinmergeError, match="has no rows"):
        tasks["sst2"].rows("test")
    with pytest.raises(TwinmergeError, match="limit is 0"):
        tasks["sst2"].rows("test", limit=0)


@pytest.mark.parametrize(
    "tasks, said",
    [
        ([], "cannot be read: it holds a list"),
        ({}, "names no tasks"),
        ({"sst2": 1}, "task 'sst2' is 1"),
        ({"sst2": {"labels": ["a"], "metrc": "f1"}}, "no field 'metric'. Did you mean 'metrc'"),
        (
            {"sst2": {"labels": ["a"], "metric": "acuracy"}},
            "field 'metric': No metric 'acuracy'. Did you mean 'accuracy'",
        ),
        ({"sst2": {"labels": ["a"], "metric": 1}}, "No metric 1"),
        ({"sst2": {"labels": [], "metric": "f1"}}, r"field 'labels' is \[\]"),
        ({"sst2": {"labels": ["a", "b", "a"], "metric": "f1"}}, "repeats a"),
        ({"sst2": {"labels": ["a"], "metric": "f1", "test": "2"}}, "field 'test' is '2'"),
        ({"../sst2": {"labels": ["a"], "metric": "f1"}}, "slashes"),
    ],
)
def test_a_broken_tasks_file_is_named(tmp_path: Path, tasks: Any, said: str) -> None:
    with pytest.raises(TwinmergeError, match=said):
        open_suite(suite(tmp_path, tasks))


def test_unknown_suite_and_tasks(tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="tasks.json is missing"):
        open_suite(tmp_path)
    suite(tmp_path)
    with pytest.raises(TwinmergeError, match="no task 'sst'. Did you mean 'sst2'"):
        open_suite(tmp_path, ["sst"])
    with pytest.raises(TwinmergeError, match="each one once"):
        open_suite(tmp_path, ["sst2", "sst2"])
    (tmp_path / "tasks.json").write_text("{")
    with pytest.raises(TwinmergeError, match="cannot be read: Expecting"):
        open_suite(tmp_path)


def test_a_limit_draws_over_the_whole_file_keeps_its_order_and_only_grows(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": str(i), "label": int(i >= 500)}) for i in range(1000))
    tasks = {"sst2": {"labels": ["neg", "pos"], "metric": "accuracy"}}
    task = open_suite(suite(tmp_path, tasks, lines))["sst2"]
    at = [int(row.text) for row in task.rows("test", limit=100)]
    assert len(set(at)) == 100 and at == sorted(at) and 35 < sum(i >= 500 for i in at) < 65
    assert task.rows("test", limit=100) == task.rows("test", 100, 0) != task.rows("test", 100, seed=1)
    assert set(task.rows("test", 100)) < set(task.rows("test", 200))
    assert len(task.rows("test", limit=5000)) == 1000
