"""The normalised score of a merge, and intervals of it and of differences from a bootstrap over rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinmerge.errors import DataError, TwinmergeError, UsageError
from twinmerge.tasks.metrics import Floats, metric


@dataclass(frozen=True, eq=False)
class Scored:
    """What one model answered on one task, row by row.

    Args:
        task: its name.
        metric: a name of `tasks/metrics.py`.
        labels: (rows,) numbers, finite.
        predictions: (rows,) numbers; NaN or a negative number where a label was expected: no answer, wrong.

    Raises:
        TwinmergeError: an unknown metric, no rows, another shape, an infinite prediction, a label that is no number.

    Example:
        >>> Scored("toy", "accuracy", [0, 1, 1, 0], [0, 1, -1, 1]).score
        0.5
    """

    task: str
    metric: str
    labels: NDArray[Any]
    predictions: NDArray[Any]

    def __init__(self, task: str, metric: str, labels: ArrayLike, predictions: ArrayLike) -> None:
        object.__setattr__(self, "task", task)
        object.__setattr__(self, "metric", metric)
        object.__setattr__(self, "labels", np.array(labels))
        object.__setattr__(self, "predictions", np.array(predictions))
        try:
            _ = self.score
        except TwinmergeError as error:
            raise type(error)(f"Task {task!r}: {error}") from error

    @property
    def score(self) -> float:
        """The metric over all rows."""
        return metric(self.metric)(self.predictions, self.labels)

    def __eq__(self, other: object) -> bool:
        """The same task, metric, labels and predictions; two NaN are the same."""
        if not isinstance(other, Scored):
            return NotImplemented
        return (self.task, self.metric) == (other.task, other.metric) and all(
            np.array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64), equal_nan=True)
            for a, b in ((self.labels, other.labels), (self.predictions, other.predictions))
        )

    __hash__ = None  # type: ignore[assignment]  # the arrays may change


class Interval(NamedTuple):
    """A value on all rows, with the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


def normalised(scores: Mapping[str, float], experts: Mapping[str, float]) -> float:
    """The normalised score, in per cent: 100 · mean over tasks of score / score of the task's expert.

    Every task weighs the same; nothing is clipped, so a negative correlation counts against the model.

    Args:
        scores: of the merged model, by task.
        experts: of each task's own expert, by task; the same unit.

    Raises:
        TwinmergeError: no tasks, different tasks, an expert's score that is not above zero, a score that is not
            finite.

    Example:
        >>> normalised({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9})
        75.0

    Source: Lu et al., Twin-Merging (NeurIPS 2024), eq. 6.
    """
    _same_tasks(scores, experts)
    for task, expert in experts.items():
        if not (np.isfinite(expert) and expert > 0):
            raise DataError(
                f"The expert of task {task!r} scores {expert}: a normalised score divides by it, so it must be above "
                "zero. Check the expert and its labels, or leave the task out."
            )
        if not np.isfinite(scores[task]):
            raise DataError(f"The score of task {task!r} is {scores[task]}, not a number. Evaluate it again.")
    shares = [scores[task] / expert for task, expert in experts.items()]
    return 100 * math.fsum(shares) / len(shares)  # the order of the tasks changes no bit


