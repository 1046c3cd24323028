"""How well merged models remember: accuracy, backward transfer and forgetting over a course of arriving experts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from twinmerge.errors import UsageError


@dataclass(frozen=True)
class Course:
    """One order of arrivals. tasks: in that order; scores: after every arrival, of the tasks so far: scores[t] has t
    + 1 numbers.

    Example:
        >>> course = Course(("a", "b", "c"), ((90.0,), (85.0, 70.0), (80.0, 60.0, 90.0)))
        >>> round(course.accuracy, 2), course.backward_transfer, course.forgetting
        (76.67, -10.0, 10.0)
    """

    tasks: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if [len(row) for row in self.scores] != list(range(1, len(self.tasks) + 1)):
            raise UsageError("A course needs the score of every task so far after every arrival: 1, 2, 3, … numbers.")

    @property
    def after(self) -> tuple[float, ...]:
        """The mean over the tasks so far, after every arrival."""
        return tuple(math.fsum(row) / len(row) for row in self.scores)

    @property
    def accuracy(self) -> float:
        """The mean over all tasks at the end."""
        return self.after[-1]

    @property
    def backward_transfer(self) -> float:
        """Σi<T (ai(θT) − ai(θi)) / (T − 1): what later arrivals did to earlier tasks; 0 for a single task.

        Source: Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory", arXiv 1706.08840, section 2; the divisor is
        T − 1.
        """
        last = len(self.tasks) - 1
        return math.fsum(self.scores[-1][i] - self.scores[i][i] for i in range(last)) / last if last else 0.0

    @property
    def forgetting(self) -> float:
        """Σi<T (max over t < T of ai(θt) − ai(θT)) / (T − 1).

        Source: Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", arXiv 1801.10112, section 3.
        """
        last = len(self.tasks) - 1
        best = [max(self.scores[t][i] for t in range(i, last)) for i in range(last)]
        return math.fsum(b - now for b, now in zip(best, self.scores[-1], strict=False)) / last if last else 0.0


def mean_and_sd(numbers: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; sd 0 for one number.

    Example:
        >>> mean_and_sd([1.0, 3.0])
        (2.0, 1.4142135623730951)
    """
    found = list(numbers)
    mean = math.fsum(found) / len(found)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in found) / (len(found) - 1)) if len(found) > 1 else 0.0
