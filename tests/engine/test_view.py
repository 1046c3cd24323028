"""Views against NumPy's own indexing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.engine.view import View
from twinmerge.errors import TwinmergeError

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def axes(draw: st.DrawFn, size: int) -> int | range | tuple[int, ...] | None:
    every: list[st.SearchStrategy[int | range | tuple[int, ...] | None]] = [st.none()]
    if size:
        one = st.integers(0, size - 1)
        every += [one, st.lists(one, max_size=7).map(tuple)]
        every.append(st.tuples(one, st.integers(0, size)).map(lambda pair: range(pair[0], max(pair))))
    return draw(st.one_of(every))


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], View]:
    shape = draw(SHAPES)
    chosen = tuple(draw(axes(size)) for size in shape[: draw(st.integers(0, len(shape)))])
    left = len(shape) - sum(isinstance(axis, int) for axis in chosen)
    order = draw(st.one_of(st.just(()), st.permutations(range(left)).map(tuple)))
    return shape, View(chosen, order)


def of_numpy(x: np.ndarray, view: View) -> np.ndarray:
    for i, axis in reversed(list(enumerate(view.axes))):
        if axis is not None:
            x = x.take(axis if isinstance(axis, int) else np.array(list(axis), np.int64), axis=i)
    return x.transpose(view.order) if view.order else x


@settings(max_examples=400, deadline=None)
@given(views(), st.sampled_from(["u1", "<u2", "<u4", "<f8"]), st.data())
def test_every_range_of_every_view_is_what_numpy_takes(
    both: tuple[tuple[int, ...], View], kind: str, data: st.DataObject
) -> None:
    shape, view = both
    stored = np.arange(math.prod(shape)).astype(kind).reshape(shape)
    want = of_numpy(stored, view)
    assert view.shape(shape) == want.shape
    start = data.draw(st.integers(0, want.size))
    stop = data.draw(st.integers(start, want.size))
    raw, size = stored.reshape(-1).view(np.uint8), stored.itemsize

    def read(at: int, out: np.ndarray) -> None:
        assert at * size + out.nbytes <= raw.nbytes
        out[:] = raw[at * size : at * size + out.nbytes]

    out = np.zeros((stop - start) * size, np.uint8)
    view.read(read, shape, size, start, out)
    assert out.tobytes() == np.ascontiguousarray(want).reshape(-1)[start:stop].tobytes()
    assert View.of(view.to_dict(), "here") == View(
        view.axes if any(a is not None for a in view.axes) else (), view.order
    )


def test_rows_that_follow_each_other_are_read_at_once() -> None:
    reads: list[tuple[int, int]] = []
    view = View(((3, 4, 5, 0, 1, 7),))
    view.read(lambda at, out: reads.append((at, out.nbytes)), (8, 10), 1, 0, np.zeros(60, np.uint8))
    assert reads == [(30, 30), (0, 20), (70, 10)]


@pytest.mark.parametrize(
    ("view", "shape"),
    [
        (View((5,)), (5, 2)),
        (View((-1,)), (5, 2)),
        (View((range(3, 6),)), (5,)),
        (View(((0, 5),)), (5,)),
        (View(((0, -1),)), (5,)),
        (View((0,)), (0,)),
        (View((None, None)), (5,)),
        (View((), (0,)), (5, 2)),
        (View((0,), (1, 0)), (5, 2)),
    ],
)
def test_what_a_tensor_does_not_have_is_refused(view: View, shape: tuple[int, ...]) -> None:
    with pytest.raises(TwinmergeError, match="A view|The order of axes"):
        view.shape(shape)


@pytest.mark.parametrize(
    "raw", [[], {"rows": 1}, {"axes": 3}, {"axes": [1.5]}, {"axes": [True]}, {"order": ["0"]}, {"axes": [{"from": 0}]}]
)
def test_what_is_no_view_is_refused(raw: object) -> None:
    with pytest.raises(TwinmergeError, match="no view|no part of an axis"):
        View.of(raw, "plan.json")