def bootstrap_normalised(
    model: Mapping[str, Scored],
    experts: Mapping[str, Scored],
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """The normalised score with its percentile interval from a bootstrap over rows.

    A draw takes, in each task, as many rows as there are, with replacement, the same ones for model and expert, and
    computes the score anew. For accuracy the draw is taken from the multinomial distribution over (model right?, expert
    right?), which is the same in law and does not depend on the number of rows. A task's draws do not depend on the
    other tasks.

    Args:
        model: rows of the merged model, by task.
        experts: the same rows, answered by each task's own expert.
        draws: 1,000 or more give steady ends.
        seed: of the draws.
        confidence: share of the draws between the ends.

    Raises:
        TwinmergeError: as `normalised`; other rows or metrics on the two sides; a draw in which an expert's score is
            not above zero (too few rows).

    Example:
        >>> labels = np.zeros(100)
        >>> half = np.arange(100) % 2
        >>> bootstrap_normalised(
        ...     {"t": Scored("t", "accuracy", labels, half)}, {"t": Scored("t", "accuracy", labels, labels)}
        ... )
        Interval(value=50.0, low=4..., high=6...)
    """
    (points,), (samples,) = _bootstrap([model], experts, draws, seed)
    return _interval(points, samples, confidence)


def bootstrap_difference(
    first: Mapping[str, Scored],
    second: Mapping[str, Scored],
    experts: Mapping[str, Scored],
    draws: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """How much the first model's normalised score is above the second's, in points, with its paired interval.

    Every draw takes the same rows for both models and the experts; an interval without zero is a difference that the
    choice of test rows does not explain. Arguments and errors as in `bootstrap_normalised`.

    Example:
        >>> labels = np.zeros(100)
        >>> def scored(wrong):
        ...     return {"t": Scored("t", "accuracy", labels, np.arange(100) < wrong)}
        >>> bootstrap_difference(scored(10), scored(20), scored(0)).value
        10.0
    """
    points, samples = _bootstrap([first, second], experts, draws, seed)
    return _interval(points[0] - points[1], samples[0] - samples[1], confidence)


def _bootstrap(
    models: Sequence[Mapping[str, Scored]], experts: Mapping[str, Scored], draws: int, seed: int
) -> tuple[Floats, Floats]:
    """(models,) normalised scores and (models, draws) of the draws."""
    if draws < 1:
        raise UsageError(f"draws is {draws}: give 1,000 or more.")
    diagonal = {task: rows.score for task, rows in experts.items()}
    points = [normalised({task: rows.score for task, rows in model.items()}, diagonal) for model in models]
    ratios = []
    for task in sorted(experts):  # the sum of the ratios has the same bits for any order of the tasks
        sides = [experts[task], *(model[task] for model in models)]
        for side in sides[1:]:
            if side.metric != sides[0].metric or not np.array_equal(side.labels, sides[0].labels):
                raise DataError(
                    f"Task {task!r} was scored on other rows or by another metric than its expert. "
                    "Evaluate both on the same split, limit and seed."
                )
        key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, *task.encode()])
        scores = _draw(sides, draws, np.random.default_rng(key))
        if scores[0].min() <= 0:
            raise DataError(
                f"The expert of task {task!r} scores zero or less in some draws of {len(sides[0].labels)} rows, so "
                "there is no interval. Evaluate on more rows."
            )
        ratios.append(scores[1:] / scores[0])
    return np.array(points), 100 * np.mean(ratios, axis=0)


def _draw(sides: Sequence[Scored], draws: int, rng: np.random.Generator) -> Floats:
    """(sides, draws): the score of each side on rows drawn with replacement, the same rows for all sides."""
    name, labels, count = sides[0].metric, sides[0].labels, len(sides[0].labels)
    if name == "accuracy":
        right = np.stack([side.predictions == labels for side in sides])
        bits = 1 << np.arange(len(sides))
        share = np.bincount(bits @ right, minlength=1 << len(sides)) / count
        cells = rng.multinomial(count, share, size=draws)  # (draws, 2^sides)
        of_cell = (np.arange(1 << len(sides)) & bits[:, None]) > 0  # (sides, 2^sides)
        return np.asarray(of_cell @ cells.T / count, np.float64)
    score = metric(name)
    out = np.empty((len(sides), draws))
    for draw in range(draws):
        at = rng.integers(count, size=count)
        out[:, draw] = [score(side.predictions[at], labels[at]) for side in sides]
    return out


def _interval(value: float, samples: Floats, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence is {confidence}: give a number between 0 and 1.")
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(low), float(high))


def _same_tasks(scores: Mapping[str, object], experts: Mapping[str, object]) -> None:
    if not experts:
        raise UsageError("There are no tasks to score. Name at least one.")
    for one, other, said in (
        (experts, scores, "The model has no score"),
        (scores, experts, "There is no expert's score"),
    ):
        lacks = sorted(set(one) - set(other))
        if lacks:
            raise UsageError(f"{said} for {', '.join(lacks)}. Evaluate both on the same tasks.")
