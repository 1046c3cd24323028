"""`twinmerge search`: what is chosen is what scores best, and nothing is chosen on test rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import twinmerge as tm
from twinmerge.study.evaluate import evaluate
from twinmerge.study.scores import Evaluation
from twinmerge.study.search import grid, weightings


@pytest.fixture(scope="module")
def given(zoo: Any) -> list[str]:
    return [
        "search",
        "--method",
        "task_arithmetic",
        "--base",
        zoo.base,
        *zoo.given,
        "--suite",
        zoo.suite,
        "--split",
        "train",
    ]


def test_the_best_is_the_best_of_separate_merges(command: Any, zoo: Any, given: list[str], tmp_path: Path) -> None:
    ran = command(*given, "--grid", "scale=0.1,0.5,1", "--out", tmp_path / "t.json", "-o", tmp_path / "best", "--json")
    found = ran.json()
    assert found == json.loads((tmp_path / "t.json").read_text())
    assert [t["parameters"] for t in found["trials"]] == [{"scale": 0.1}, {"scale": 0.5}, {"scale": 1}]
    scores = []
    for trial in found["trials"]:
        scale = trial["parameters"]["scale"]
        merge = tm.merge("task_arithmetic", base=str(zoo.base), experts=zoo.experts, scale=scale, progress=False)
        merge.save(tmp_path / f"at {scale}")
        (alone,) = evaluate(tmp_path / f"at {scale}", tm.open_suite(zoo.suite), "train")
        assert trial["scores"] == alone.scores
        scores.append(sum(alone.scores.values()) / 3)
        assert trial["score"] == pytest.approx(scores[-1])
    best = found["trials"][scores.index(max(scores))]["parameters"]
    assert found["best"] == best
    weights = (tmp_path / "best" / "model.safetensors").read_bytes()
    assert weights == (tmp_path / f"at {best['scale']}" / "model.safetensors").read_bytes()
    assert "3 -> " in ran.err


def test_scores_are_shares_of_the_experts_where_they_are_known(
    command: Any, zoo: Any, given: list[str], tmp_path: Path
) -> None:
    alone = [evaluate(zoo.experts[t], {t: task}, "train")[0] for t, task in tm.open_suite(zoo.suite).items()]
    reference = Evaluation.of({t: s for e in alone for t, s in e.predictions.items()}, "task given")
    (tmp_path / "experts.json").write_text(reference.to_json())
    found = command(*given, "--grid", "scale=0.3,1", "--experts", tmp_path / "experts.json", "--json").json()
    for trial in found["trials"]:
        shares = [trial["scores"][t] / reference.scores[t] for t in trial["scores"]]
        assert trial["score"] == pytest.approx(sum(shares) / 3)


def test_table_marks_the_best(command: Any, given: list[str]) -> None:
    ran = command(*given, "--grid", "scale=0.1,0.2", "--limit", 4)
    assert ran.code == 0 and "12 rows" in ran.out and ran.out.count(" * │") == 1


def test_weightings_are_those_of_the_paper() -> None:
    pair = list(weightings(["a", "b"]))
    assert len(pair) == 51 and pair[1] == {"a.weights": pytest.approx(0.98), "b.weights": pytest.approx(0.02)}
    many = list(weightings(["a", "b", "c"], 51, seed=1))
    assert len(many) == 51 and all(sum(w.values()) == pytest.approx(1) and min(w.values()) >= 0 for w in many)
    assert many == list(weightings(["a", "b", "c"], 51, seed=1)) != list(weightings(["a", "b", "c"], 51, seed=2))
    assert len(list(grid(k=[1, 2, 3], scale=[0.1, 0.2]))) == 6


@pytest.mark.parametrize(
    "words, said",
    [
        (["--split", "test", "--grid", "scale=1"], "Nothing is chosen on the split 'test'"),
        (["--split", "my_Test", "--grid", "scale=1"], "Nothing is chosen"),
        ([], "nothing to choose from"),
        (["--grid", "scale="], "is not name=value"),
        (["--grid", "sclae=1,2"], "Did you mean 'scale'"),
        (["--grid", "scale=1", "--experts", "nowhere.json"], "nowhere.json cannot be read: No such file"),
        (["--grid", "scale=1", "--out", "."], "cannot be written"),
        (
            ["--grid", "mood.weights=1,2", "--weightings", "3"],
            "--grid mood.weights and --weightings both choose weights",
        ),
    ],
)
def test_mistakes(command: Any, given: list[str], words: list[str], said: str) -> None:
    ran = command(*given, *words)
    assert ran.code == (3 if "nowhere.json" in words else 2) and said in ran.err and ran.out == ""


def test_a_wrong_last_candidate_is_told_before_the_first_is_tried(
    command: Any, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twinmerge.study.search.evaluate", lambda *_, **__: pytest.fail("a candidate was tried"))
    ran = command(*given, "--grid", "scale=0.1,1:30")
    assert ran.code == 2 and "scale='1:30' is not allowed" in ran.err
