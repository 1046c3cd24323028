"""Evaluations: scored from answers, and the same after JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from twinmerge.errors import TwinmergeError
from twinmerge.study.scores import Evaluation, Evaluations, TaskScore
from twinmerge.tasks.bootstrap import Scored, bootstrap_difference, bootstrap_normalised

LABELS = np.array([0, 1, 2, 1])
FOUND = Evaluation.of(
    {
        "toy": Scored("toy", "accuracy", LABELS, np.array([0, 1, -1, 1])),
        "sim": Scored("sim", "pearson", [0.1, 2.5, 3.7], [0.3, 1 / 3, 3.0]),
        "nan": Scored("nan", "f1", [1, 0, 1], [1, 0, np.nan]),
    },
    "nothing given",
    reading="strict",
    routed_right=0.9,
    seconds=1.25,
)


def test_scores_come_from_the_answers() -> None:
    assert FOUND.per_task["toy"] == TaskScore("toy", "accuracy", 0.75, 4) and FOUND.rows == 10
    assert FOUND.scores["nan"] == pytest.approx(2 / 3)


def test_json_round_trip_is_exact_and_standard() -> None:
    text = FOUND.to_json(indent=1)
    again = Evaluation.from_json(text.encode())
    assert again == FOUND and again.to_json(indent=1) == text
    assert np.array_equal(again.predictions["nan"].predictions, [1, 0, np.nan], equal_nan=True)
    assert again.predictions["toy"].predictions.dtype.kind == "i"
    assert json.loads(text, parse_constant=pytest.fail)["predictions"]["nan"]["predictions"] == [1.0, 0.0, None]
    bare = Evaluation.of({}, "task given")
    assert Evaluation.from_json(bare.to_json()) == bare != FOUND


def test_tables_are_shares_and_data_are_the_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 3 of 4 right, and 2 of 4; the expert has all right in the first task and half in the second."""
    one = np.ones(4)
    answers = {"a": Scored("a", "accuracy", one, [1, 1, 1, 0]), "b": Scored("b", "accuracy", one, [1, 1, 0, 0])}
    own = {"a": Scored("a", "accuracy", one, one), "b": Scored("b", "accuracy", one, [1, 1, 0, 0])}
    experts = Evaluation.of(own, "task given")
    found = Evaluations(
        [Evaluation.of(answers, "nothing given", "strict", routed_right=0.9)], "m", "test", False, experts
    )
    assert found.to_csv() == 'task,"nothing given, strict"\na,0.75\nb,0.5\n'
    pandas = SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert found.to_pandas() == ([["a", 0.75], ["b", 0.5]], ["task", "nothing given, strict"])
    rows = [line.strip("| ").split(" | ") for line in found.to_markdown().splitlines()[2:]]
    expected = [["a", "0.75"], ["b", "0.5"], ["mean", "0.625"], ["normalised", "0.875"], ["routed right", "0.9"]]
    assert rows == expected and found.normalised() == [87.5]
    assert all(" & ".join(row) in found.to_latex() and row[1] in found._repr_html_() for row in expected)
    assert Evaluations([found[0]], "m", "test", False, None).to_csv() == found.to_csv()


def test_normalised_with_intervals() -> None:
    def evaluation(right: int) -> Evaluation:
        return Evaluation.of({"t": Scored("t", "accuracy", np.ones(100), np.arange(100) < right)}, "head given")

    model, other, experts = evaluation(60), evaluation(45), evaluation(90)
    assert model.normalised(experts) == pytest.approx(100 * 60 / 90)
    assert model.interval(experts) == bootstrap_normalised(model.predictions, experts.predictions)
    assert model.difference(other, experts, 500, 1) == bootstrap_difference(
        model.predictions, other.predictions, experts.predictions, 500, 1
    )


@pytest.mark.parametrize(
    "change, said",
    [
        ({"kind": "twin"}, "no evaluation"),
        ({"version": 2}, "version 2, this release reads version 1"),
        ({"setting": "task"}, "setting is 'task': give one of task given, head given, nothing given"),
        ({"reading": "loose"}, "reading is 'loose'"),
        ({"rows": None}, "wrong type"),
        ({"per_task": {"toy": {"task": "toy"}}}, "no field 'metric'"),
        ({"predictions": {"toy": {"metric": "accuracy", "labels": [1], "predictions": []}}}, "Task 'toy': predictions"),
    ],
)
def test_wrong_json_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(TwinmergeError, match=said):
        Evaluation.from_json(json.dumps({**json.loads(FOUND.to_json()), **change}))
    with pytest.raises(TwinmergeError, match="is no JSON"):
        Evaluation.from_json("{")


def test_needs_no_torch() -> None:
    code = "import sys, twinmerge.study.scores; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
