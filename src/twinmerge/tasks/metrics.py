"""Metrics by name, the normalised score, and its interval from a bootstrap over rows.

Scores are fractions (correlations from -1 to 1); only the normalised score is in per cent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twinmerge.errors import DataError, UsageError, nearest

Floats: TypeAlias = NDArray[np.float64]
Metric: TypeAlias = Callable[[ArrayLike, ArrayLike], float]
"""(predictions, labels), both (rows,) -> a score."""


# --------------------------------------------------------------------------------------------- metrics


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Share of the rows that are right. NaN and negative predictions (no answer) are wrong.

    Example:
        >>> accuracy([1, 0, -1, 1], [1, 0, 1, 0])
        0.5
    """
    p, y = _columns(predictions, labels)
    return float(np.mean(p == y))


def f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """F1 of label 1: 2 TP / (2 TP + FP + FN); 0 where that is 0/0. No answer (NaN, negative) is wrong either way:
    a false negative where the label is 1, a false positive elsewhere.

    Example:
        >>> f1([1, 1, 0, 0], [1, 0, 1, 0])
        0.5
    """
    p, y = _columns(predictions, labels)
    right = int(np.count_nonzero((p == 1) & (y == 1)))
    wrong = int(np.count_nonzero(((p == 1) | ~(p >= 0)) & (y != 1)) + np.count_nonzero((p != 1) & (y == 1)))
    return 2 * right / (2 * right + wrong) if right else 0.0


def macro_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of F1 over the classes among labels and predictions. No answer is a false negative of the row's class.

    Example:
        >>> macro_f1([0, 0, 1, 1], [0, 0, 0, 1])  # (4/5 + 2/3) / 2
        0.7333...
    """
    table, classes = _confusion(predictions, labels)
    answers = classes >= 0
    return float(np.mean((2 * np.diag(table) / (table.sum(0) + table.sum(1)))[answers]))


def matthews(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Matthews' correlation, for any number of classes; 0 where it is 0/0. No answer is a class of its own.

    With s rows, c of them right, t_k rows of class k and p_k predictions of it:
    (c s - sum t_k p_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2)).

    Example:
        >>> matthews([1, 1, 0, 0], [1, 1, 0, 1])  # (2·1 - 0·1) / sqrt(2·3·1·2)
        0.5773...
    """
    table, _ = _confusion(predictions, labels)
    s, c, t, p = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    below = np.sqrt(s * s - p @ p) * np.sqrt(s * s - t @ t)
    return float((c * s - t @ p) / below) if below > 0 else 0.0


def pearson(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation; 0 where either side is constant. Predictions must be numbers.

    Example:
        >>> pearson([1, 2, 3], [2, 4, 6])
        1.0
    """
    return _correlation(*_numbers(predictions, labels))


def spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Pearson's correlation of the ranks, ties at their mean rank; 0 where either side is constant.

    Example:
        >>> spearman([1, 2, 9], [10, 20, 30])
        1.0
    """
    p, y = _numbers(predictions, labels)
    return _correlation(_ranks(p), _ranks(y))


def pearson_spearman(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `pearson` and `spearman` (STS-B).

    Example:
        >>> pearson_spearman([1, 2, 3], [3, 2, 1])
        -1.0
    """
    return (pearson(predictions, labels) + spearman(predictions, labels)) / 2


def acc_f1(predictions: ArrayLike, labels: ArrayLike) -> float:
    """Mean of `accuracy` and `f1` (MRPC, QQP).

    Example:
        >>> acc_f1([1, 1, 1, 0], [1, 1, 0, 0])  # (3/4 + 4/5) / 2
        0.775
    """
    return (accuracy(predictions, labels) + f1(predictions, labels)) / 2


METRICS: dict[str, Metric] = {
    function.__name__: function
    for function in (accuracy, f1, macro_f1, matthews, pearson, spearman, pearson_spearman, acc_f1)
}


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        UsageError: unknown.

    Example:
        >>> metric("acuracy")
        Traceback (most recent call last):
        ...
        twinmerge.errors.UsageError: No metric 'acuracy'. Did you mean 'accuracy'? Known are: accuracy, f1, \
macro_f1, matthews, pearson, spearman, pearson_spearman, acc_f1.
    """
    if not isinstance(name, str) or name not in METRICS:
        raise UsageError(f"No metric {name!r}.{nearest(str(name), METRICS)} Known are: {', '.join(METRICS)}.")
    return METRICS[name]


# ---------------------------------------------------------------------------------- the normalised score


# --------------------------------------------------------------------------------------------- helpers


def _columns(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    p, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if p.ndim != 1 or p.shape != y.shape or not len(y):
        raise UsageError(
            f"predictions have shape {p.shape}, labels {y.shape}: give one number for each row on both sides, and at "
            "least one row."
        )
    if not np.isfinite(y).all():
        raise DataError(f"the label of row {int(np.argmin(np.isfinite(y)))} is no finite number. Mend the data.")
    if np.isinf(p).any():
        raise DataError(f"the prediction of row {int(np.argmax(np.isinf(p)))} is infinite. Check the model.")
    return p, y


def _numbers(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    p, y = _columns(predictions, labels)
    if np.isnan(p).any():
        raise DataError(
            f"the prediction of row {int(np.argmax(np.isnan(p)))} is NaN: a correlation needs a number for every row. "
            "Check the model."
        )
    return p, y


def _confusion(predictions: ArrayLike, labels: ArrayLike) -> tuple[Floats, Floats]:
    """(classes, classes) counts [label, prediction], and the classes; no answer is class -1."""
    p, y = _columns(predictions, labels)
    p = np.where(p >= 0, p, -1.0)
    classes, index = np.unique(np.concatenate([p, y]), return_inverse=True)
    cells = index[len(p) :] * len(classes) + index[: len(p)]
    return np.bincount(cells, minlength=len(classes) ** 2).reshape(len(classes), -1).astype(np.float64), classes


def _correlation(x: Floats, y: Floats) -> float:
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # no square is lost to underflow
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1, 1))


def _ranks(x: Floats) -> Floats:
    """Ranks from 1, ties at their mean."""
    _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[index], np.float64)
