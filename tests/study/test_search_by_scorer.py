"""A search by a function of one's own: what it is given, what it may give, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import twinmerge as tm
from twinmerge.errors import TwinmergeError
from twinmerge.study.search import Search

GRID = {"scale": [0.1, 0.5, 1.0], "b.weights": [0.0, 1.0]}
X = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}


@pytest.fixture
def merge(models: Any) -> tm.Merge:
    return tm.merge("task_arithmetic", *models, progress=False)


def loss(model: nn.Module) -> float:
    with torch.no_grad():
        return -float(model(X).square().mean())


def by_hand(models: Any, scale: float, b: float) -> float:
    """θ0 + scale · (a's change + b · b's change), by plain arithmetic."""
    base, experts = models
    made = nn.Linear(3, 2)
    with torch.no_grad():
        for name, p in made.named_parameters():
            first, *others = (model.get_parameter(name) for model in (base, *experts.values()))
            p.copy_(first + scale * sum(w * (each - first) for w, each in zip((1.0, b), others, strict=True)))
    return loss(made)


def test_each_point_of_the_grid_is_scored_as_it_was_merged(models: Any, merge: tm.Merge, tmp_path: Path) -> None:
    found = tm.search(merge, grid=GRID, scorer=loss, out=tmp_path / "s.json", progress=False)
    points = [(scale, b) for scale in GRID["scale"] for b in GRID["b.weights"]]
    assert [tuple(t.parameters.values()) for t in found.trials] == points
    expected = [by_hand(models, *point) for point in points]
    assert [t.score for t in found.trials] == pytest.approx(expected, rel=1e-4)
    assert tuple(found.best.parameters.values()) == points[expected.index(max(expected))]
    assert (found.split, found.rows) == (None, 0) and "6 trials by a scorer, best -" in repr(found)
    assert json.loads((tmp_path / "s.json").read_text()) == found.to_dict() and found.to_dict()["split"] is None
    assert found.to_csv().startswith("scale,b.weights,score\n0.1,0.0,")
    best = merge.varied(**found.best.parameters).load()
    assert loss(best) == found.best.score


def test_scores_by_name_are_averaged_and_kept(merge: tm.Merge) -> None:
    found = tm.search(merge, candidates=[{"scale": 0.5}], scorer=lambda model: {"one": 1, "two": 0.25}, progress=False)
    assert found.best.score == 0.625 and found.best.scores == {"one": 1.0, "two": 0.25}
    assert found.to_markdown().splitlines()[0] == "| scale | score | one | two |"


@pytest.mark.parametrize("kind", [torch.tensor, np.array, np.float32, lambda x: torch.nn.Parameter(torch.tensor(x))])
def test_numbers_of_other_libraries_become_pythons_own(merge: tm.Merge, kind: Any) -> None:
    grid = {"scale": np.linspace(0.25, 0.5, 2), "weights": [[np.float64(1.0), torch.tensor(0.5)]]}
    found = tm.search(merge, grid=grid, scorer=lambda model: kind(0.75), progress=False)
    assert repr(found.best.parameters) == "{'scale': 0.25, 'weights': [1.0, 0.5]}"
    assert repr([found.best.score, *found.to_dict()["best"].values()]) == "[0.75, 0.25, [1.0, 0.5]]"
    named = tm.search(merge, grid={"scale": [1]}, scorer=lambda model: {"a": kind(0.5), "b": 1}, progress=False)
    assert repr(named.best.scores) == "{'a': 0.5, 'b': 1.0}" and named.best.score == 0.75


@pytest.mark.parametrize(
    "given, says",
    [
        ({"scorer": lambda model: "good"}, "The scorer gives 'good'"),
        ({"scorer": lambda model: {}}, "The scorer gives .*Let it give a number, or a mapping"),
        ({"scorer": lambda model: {"a": None}}, "Let it give a number, or a mapping"),
        ({"scorer": lambda model: math.nan}, "The scorer gives nan for .'scale': 0.1"),
        ({"scorer": lambda model: {"a": math.inf}}, "The scorer gives inf"),
        ({"scorer": 3}, "search takes scorer as"),
        ({}, "needs a suite or a scorer of your own, and neither is given"),
        ({"scorer": loss, "suite": "suite/"}, "Both a suite and a scorer are given"),
        ({"scorer": lambda model: torch.ones(2)}, "The scorer gives a Tensor"),
    ],
)
def test_what_is_no_score_is_refused(merge: tm.Merge, given: dict[str, Any], says: str) -> None:
    with pytest.raises(TwinmergeError, match=says):
        tm.search(merge, grid={"scale": [0.1]}, progress=False, **given)


@pytest.mark.parametrize(
    "gives, says",
    [
        ([{"a": 1.0}, {"b": 2.0}], "The scorer gives b for .*, and gave a for"),
        ([1.0, {"a": 2.0}], "gives a for .*, and gave a number alone for"),
        ([{"a": 1.0}, 2.0], "gives a number alone for .*, and gave a for"),
        ([{"score": 1.0}], "calls a score 'score'"),
        ([{"scale": 1.0}], "calls a score 'scale'"),
    ],
)
def test_scores_of_other_things_are_not_compared(merge: tm.Merge, gives: list[Any], says: str) -> None:
    given = iter(gives)
    with pytest.raises(TwinmergeError, match=says):
        tm.search(merge, grid={"scale": [0.1, 0.5]}, scorer=lambda model: next(given), progress=False)


def test_what_a_scorer_raises_is_the_callers(merge: tm.Merge) -> None:
    with pytest.raises(ZeroDivisionError):
        tm.search(merge, grid={"scale": [0.1]}, scorer=lambda model: 1 / 0, progress=False)
    assert isinstance(tm.search(merge, grid={"scale": [0.1]}, scorer=loss, progress=False), Search)
