"""The picture of refusal: its points, the file, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread

from twinmerge.errors import TwinmergeError
from twinmerge.study.refusal_picture import draw_refusal
from twinmerge.twin.routers.kit.calibration import LEVELS, RouterReport
from twinmerge.twin.routers.kit.fit import fit_router
from twinmerge.twin.routers.kit.registry import make_router


@pytest.fixture(scope="module")
def report() -> RouterReport:
    owners = torch.arange(3).repeat_interleave(300)
    z = 2.5 * torch.eye(6)[owners] + torch.randn(900, 6, generator=torch.Generator().manual_seed(0))
    return fit_router(make_router("gaussian"), z, owners, ["a", "b", "c"], novel=6)


def test_points_are_those_of_the_report(report: RouterReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, ...]] = []
    plot = Axes.plot

    def keep(self: Any, *points: Any, **more: Any) -> Any:
        drawn.append(points)
        return plot(self, *points, **more)

    monkeypatch.setattr(Axes, "plot", keep)
    assert imread(draw_refusal(report, tmp_path / "a.png")).std() > 0
    (refused, right), (x, y, _) = drawn
    assert [each / 100 for each in refused] == pytest.approx([level[1] for level in report.refusal])
    assert [each / 100 for each in right] == pytest.approx([level[2] for level in report.refusal])
    at = LEVELS.index(0.02)
    assert (x, y) == (refused[at], right[at]) and report.refuse == 0.02
    assert len(set(refused)) > 5 and all(share <= 100 * level for share, level in zip(refused, LEVELS, strict=True))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_the_same_report_gives_the_same_file(report: RouterReport, tmp_path: Path, kind: str) -> None:
    files = [draw_refusal(each, tmp_path / f"{i}.{kind}") for i, each in enumerate((report, report._asdict()))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_nothing_to_draw_and_no_file_to_draw_to(report: RouterReport, tmp_path: Path) -> None:
    old = {name: value for name, value in report._asdict().items() if not name.startswith("refus")}
    for none in (report._replace(refusal=[]), report._replace(refusal=[[0.0, 0.0, 1.0]]), old):
        with pytest.raises(TwinmergeError, match="no refusal to draw"):
            draw_refusal(none, tmp_path / "a.png")
    with pytest.raises(TwinmergeError, match="of no known kind"):
        draw_refusal(report, tmp_path / "a.bmp")
    assert not list(tmp_path.iterdir())
