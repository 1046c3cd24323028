"""Hyper-parameters of a static merge, chosen on validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from twinmerge.arguments import fits, shown, strict
from twinmerge.engine.merge import Merge
from twinmerge.errors import UsageError
from twinmerge.models.transformers_class import position_limit
from twinmerge.progress import bar as progress_bar
from twinmerge.progress import log
from twinmerge.recipes.setting import plain_value
from twinmerge.results import Result, Table, cell, plain
from twinmerge.store.output import replace_text
from twinmerge.study.evaluate import StaticRunner, evaluate, tokenizer_folder
from twinmerge.study.scores import Evaluation, check_file
from twinmerge.tasks.encode import TextEncoder
from twinmerge.tasks.suite import Task, open_suite

WEIGHTS = 51
"""Candidates of the Fisher paper's search: 1.00, 0.98, ... 0.00 for the first of two experts, or so many random
draws."""


@dataclass(frozen=True, repr=False)
class Trial(Result):
    """What one candidate reached.

    Attributes:
        parameters: of the method, and of LiNeS (`lines.b`).
        score: what is to be large; a share from 0 to 1 of a suite, or as a scorer of one's own gave it.
        scores: by task, fractions; or what a scorer named.
    """

    parameters: dict[str, Any]
    score: float
    scores: dict[str, float]

    def _summary(self) -> str:
        return ", ".join([f"{self.score:.4g}", *self._shown()])

    def _shown(self) -> list[str]:
        return [f"{name} {cell(value)}" for name, value in self.parameters.items()]


@dataclass(frozen=True, repr=False)
class Search(Table):
    """What was tried, in order, and where it was scored. As a table: a row for each trial.

    Attributes:
        method: by its name.
        split: which rows decided; None where a scorer of one's own did.
        rows: how many; 0 there.
        trials: in their order.
    """

    method: str
    split: str | None
    rows: int
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial of the largest score, the first among equals."""
        return max(self.trials, key=lambda trial: trial.score)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge search --json` prints."""
        found = {"kind": "search", "method": self.method, "split": self.split, "rows": self.rows}
        return {**found, **plain({"best": self.best.parameters, "trials": self.trials})}

    def _summary(self) -> str:
        on = "by a scorer" if self.split is None else f"on {self.split}"
        best = self.best
        score = f"{best.score:.4g}" if self.split is None else f"{100 * best.score:.2f} %"
        return f"{self.method}, {len(self.trials)} trials {on}, best {', '.join([score, *best._shown()])}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.parameters))
        tasks = list(self.trials[0].scores)
        rows = [
            [*(t.parameters.get(name) for name in names), t.score, *(t.scores[task] for task in tasks)]
            for t in self.trials
        ]
        return [*names, "score", *tasks], rows


def grid(**values: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """All combinations; the last parameter varies fastest.

    Example:
        >>> list(grid(scale=[0.1, 0.2], k=[1, 2]))
        [{'scale': 0.1, 'k': 1}, {'scale': 0.1, 'k': 2}, {'scale': 0.2, 'k': 1}, {'scale': 0.2, 'k': 2}]
    """
    for point in product(*values.values()):
        yield dict(zip(values, point, strict=True))


def weightings(experts: Sequence[str], count: int = WEIGHTS, seed: int = 0) -> Iterator[dict[str, float]]:
    """Weights of the experts that add up to 1: for two, an even grid from (1, 0) to (0, 1); for more, draws from the
    flat Dirichlet distribution.

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


def points(
    axes: Mapping[str, Sequence[Any]] | None, count: int | None, experts: Sequence[str], seed: int
) -> Iterator[dict[str, Any]]:
    """Every point of a grid with every one of so many weightings.

    Raises:
        TwinmergeError: neither is given, or both choose weights.
    """
    axes = axes or {}
    if count is not None and (twice := [name for name in axes if name.rpartition(".")[2] == "weights"]):
        raise UsageError(f"--grid {twice[0]} and --weightings both choose weights. Give one of them.")
    if not axes and count is None:
        raise UsageError("There is nothing to choose from. Name values with --grid NAME=A,B,C, or --weightings.")
    draws = [{}] if count is None else list(weightings(experts, count, seed))
    for point in grid(**axes):
        yield from ({**point, **draw} for draw in draws)


Scorer = Callable[[Any], float | Mapping[str, float]]
"""A merged model, as `Merge.load` gives it -> a number that is to be large, or several by name, whose mean is."""


def _check_names(trials: Sequence[Trial]) -> None:
    """Refuse scores that are of other things than the first trial's, and names that are taken in the table."""
    first, last = trials[0], trials[-1]
    if first.scores.keys() != last.scores.keys():
        here, before = (", ".join(t.scores) or "a number alone" for t in (last, first))
        raise UsageError(
            f"The scorer gives {here} for {last.parameters}, and gave {before} for {first.parameters}. Let it give the "
            "same names each time."
        )
    if taken := ({"score"} | first.parameters.keys()) & first.scores.keys():
        raise UsageError(f"The scorer calls a score {min(taken)!r}, as a column of the result is. Call it otherwise.")


def scored(found: Any, candidate: Mapping[str, Any]) -> Trial:
    """A trial by what a scorer gave.

    Raises:
        UsageError: neither a finite number nor a mapping of names to some.

    Example:
        >>> scored({"a": 0.5, "b": 1.0}, {"scale": 0.1}).score, scored(2, {}).scores
        (0.75, {})
    """
    found = {n: _number(v) for n, v in found.items()} if isinstance(found, Mapping) else _number(found)
    scores = {} if fits(found, float) else found
    if not fits(scores, Mapping[str, float]) or not (scores or fits(found, float)):
        raise UsageError(f"The scorer gives {shown(found)}. Let it give a number, or a mapping of names to numbers.")
    score = float(found) if not scores else sum(map(float, scores.values())) / len(scores)
    if not math.isfinite(score):
        raise UsageError(f"The scorer gives {score} for {dict(candidate)}. Let it give a finite number.")
    return Trial(dict(candidate), score, {str(name): float(value) for name, value in scores.items()})


def _number(value: Any) -> Any:
    """Python's own number for an array or tensor without axes."""
    return value.item() if getattr(value, "shape", None) == () else value


def check_split(split: str) -> None:
    """Refuse to choose anything on test rows.

    Raises:
        UsageError: a split whose name says that it is for testing.

    Example:
        >>> check_split("test")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: Nothing is chosen on the split 'test': its scores would no longer say anything. \
Choose on validation rows, with --split validation.
    """
    if "test" in split.lower():
        raise UsageError(
            f"Nothing is chosen on the split {split!r}: its scores would no longer say anything. Choose on validation "
            "rows, with "
            "--split validation."
        )


@strict
def search(
    merge: Merge,
    suite: str | Path | Mapping[str, Task] | None = None,
    candidates: Iterable[Mapping[str, Any]] | None = None,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    weightings: int | None = None,
    split: str = "validation",
    limit: int | None = None,
    seed: int = 0,
    experts: Evaluation | str | Path | None = None,
    scorer: Scorer | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Merge with each candidate's parameters in memory and score it, every task with its own head.

    Args:
        merge: what is merged, as `twinmerge.merge` describes it; candidates override its recipe's parameters.
        suite: task -> data, or a suite's folder; the tasks' names are those of the experts. Or give a `scorer`.
        candidates: parameters of each; or give `grid`, `weightings` or both.
        grid: parameter -> values that are tried, all with all.
        weightings: try so many weightings of the experts, each with every point of the grid.
        split, limit, seed: the rows that decide, as in `evaluate`.
        experts: their own evaluation on the same rows, or its file: the score is then the mean of score / expert's
            score, else the mean score.
        scorer: a function of your own in the place of a suite: it gets the merged model, as `merge.load()` gives it,
            and gives a number that is to be large, or several by name, whose mean is. Score on rows that were not
            trained on, and keep test rows for the end.
        out: a file to write all trials to, in the place of one that is there.

    Raises:
        TwinmergeError: no candidates, a split for testing, a score that is no finite number, and as `evaluate`.

    Example:
        >>> from torch import nn
        >>> import twinmerge as tm
        >>> base, expert = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> base.weight.data[:], expert.weight.data[:] = 1.0, 3.0
        >>> merge = tm.merge("task_arithmetic", base, {"a": expert}, progress=False)
        >>> found = search(merge, grid={"scale": [0.1, 0.5, 0.9]}, scorer=lambda model: -abs(float(model.weight) - 2))
        >>> found.best.parameters, len(found.trials)
        ({'scale': 0.5}, 3)
    """
    check_split(split)
    reference, file = Evaluation.read(experts), check_file(out)
    if suite is None and scorer is None:
        raise UsageError("A search needs a suite or a scorer of your own, and neither is given. Give one of them.")
    if suite is not None and scorer is not None:
        raise UsageError("Both a suite and a scorer are given, and one of them decides. Leave the other out.")
    if scorer is not None and reference is not None:
        raise UsageError("The experts' scores are of a suite, and a scorer is given. Leave experts out.")
    if suite is not None and not isinstance(suite, Mapping):
        suite = open_suite(suite, list(merge.recipe.experts))
    candidates = list(points(grid, weightings, list(merge.recipe.experts), seed) if candidates is None else candidates)
    if not all(fits(candidate, Mapping[str, Any]) for candidate in candidates):
        raise UsageError(
            "candidates are mappings of parameters to values. Write search.grid(scale=[0.1, 0.2]), or [{'scale': 0.1}]."
        )
    if not candidates:
        raise UsageError("There is nothing to choose from. Name values with --grid NAME=A,B,C, or --weightings.")
    candidates = [{name: plain_value(value) for name, value in candidate.items()} for candidate in candidates]
    for candidate in candidates:  # before the first of them takes its time
        merge.recipe.varied(candidate).make_method()
    if merge.edited:
        raise UsageError(
            "An edited plan says every parameter itself, so there is nothing to search. Take a merge of a recipe."
        )
    if not merge.architecture:  # to run it
        merge = Merge(merge.recipe, merge.progress, architecture=True, device=merge.device)
    encoder: TextEncoder | None = None
    trials, rows = [], 0
    for candidate in progress_bar(candidates, "searching", progress):
        if scorer is not None:
            trials.append(scored(scorer(merge.varied(**candidate).load()), candidate))
            _check_names(trials)
            continue
        assert suite is not None
        model = merge.varied(**candidate).headed().to(merge.device)
        if encoder is None:
            folder = tokenizer_folder(merge)
            encoder = TextEncoder(folder, positions=position_limit(model.architecture.config))
        found = evaluate(StaticRunner(model, encoder), suite, split, limit, seed, progress=False)[0]
        score = found.mean if reference is None else found.normalised(reference) / 100
        log(f"{candidate}: {100 * score:.2f} %", "study")
        trials.append(Trial(dict(candidate), score, found.scores))
        rows = found.rows
    made = Search(merge.recipe.method_name, None if scorer else split, rows, tuple(trials))
    if file is not None:
        replace_text(file, made.to_json())
    return made
