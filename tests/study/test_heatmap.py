"""The heat map: where each tensor stands, what each panel shows, and the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from twinmerge.engine.diff import Diff, diff
from twinmerge.errors import TwinmergeError
from twinmerge.study import heatmap
from twinmerge.study.heatmap import Cell, cells, check_picture, draw_heatmap

NAMES = [
    "embed.weight",
    "norm.bias",
    *(f"model.layers.{i}.{kind}" for i in range(3) for kind in ("attn.q_$proj.weight", "up.weight", "up.bias")),
]


def saved(folder: Path, seed: int, names: list[str] = NAMES) -> Path:
    """Matrices (4, 3) and vectors (4,); the embedding and the bias of layer 0 are the same for all."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn((4,) if n.endswith("bias") else (4, 3), generator=rng) for n in names}
    tensors |= {"embed.weight": torch.ones(4, 3), "model.layers.0.up.bias": torch.zeros(4)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [saved(tmp_path / name, seed) for seed, name in enumerate(("a", "b", "base"))]


@pytest.fixture(params=["plain", "based", "no rank"])
def found(request: pytest.FixtureRequest, models: list[Path]) -> Diff:
    return diff(*models[: 2 if request.param == "plain" else 3], rank=request.param != "no rank")


# ---------------------------------------------------------------------------------------------- cells


def test_cells_of_one_stack() -> None:
    at = cells(NAMES)
    assert at["embed.weight"] == Cell(-1, "embed.weight") and at["norm.bias"] == Cell(-1, "norm.bias")
    assert at["model.layers.2.attn.q_$proj.weight"] == Cell(2, "attn.q_$proj.weight")
    assert at["model.layers.0.up.bias"] == Cell(0, "up.bias")


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["encoder.layer.11.x.0.w", "encoder.layer.2.x.1.w"], [Cell(11, "x.0.w"), Cell(2, "x.1.w")]),
        (["encoder.block.0.w", "decoder.block.1.w"], [Cell(0, "encoder.*.w"), Cell(1, "decoder.*.w")]),
        (["m.text.layers.0.w", "m.vision.layers.0.w"], [Cell(0, "text.*.w"), Cell(0, "vision.*.w")]),
        (["0.w", "2.w", "w2.v"], [Cell(0, "w"), Cell(2, "w"), Cell(-1, "w2.v")]),
        (["layers.0.x.w", "layers.x.0.w"], [Cell(0, "x.w"), Cell(0, "x.*.w")]),
        (["layers.3"], [Cell(3, "")]),
        ([], []),
    ],
)
def test_cells(names: list[str], want: list[Cell]) -> None:
    assert cells(names) == dict(zip(names, want, strict=True))


def test_no_two_tensors_share_a_cell() -> None:
    names = ["a.0.x.w", "a.x.0.w", "b.a.0.x.w", "a.a.0.x.w", "a.a.0.w", "x.w", "a.x.w"]
    assert len(set(cells(names).values())) == len(names)


# --------------------------------------------------------------------------------------------- panels


def test_panels_hold_the_numbers_of_the_diff(found: Diff) -> None:
    panels = heatmap._panels(found)
    relative, conflicts, *ranks = panels
    assert relative.values == {d.name: d.relative for d in found.tensors} and relative.values["embed.weight"] == 0
    by_name = {d.name: d for d in found.tensors}
    signless = {"model.layers.0.up.bias"} | ({"embed.weight"} if found.base else set())
    assert conflicts.values == {n: 100 * d.conflicts for n, d in by_name.items() if n not in signless}
    assert conflicts.scale == ("fifty" if found.base else "zero")
    matrices = {n: d for n, d in by_name.items() if len(d.shape) == 2}
    fields = [f for f in ("rank", "rank_a", "rank_b") if getattr(by_name["embed.weight"], f) is not None]
    assert [p.values for p in ranks] == [
        {n: pytest.approx(100 * getattr(d, f) / 3) for n, d in matrices.items()} for f in fields
    ]
    assert len({tuple(p.span) for p in ranks}) <= 1  # one scale for what is compared


# ----------------------------------------------------------------------------------------------- file


@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")])
def test_files_are_written_and_the_same_again(models: list[Path], tmp_path: Path, suffix: str, starts: bytes) -> None:
    found = diff(*models)
    one, two = (draw_heatmap(found, tmp_path / f"{n}{suffix}").read_bytes() for n in ("one", "two"))
    assert one == two and one.startswith(starts) and len(one) > 5000


def test_pictures_of_every_kind(found: Diff, tmp_path: Path) -> None:
    image = imread(draw_heatmap(found, tmp_path / "diff.png"))
    assert image.shape[0] > 300 and image.shape[1] > 600 and image.std() > 0.05


def test_models_of_many_layers_stay_within_a_page(tmp_path: Path) -> None:
    names = [f"h.{i}.w.bias" for i in range(90)] + [f"h.{i}.v.bias" for i in range(0, 90, 2)]
    found = diff(*(saved(tmp_path / n, i, names) for i, n in enumerate("ab")))
    image = imread(draw_heatmap(found, str(tmp_path / "diff.png")))
    assert image.shape[1] <= 1.3 * heatmap.WIDEST * heatmap.DPI and image.shape[0] < image.shape[1]


def test_equal_models_and_one_tensor_are_drawn(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(3)}, tmp_path / name / "model.safetensors")
    a, b = tmp_path / "a", tmp_path / "b"
    for models in ((a, b), (a, b, a)):
        assert draw_heatmap(diff(*models), tmp_path / "same.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------- mistakes


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    for file, says in (
        ("diff.gif", r"diff.gif is of no known kind. End its name in .png, .svg, .pdf"),
        ("diff", "is of no known kind"),
        ("no/diff.png", "cannot be written. Name a file in a folder that is there"),
        ("folder.png", "cannot be written"),
    ):
        with pytest.raises(TwinmergeError, match=says):
            check_picture(tmp_path / file)
    check_picture(tmp_path / "diff.png")
    monkeypatch.setattr(heatmap, "find_spec", lambda _: None)
    with pytest.raises(TwinmergeError, match=r"needs matplotlib. Install it: pip install 'twinmerge\[plots\]'"):
        check_picture(tmp_path / "diff.png")


def test_nothing_to_draw(tmp_path: Path, models: list[Path]) -> None:
    nothing: Any = diff(*models)._replace(tensors=[])
    with pytest.raises(TwinmergeError, match="no tensor to draw"):
        draw_heatmap(nothing, tmp_path / "diff.png")
    assert not (tmp_path / "diff.png").exists()
