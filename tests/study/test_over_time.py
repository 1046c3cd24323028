"""Accuracy, backward transfer (divisor T − 1) and forgetting of a course; the picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from twinmerge.errors import TwinmergeError
from twinmerge.study.course_picture import draw_courses
from twinmerge.study.over_time import Course, mean_and_sd

TOY = Course(("a", "b", "c"), ((90.0,), (88.0, 70.0), (80.0, 60.0, 90.0)))


def test_check_12_backward_transfer_divides_by_the_tasks_before_the_last() -> None:
    own, end = (90.0, 70.0, 90.0), (80.0, 60.0, 90.0)
    assert TOY.backward_transfer == -10.0
    assert round(sum(e - o for e, o in zip(end, own, strict=True)) / 3, 3) == -6.667  # what dividing by T would give


def test_accuracy_is_that_of_the_end() -> None:
    assert TOY.after == (90.0, 79.0, pytest.approx(230 / 3)) and TOY.accuracy == TOY.after[-1]


def test_forgetting_is_from_the_best_before_the_end() -> None:
    risen = Course(("a", "b"), ((50.0,), (70.0, 10.0)))
    assert risen.backward_transfer == 20.0 and risen.forgetting == -20.0
    peak = Course(("a", "b", "c"), ((50.0,), (90.0, 10.0), (60.0, 10.0, 0.0)))
    assert peak.backward_transfer == 5.0 and peak.forgetting == 15.0


def test_one_task_forgets_nothing() -> None:
    one = Course(("a",), ((70.0,),))
    assert (one.accuracy, one.backward_transfer, one.forgetting) == (70.0, 0.0, 0.0)


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(*[st.lists(st.floats(0, 100), min_size=i, max_size=i) for i in range(1, n + 1)])
    )
)
def test_forgetting_is_at_least_what_was_lost(rows: tuple[list[float], ...]) -> None:
    course = Course(tuple(map(str, range(len(rows)))), tuple(map(tuple, rows)))
    assert course.forgetting >= -course.backward_transfer - 1e-9


@pytest.mark.parametrize("scores", [((1.0,),), ((1.0, 2.0), (1.0,)), ((1.0,), (1.0, 2.0, 3.0))])
def test_scores_that_are_no_triangle_are_refused(scores: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(TwinmergeError, match="1, 2, 3"):
        Course(("a", "b"), scores)


def test_sd_is_the_sample_s() -> None:
    assert mean_and_sd([2.0, 4.0, 6.0]) == (4.0, 2.0) and mean_and_sd([5.0]) == (5.0, 0.0)


def test_picture(tmp_path: Path) -> None:
    worse = Course(TOY.tasks, ((90.0,), (70.0, 60.0), (50.0, 40.0, 90.0)))
    courses = {"one $x": [TOY, worse], "two": [worse, worse]}
    files = [draw_courses(courses, "t", tmp_path / f"{i}.svg") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert imread(draw_courses(courses, "t", tmp_path / "a.png")).std() > 0
    with pytest.raises(TwinmergeError, match="no course"):
        draw_courses({}, "t", tmp_path / "b.png")
