"""What an evaluation found: scores and answers by task, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from twinmerge.errors import DataError, TwinmergeError, UsageError
from twinmerge.results import Result, Rows, plain
from twinmerge.store.foreign import Most, parse_json, read_bytes
from twinmerge.store.output import OutputFile
from twinmerge.tasks.bootstrap import Interval, Scored, bootstrap_difference, bootstrap_normalised, normalised

EVALUATION = Most(200_000_000, 10_000_000)
VERSION = 1

Setting: TypeAlias = Literal["task given", "head given", "nothing given"]
"""What the model is told about a row: its task; only which head must answer (the router mixes); or nothing."""

Reading: TypeAlias = Literal["strict", "lenient"]
"""How an answer of another task's head is read where nothing is given: as wrong, or by the name of its label."""

References: TypeAlias = "Evaluation | str | os.PathLike[str] | Sequence[Evaluation | str | os.PathLike[str]]"
"""The experts' own evaluation: itself, its file, or one for each of some tasks."""


@dataclass(frozen=True)
class TaskScore:
    """task, metric: their names; score: a fraction; rows: how many it was measured on."""

    task: str
    metric: str
    score: float
    rows: int


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """One model on one suite in one setting.

    Args:
        setting: what the model was told.
        reading: strict or lenient; None where heads are given.
        per_task: the scores, by task.
        predictions: labels and answers row by row, by task, for paired bootstraps.
        routed_right: share of all rows that the router gave to the expert of their task; None without a router.
        seconds: of the whole evaluation.
        rows: of all tasks.

    Raises:
        TwinmergeError: an unknown setting or reading.

    Example:
        >>> answers = {"toy": Scored("toy", "accuracy", [0, 1, 1, 0], [0, 1, 1, 1])}
        >>> found = Evaluation.of(answers, "head given", routed_right=0.75, seconds=0.5)
        >>> found.per_task["toy"]
        TaskScore(task='toy', metric='accuracy', score=0.75, rows=4)
        >>> Evaluation.from_json(found.to_json()) == found
        True
        >>> found.normalised(found)
        100.0
    """

    setting: Setting
    reading: Reading | None
    per_task: dict[str, TaskScore]
    predictions: dict[str, Scored]
    routed_right: float | None
    seconds: float
    rows: int

    def __post_init__(self) -> None:
        if self.setting not in get_args(Setting):
            raise UsageError(f"The setting is {self.setting!r}: give one of {', '.join(get_args(Setting))}.")
        if self.reading is not None and self.reading not in get_args(Reading):
            raise UsageError(f"The reading is {self.reading!r}: give one of {', '.join(get_args(Reading))}, or none.")

    @classmethod
    def read(cls, given: References | None) -> Evaluation | None:
        """An evaluation as it is, or that of a file which `evaluate(out=…)` wrote; several of them as one, each of
        other tasks.

        Raises:
            TwinmergeError: a file that is none; two of one task.
        """
        if given is None or isinstance(given, Evaluation):
            return given
        if isinstance(given, (str, os.PathLike)):
            return cls.from_json(read_bytes(Path(given), EVALUATION.bytes, "Name a file that --out wrote."))
        if len(given) == 1:
            return cls.read(given[0])
        predictions: dict[str, Scored] = {}
        for each in filter(None, map(cls.read, given)):
            if twice := predictions.keys() & each.predictions.keys():
                raise UsageError(f"Two evaluations of experts have the task {min(twice)!r}. Give one for each task.")
            predictions |= each.predictions
        return cls.of(predictions, "task given") if predictions else None

    @classmethod
    def of(
        cls,
        predictions: Mapping[str, Scored],
        setting: Setting,
        reading: Reading | None = None,
        routed_right: float | None = None,
        seconds: float = 0.0,
    ) -> Evaluation:
        """Score the answers, task by task."""
        per_task = {t: TaskScore(t, s.metric, s.score, len(s.labels)) for t, s in predictions.items()}
        rows = sum(score.rows for score in per_task.values())
        return cls(setting, reading, per_task, dict(predictions), routed_right, seconds, rows)

    @property
    def scores(self) -> dict[str, float]:
        """The scores alone, by task."""
        return {task: score.score for task, score in self.per_task.items()}

    def normalised(self, experts: Evaluation) -> float:
        """100 · mean over tasks of score / score of the task's expert; errors as
        `twinmerge.tasks.metrics.normalised`."""
        return normalised(self.scores, experts.scores)

    def interval(self, experts: Evaluation, draws: int = 2000, seed: int = 0) -> Interval:
        """The normalised score with its 95 % interval over rows."""
        return bootstrap_normalised(self.predictions, experts.predictions, draws, seed)

    def difference(self, other: Evaluation, experts: Evaluation, draws: int = 2000, seed: int = 0) -> Interval:
        """How far this normalised score is above the other's, with its paired 95 % interval over rows."""
        return bootstrap_difference(self.predictions, other.predictions, experts.predictions, draws, seed)

    @property
    def mean(self) -> float:
        """The mean score over the tasks."""
        return sum(self.scores.values()) / len(self.scores)

    @property
    def title(self) -> str:
        """The setting, with the reading where there is one."""
        return self.setting + (f", {self.reading}" if self.reading else "")

    def to_dict(self) -> dict[str, Any]:
        """Setting, scores and shares as plain data, without the answers, which `to_json` has."""
        found = {"setting": self.setting, "reading": self.reading, "scores": self.scores, "mean": self.mean}
        return {**found, "routed_right": self.routed_right, "seconds_per_1000": 1000 * self.seconds / self.rows}

    def _summary(self) -> str:
        return f"{self.title}, mean {100 * self.mean:.1f} % of {len(self.scores)} tasks, {self.rows} rows"

    def to_json(self, indent: int | None = None) -> str:
        """One JSON object; a prediction that is NaN becomes null. Equal evaluations give equal text."""
        head = {"kind": "evaluation", "version": VERSION, "setting": self.setting, "reading": self.reading}
        body = {
            "per_task": {task: asdict(score) for task, score in self.per_task.items()},
            "predictions": {
                task: {"metric": s.metric, "labels": _list(s.labels), "predictions": _list(s.predictions)}
                for task, s in self.predictions.items()
            },
            "routed_right": self.routed_right,
            "seconds": self.seconds,
            "rows": self.rows,
        }
        return json.dumps({**head, **body}, ensure_ascii=False, allow_nan=False, indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Evaluation:
        """Read what `to_json` wrote.

        Raises:
            TwinmergeError: no JSON, another kind or version, a field that is missing or wrong.
        """
        try:
            found = parse_json(text, EVALUATION)
        except ValueError as error:
            raise DataError(f"The evaluation is no JSON ({error}). Evaluate again.") from error
        if not isinstance(found, dict) or found.get("kind") != "evaluation":
            raise DataError("This JSON is no evaluation of twinmerge. Name the right file, or evaluate again.")
        if found.get("version") != VERSION:
            raise DataError(
                f"The evaluation has version {found.get('version')!r}, this release reads version {VERSION}. Evaluate "
                "again."
            )
        try:
            right = found["routed_right"]
            return cls(
                setting=found["setting"],
                reading=found["reading"],
                per_task={
                    t: TaskScore(str(s["task"]), str(s["metric"]), float(s["score"]), int(s["rows"]))
                    for t, s in found["per_task"].items()
                },
                predictions={
                    t: Scored(t, s["metric"], _array(s["labels"]), _array(s["predictions"]))
                    for t, s in found["predictions"].items()
                },
                routed_right=None if right is None else float(right),
                seconds=float(found["seconds"]),
                rows=int(found["rows"]),
            )
        except KeyError as error:
            raise DataError(f"The evaluation has no field {error.args[0]!r}. Evaluate again.") from error
        except TwinmergeError as error:
            raise DataError(str(error)) from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DataError(f"The evaluation has a field of a wrong type ({error}). Evaluate again.") from error


def check_file(out: str | os.PathLike[str] | None) -> Path | None:
    """A file that is to be written at the end, refused at the beginning where it cannot be.

    Raises:
        UsageError: it cannot.
    """
    if out is None:
        return None
    file = Path(out)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UsageError(f"{file} cannot be written. Name a file in a folder that is there.")
    OutputFile(file, replace=True).check()
    return file


class Evaluations(Rows[Evaluation]):
    """A model's evaluations on a suite, one for each setting. As a table: a row for each task, a column for each
    setting, all as shares. Markdown, LaTeX and what is shown have rows of summary below (mean, normalised, routed
    right); pandas and CSV have the tasks alone: the others are each evaluation's `mean` and `routed_right`, and
    `normalised()`.

    Attributes:
        model: what it is called.
        split: which rows were answered.
        oracle_biases: whether the labelled task's biases were handed in.
        experts: their own evaluation on these rows, for normalised scores; None where there is none.
    """

    def __init__(
        self, found: Iterable[Evaluation], model: str, split: str, oracle_biases: bool, experts: Evaluation | None
    ) -> None:
        super().__init__(found)
        self.model, self.split, self.oracle_biases, self.experts = model, split, oracle_biases, experts

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.model, self.split, self.oracle_biases, self.experts)

    def normalised(self) -> list[float | None]:
        """The normalised score of each, or None without the experts'."""
        return [None if self.experts is None else each.normalised(self.experts) for each in self]

    def to_json(self) -> str:
        """All answers and scores, as `Evaluation.from_json` reads each: a list where there are several."""
        return "[" + ",".join(e.to_json() for e in self) + "]" if len(self) > 1 else self[0].to_json()

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what `twinmerge evaluate --json` prints."""
        own = [{**e.to_dict(), "normalised": n} for e, n in zip(self, self.normalised(), strict=True)]
        found = {"model": self.model, "split": self.split, "oracle_biases": self.oracle_biases}
        return {**found, "evaluations": plain(own)}

    def _summary(self) -> str:
        means = "; ".join(f"{each.title} {100 * each.mean:.1f} %" for each in self)
        return f"{len(self[0].scores)} tasks, {means}"

    def _data(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        return ["task", *(e.title for e in self)], [[task, *(e.scores[task] for e in self)] for task in self[0].scores]

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        columns, tasks = self._data()
        rows = [*tasks, ["mean", *(e.mean for e in self)]]
        if self.experts is not None:
            rows.append(["normalised", *(e.normalised(self.experts) / 100 for e in self)])
        if any(e.routed_right is not None for e in self):
            rows.append(["routed right", *(e.routed_right for e in self)])
        return columns, rows


def _list(column: np.ndarray[Any, np.dtype[Any]]) -> list[float | None]:
    """A prediction that is NaN as None; integers stay integers."""
    return [None if value != value else value for value in column.tolist()]


def _array(values: list[float | None]) -> np.ndarray[Any, np.dtype[Any]]:
    return np.array([np.nan if value is None else value for value in values])
