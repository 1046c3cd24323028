"""Hyper-parameters of a static merge, chosen on validation rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from twinmerge.arguments import fits, strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import UsageError
from twinmerge.models.transformers_class import position_limit
from twinmerge.study.evaluate import StaticRunner, evaluate, tokenizer_folder
from twinmerge.study.scores import Evaluation
from twinmerge.tasks.encode import TextEncoder
from twinmerge.tasks.suite import Task

WEIGHTS = 51
"""Candidates of the Fisher paper's search: 1.00, 0.98, ... 0.00 for the first of two experts, or so many random draws."""


@dataclass(frozen=True)
class Trial:
    """parameters: of the method, and of LiNeS (`lines.b`); score: what is to be large, in per cent; scores: by task, fractions."""

    parameters: dict[str, Any]
    score: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Search:
    """What was tried, in order, and where it was scored. best: the trial of the largest score, the first among equals."""

    method: str
    split: str
    rows: int
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        return max(self.trials, key=lambda trial: trial.score)

    def to_json(self) -> str:
        trials = [{"parameters": t.parameters, "score": t.score, "scores": t.scores} for t in self.trials]
        found = {"kind": "search", "method": self.method, "split": self.split, "rows": self.rows}
        return json.dumps({**found, "best": self.best.parameters, "trials": trials}, indent=1)


def grid(**values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """All combinations; the last parameter varies fastest.

    Example:
        >>> list(grid(scale=[0.1, 0.2], k=[1, 2]))
        [{'scale': 0.1, 'k': 1}, {'scale': 0.1, 'k': 2}, {'scale': 0.2, 'k': 1}, {'scale': 0.2, 'k': 2}]
    """
    for point in product(*values.values()):
        yield dict(zip(values, point, strict=True))


def weightings(experts: Sequence[str], count: int = WEIGHTS, seed: int = 0) -> Iterator[dict[str, float]]:
    """Weights of the experts that add up to 1: for two, an even grid from (1, 0) to (0, 1); for more, draws from the flat
    Dirichlet distribution.

    Source: Matena & Raffel 2022, arXiv 2111.09832, as their code searches.

    Example:
        >>> list(weightings(["a", "b"], 3))
        [{'a.weights': 1.0, 'b.weights': 0.0}, {'a.weights': 0.5, 'b.weights': 0.5}, {'a.weights': 0.0, 'b.weights': 1.0}]
    """
    if count < 2 or len(experts) < 2:
        raise UsageError(
            f"{count} weightings of {len(experts)} experts leave nothing to choose. Ask for at least 2 of at least 2."
        )
    if len(experts) == 2:
        draws = [(1 - i / (count - 1), i / (count - 1)) for i in range(count)]
    else:
        draws = np.random.default_rng(seed).dirichlet(np.ones(len(experts)), count).tolist()
    for draw in draws:
        yield {f"{name}.weights": float(weight) for name, weight in zip(experts, draw, strict=True)}


def check_split(split: str) -> None:
    """Refuse to choose anything on test rows.

    Errors:
        TwinmergeError: a split whose name says that it is for testing.

    Example:
        >>> check_split("test")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: Nothing is chosen on the split 'test': its scores would no longer say anything. \
Choose on validation rows, with --split validation.
    """
    if "test" in split.lower():
        raise UsageError(
            f"Nothing is chosen on the split {split!r}: its scores would no longer say anything. Choose on validation rows, with "
            "--split validation."
        )


@strict
def search(
    merge: Merge,
    suite: str | Path | Mapping[str, Task],
    candidates: Iterable[Mapping[str, Any]],
    *,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    experts: Evaluation | None = None,
    progress: bool = True,
) -> Search:
    """Merge with each candidate's parameters in memory and score it, every task with its own head.

    Args:
        merge: what is merged; candidates override its recipe's parameters.
        suite: task -> data, or a suite's folder; the tasks' names are those of the experts.
        split, limit, seed: the rows that decide, as in `evaluate`.
        experts: their own evaluation on the same rows: the score is then 100 · mean of score / expert's score, else
            100 · mean score.

    Errors:
        TwinmergeError: no candidates, a split for testing, and as `evaluate`.
    """
    check_split(split)
    candidates = list(candidates)
    if not all(fits(candidate, Mapping[str, Any]) for candidate in candidates):
        raise UsageError(
            "candidates are mappings of parameters to values. Write search.grid(scale=[0.1, 0.2]), or [{'scale': 0.1}]."
        )
    if not candidates:
        raise UsageError("There is nothing to choose from. Name values with --grid NAME=A,B,C, or --weightings.")
    for candidate in candidates:  # before the first of them takes its time
        merge.recipe.varied(candidate).make_method()
    if not merge.architecture:  # to run it
        merge = Merge(merge.recipe, merge.progress, architecture=True, device=merge.device)
    encoder: TextEncoder | None = None
    trials, rows = [], 0
    for candidate in tqdm(candidates, "searching", delay=1, leave=False, disable=None if progress else True):
        model = merge.varied(**candidate).headed()
        if encoder is None:
            folder = tokenizer_folder(merge)
            encoder = TextEncoder(folder, positions=position_limit(model.architecture.config))
        found = evaluate(StaticRunner(model, encoder), suite, split, limit, seed, progress=False)[0]
        score = 100 * sum(found.scores.values()) / len(found.scores) if experts is None else found.normalised(experts)
        trials.append(Trial(dict(candidate), score, found.scores))
        rows = found.rows
    return Search(merge.recipe.method_name, split, rows, tuple(trials))
