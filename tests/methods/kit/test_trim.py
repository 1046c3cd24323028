"""Model-wide trims: the sampled bracket, its fallback, and equal entries across tensors and tiles give one answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths import select
from twinmerge.methods.kit import trim
from twinmerge.methods.kit.base import Place, Tile
from twinmerge.methods.ties import Ties

SIZES = {"a": 5000, "b": 3, "c": 40_000, "d": 1}
NAMES = ("p", "q")


def model(kind: str, seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = {n: torch.randn(2, size, generator=g) for n, size in SIZES.items()}
    if kind == "equal":
        return {n: torch.ones_like(v) for n, v in x.items()}
    if kind == "ties":
        return {n: (v * 16).round() / 16 for n, v in x.items()}
    if kind == "zeros":
        return {n: torch.where(v.abs() > 1.5, v, torch.zeros_like(v)) for n, v in x.items()}
    return x


def tiles(x: dict[str, torch.Tensor], step: int) -> list[Tile]:
    return [
        Tile(v[:, at : at + step], torch.zeros(v[0, at : at + step].shape), Place(n, (v.shape[1],), at, NAMES))
        for n, v in x.items()
        for at in range(0, v.shape[1], step)
    ]


def kept(
    x: dict[str, torch.Tensor], density: float, step: int, scope: str = "model"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What the passes keep, and the names of those that ran."""
    method, known, ran = Ties(density=density), {}, []
    for each in trim.trim_passes(method, scope):
        wanted = each.wanted(known)
        total: dict = {}
        some = [t for t in tiles(x, step) if wanted is None or t.at.name in wanted]
        for tile in reversed(some):
            each.add(total, each.observe(tile, known))
        if some:
            known[each.name] = each.finish(total, known)
            ran.append(each.name)
    out: dict[str, list] = {}
    for tile in tiles(x, step):
        out.setdefault(tile.at.name, []).append(trim.trimmed(tile.x, tile, known).numpy())
    return {n: np.concatenate(parts, 1) for n, parts in out.items()}, ran


def by_sorting(x: dict[str, torch.Tensor], density: float) -> dict[str, np.ndarray]:
    flat = np.concatenate([x[n].numpy() for n in sorted(x)], 1).copy()
    for row in flat:
        row[np.argsort(-np.abs(row), kind="stable")[int(density * row.size + 1e-9) :]] = 0
    cuts = np.cumsum([x[n].shape[1] for n in sorted(x)])[:-1]
    return dict(zip(sorted(x), np.split(flat, cuts, 1), strict=True))


@pytest.mark.parametrize("step", [701, 65_536])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "equal"])
@pytest.mark.parametrize("way", ["bracket", "no shared values", "bracket too low", "values between", "no bracket"])
def test_every_way_keeps_what_a_stable_sort_keeps(monkeypatch, kind, density, step, way):
    plain = select.bracket

    def spoilt(sample, k, *widest):
        found = plain(sample, k, *widest)
        if way == "no bracket" or found is None:
            return None
        if way == "bracket too low":
            found = found._replace(low=found.low // 2, width=torch.ones_like(found.width))
        if way == "values between":
            found = found._replace(shift=found.shift + 3)
        return found._replace(shared=torch.full_like(found.shared, -1))

    if way != "bracket":
        monkeypatch.setattr(select, "bracket", spoilt)
    x = model(kind, 3)
    got, _ = kept(x, density, step)
    for name, want in by_sorting(x, density).items():
        np.testing.assert_array_equal(got[name], want)
    for name in ("b", "c") if density in (0.05, 0.5) else ():
        alone, _ = kept({name: x[name]}, density, step, "tensor")
        np.testing.assert_array_equal(alone[name], by_sorting({name: x[name]}, density)[name])


def test_a_good_sample_saves_the_histograms_and_the_count_of_ties():
    _, ran = kept(model("ties", 1), 0.2, 65_536)
    assert ran == ["trim_sketch", "trim_bracket", "trim_ties_by_tile"]
    _, ran = kept(model("plain", 1), 0.2, 65_536)
    assert ran == ["trim_sketch", "trim_bracket"]


def test_a_good_sample_saves_them_by_tensor_too():
    for kind in ("ties", "plain"):
        _, ran = kept({"c": model(kind, 1)["c"]}, 0.2, 65_536, "tensor")
        assert ran == ["trim_sketch", "trim_bracket"]
