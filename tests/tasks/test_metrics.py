"""Metrics against scikit-learn and SciPy, the normalised score against published tables, the bootstrap against
theory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk

from twinmerge.errors import TwinmergeError
from twinmerge.tasks.bootstrap import Scored, bootstrap_difference, bootstrap_normalised, normalised
from twinmerge.tasks.metrics import METRICS, acc_f1, accuracy, f1, macro_f1, matthews, metric, pearson, spearman

# The README of the official code (Lu et al. 2024): cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb. The first two are raw.
GLUE = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb"]
EXPERTS = dict(zip(GLUE, [56.52, 87.01, 87.99, 91.71, 89.71, 66.43, 94.72, 86.36], strict=True))
TASK_ARITHMETIC = dict(zip(GLUE, [6.68, 66.23, 78.46, 78.62, 72.69, 53.43, 83.49, 27.1], strict=True))
TIES = dict(zip(GLUE, [9.46, 59.34, 74.71, 65.93, 41.29, 47.29, 72.13, 9.21], strict=True))
TWIN = dict(zip(GLUE, [101.06, 94.35, 97.51, 98.78, 98.06, 94.56, 99.64, 82.67], strict=True))

RNG = np.random.default_rng(0)


def some(classes: int, rows: int = 200) -> tuple[np.ndarray, np.ndarray]:
    labels = RNG.integers(classes, size=rows)
    return np.where(RNG.random(rows) < 0.6, labels, RNG.integers(classes, size=rows)), labels


@pytest.mark.filterwarnings("ignore:A single label was found:UserWarning")
@pytest.mark.parametrize("rows", [1, 2, 7, 200])
@pytest.mark.parametrize("classes", [2, 5])
def test_classification_metrics_equal_scikit_learns(classes: int, rows: int) -> None:
    p, y = some(classes, rows)
    assert accuracy(p, y) == pytest.approx(sk.accuracy_score(y, p))
    assert macro_f1(p, y) == pytest.approx(sk.f1_score(y, p, average="macro", zero_division=0))
    assert matthews(p, y) == pytest.approx(sk.matthews_corrcoef(y, p))
    if classes == 2:
        assert f1(p, y) == pytest.approx(sk.f1_score(y, p, zero_division=0))


def test_correlations_equal_scipys() -> None:
    y = RNG.integers(6, size=300).astype(float)
    p = y + RNG.normal(size=300).round(1)
    for scale in (1.0, 2.0**-700, 2.0**500):  # powers of two keep the ties
        assert pearson(p * scale, y) == pytest.approx(scipy.stats.pearsonr(p, y).statistic, rel=1e-9)
        assert spearman(p * scale, y) == pytest.approx(scipy.stats.spearmanr(p, y).statistic, rel=1e-9)
    assert pearson([0.1] * 7, range(7)) == spearman([0.1] * 7, range(7)) == 0.0


@pytest.mark.parametrize("none", [np.nan, -1, -100])
def test_no_answer_is_wrong(none: float) -> None:
    assert accuracy([none, 0], [0, 0]) == 0.5
    assert f1([1, none], [1, 0]) == f1([1, none], [1, 1]) == pytest.approx(2 / 3)
    assert macro_f1([none, 0, 1], [0, 0, 1]) == pytest.approx((2 / 3 + 1) / 2)
    assert 0 < matthews([none, 0, 1], [0, 0, 1]) < 1
    assert matthews([none, none], [0, 1]) == macro_f1([none, none], [0, 1]) == 0
    assert acc_f1([1, none], [1, 0]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_nonsense_is_refused() -> None:
    for name in METRICS:
        for p, y in (([], []), ([1], [1, 0]), ([[1]], [[1]]), ([1], [np.nan]), ([np.inf], [1])):
            with pytest.raises(TwinmergeError):
                metric(name)(p, y)
    with pytest.raises(TwinmergeError, match="prediction of row 1 is NaN"):
        pearson([1, np.nan], [1, 2])
    with pytest.raises(TwinmergeError, match="Task 'a': No metric 'f_1'. Did you mean 'f1'"):
        Scored("a", "f_1", [1], [1])


def test_check27_normalised_score_of_published_tables() -> None:
    assert normalised(TASK_ARITHMETIC, EXPERTS) == pytest.approx(67.98, abs=0.01)
    assert normalised(TIES, EXPERTS) == pytest.approx(55.72, abs=0.01)
    assert normalised(TWIN, dict.fromkeys(GLUE, 100.0)) == pytest.approx(95.83, abs=0.01)  # published as ratios
    assert normalised(EXPERTS, EXPERTS) == 100
    assert normalised({"a": -0.2, "b": 0.9}, {"b": 0.6, "a": 0.4}) == pytest.approx(50.0)  # (-.5 + 1.5) / 2


@pytest.mark.parametrize("wrong", [0.0, -0.1, np.nan, np.inf])
def test_check27_an_experts_score_must_be_above_zero(wrong: float) -> None:
    with pytest.raises(TwinmergeError, match="expert of task 'b' scores"):
        normalised({"a": 1, "b": 1}, {"a": 1, "b": wrong})


def test_other_tasks_are_refused() -> None:
    with pytest.raises(TwinmergeError, match="The model has no score for b"):
        normalised({"a": 1}, {"a": 1, "b": 1})
    with pytest.raises(TwinmergeError, match="There is no expert's score for b"):
        normalised({"a": 1, "b": 1}, {"a": 1})
    with pytest.raises(TwinmergeError, match="no tasks"):
        normalised({}, {})
    with pytest.raises(TwinmergeError, match="score of task 'a' is nan"):
        normalised({"a": np.nan}, {"a": 1})


def right(*parts: tuple[str, np.ndarray], name: str = "accuracy") -> dict[str, Scored]:
    """Binary tasks with labels 1, 0, 1, 0, ...; a row is right where its flag is."""
    out = {}
    for task, flags in parts:
        labels = (np.arange(len(flags)) + 1) % 2
        out[task] = Scored(task, name, labels, np.where(flags, labels, 1 - labels))
    return out


def first(rows: int, of: int) -> np.ndarray:
    return np.arange(of) < rows


def test_bootstrap_is_exact_where_nothing_varies() -> None:
    everything = right(("a", first(50, 50)), ("b", first(30, 30)))
    assert bootstrap_normalised(everything, everything) == (100, 100, 100)
    some_rows = right(("a", first(20, 50)), ("b", first(7, 30)))
    assert bootstrap_normalised(some_rows, some_rows) == (100, 100, 100)  # paired: every draw's ratio is 1
    assert bootstrap_difference(some_rows, some_rows, everything) == (0, 0, 0)
    assert bootstrap_difference(right(("a", first(0, 9))), right(("a", first(9, 9))), right(("a", first(9, 9)))) == (
        -100,
        -100,
        -100,
    )


def test_bootstrap_has_the_binomial_width() -> None:
    value, low, high = bootstrap_normalised(right(("a", first(320, 400))), right(("a", first(400, 400))), draws=20_000)
    se = 100 * np.sqrt(0.8 * 0.2 / 400)
    assert value == 80 and (low, high) == pytest.approx((80 - 1.96 * se, 80 + 1.96 * se), abs=0.3)


def test_a_pair_is_narrower_than_its_sides() -> None:
    experts, model = right(("a", first(400, 400))), right(("a", first(320, 400)))
    better = right(("a", first(324, 400)))
    alone, pair = bootstrap_normalised(model, experts), bootstrap_difference(better, model, experts)
    assert pair.value == pytest.approx(1) and pair.high - pair.low < (alone.high - alone.low) / 3


def test_accuracy_by_cells_has_the_law_of_drawn_rows() -> None:
    flags = [RNG.random(300) < share for share in (0.7, 0.8, 0.9)]
    model, other, experts = (right(("a", f)) for f in flags)
    fast = bootstrap_difference(model, other, experts, draws=20_000)
    at = RNG.integers(300, size=(20_000, 300))
    m, o, e = (f[at].mean(1) for f in flags)
    assert fast[1:] == pytest.approx(tuple(np.quantile(100 * (m - o) / e, [0.025, 0.975])), abs=0.4)


@pytest.mark.parametrize("name", ["f1", "matthews", "macro_f1", "acc_f1", "pearson_spearman"])
def test_other_metrics_are_computed_anew_in_every_draw(name: str) -> None:
    flags = RNG.permutation(first(160, 200))
    model, experts = right(("a", flags), name=name), right(("a", first(200, 200)), name=name)
    value, low, high = bootstrap_normalised(model, experts, draws=200)
    assert low < value < high and value == pytest.approx(100 * metric(name)(model["a"].predictions, model["a"].labels))
    assert bootstrap_normalised(model, model, draws=50) == pytest.approx((100, 100, 100))


def test_seeds_and_the_order_of_tasks() -> None:
    parts = [("a", RNG.random(90) < 0.6), ("b", RNG.random(70) < 0.8), ("c", RNG.random(20) < 0.7)]
    experts = right(*((task, first(len(f), len(f))) for task, f in parts))
    found = bootstrap_normalised(right(*parts), experts, seed=3)
    assert found == bootstrap_normalised(right(*parts[::-1]), dict(reversed(experts.items())), seed=3)
    assert found != bootstrap_normalised(right(*parts), experts, seed=4)
    narrow = bootstrap_normalised(right(*parts), experts, seed=3, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


def test_the_interval_covers() -> None:
    """A model that is right on 70 % of all rows, its expert on 90 %: the truth lies inside for about 95 % of test
    sets."""
    rng, inside = np.random.default_rng(1), 0
    for seed in range(300):
        shared = rng.random(200)
        model, experts = right(("a", shared < 0.7)), right(("a", shared < 0.9))
        _, low, high = bootstrap_normalised(model, experts, draws=400, seed=seed)
        inside += low <= 100 * 0.7 / 0.9 <= high
    assert 0.91 <= inside / 300 <= 0.98


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: Scored("a", "accuracy", 1 - s.labels, s.predictions), "other rows"),
        (lambda s: Scored("a", "accuracy", s.labels[:-1], s.predictions[:-1]), "other rows"),
        (lambda s: Scored("a", "f1", s.labels, s.predictions), "another metric"),
    ],
)
def test_other_rows_are_refused(change: Callable[[Scored], Scored], said: str) -> None:
    model = right(("a", first(9, 10)))
    with pytest.raises(TwinmergeError, match=said):
        bootstrap_normalised({"a": change(model["a"])}, model)


def test_too_few_rows_for_an_interval() -> None:
    model = right(("a", first(1, 3)))
    with pytest.raises(TwinmergeError, match="expert of task 'a' scores zero or less in some draws of 3 rows"):
        bootstrap_normalised(model, model)
    with pytest.raises(TwinmergeError, match="draws is 0"):
        bootstrap_normalised(model, model, draws=0)
    with pytest.raises(TwinmergeError, match="confidence is 95"):
        bootstrap_normalised(right(("a", first(3, 3))), right(("a", first(3, 3))), confidence=95)
