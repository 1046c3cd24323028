"""The picture of shares: the bars' heights, the file, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.masks import Marks
from twinmerge.study.mask_shares import draw_shares

MARKS = Marks((1, 2, 1, 4), (3, 4, 5), 10)


def test_bars_are_shares_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    bar = Axes.bar

    def keep(self: Any, x: Any, height: Any, **more: Any) -> Any:
        drawn.append(list(height))
        return bar(self, x, height, **more)

    monkeypatch.setattr(Axes, "bar", keep)
    draw_shares({"sum $x$": MARKS, "ties": Marks((0, 3), (3,), 3)}, "t", tmp_path / "a.png")
    assert drawn == [[12.5, 25.0, 12.5, 50.0], [0.0, 100.0]]
    assert imread(tmp_path / "a.png").std() > 0


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_marks_give_the_same_file(tmp_path: Path, kind: str) -> None:
    files = [draw_shares({"m": MARKS}, "t", tmp_path / f"{i}.{kind}") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_many_tasks_are_drawn(tmp_path: Path) -> None:
    draw_shares({"m": Marks((1,) * 61, (30,) * 60, 61)}, "t", tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] < 16.1 * 150


def test_nothing_to_draw_and_no_file_to_draw_to(tmp_path: Path) -> None:
    with pytest.raises(TwinmergeError, match="no mark to draw"):
        draw_shares({"m": Marks.none(2)}, "t", tmp_path / "a.png")
    with pytest.raises(TwinmergeError, match="of no known kind"):
        draw_shares({"m": MARKS}, "t", tmp_path / "a.bmp")
