"""Model-wide trims: the sampled bracket, its fallback, and equal entries across tensors and tiles give one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch

from twinmerge.maths import fused, select
from twinmerge.maths.rule import Values
from twinmerge.methods.kit import trim
from twinmerge.methods.kit.base import Known, Method, Pass, Place, Scope, Stored, Tile, moved, weighted_sum
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


def tiles(x: dict[str, torch.Tensor], step: int, stored: bool = False) -> list[Tile]:
    """As torch has them; or as they lie in files of float32, which no torch is asked for."""
    if stored:
        places = [(n, at) for n, v in x.items() for at in range(0, v.shape[1], step)]
        return [
            Tile.of(
                lambda: pytest.fail("a tensor was asked for"),
                Place(n, (x[n].shape[1],), at, NAMES),
                Stored(None, tuple(Values(memory(row[at : at + step]), "F32") for row in x[n])),
            )
            for n, at in places
        ]
    return [
        Tile(v[:, at : at + step], torch.zeros(v[0, at : at + step].shape), Place(n, (v.shape[1],), at, NAMES))
        for n, v in x.items()
        for at in range(0, v.shape[1], step)
    ]


def memory(row: torch.Tensor) -> np.ndarray:
    return row.contiguous().numpy().view(np.uint8)


def kept(
    x: dict[str, torch.Tensor], density: float, step: int, scope: str = "model"
) -> tuple[dict[str, np.ndarray], list[str]]:
    """What the passes keep, and the names of those that ran."""
    known, ran = passed(Ties(density=density), x, step, scope)
    return whole(x, step, lambda tile: trim.trimmed(tile.x, tile, known)), ran


def passed(
    method: trim.Trims, x: dict[str, torch.Tensor], step: int, scope: Scope, stored: bool = False
) -> tuple[Known, list[str]]:
    """What the passes find, and the names of those that ran."""
    known, ran = Known(), []
    for each in trim.trim_passes(method, scope):
        wanted = each.wanted(known)
        total: dict = {}
        some = [t for t in tiles(x, step, stored) if wanted is None or t.at.name in wanted]
        for tile in reversed(some):
            each.add(total, each.observe(tile, known))
        if some:
            known[each.name] = each.finish(total, known)
            ran.append(each.name)
    return known, ran


def whole(x: dict[str, torch.Tensor], step: int, kept_of: Callable[[Tile], torch.Tensor]) -> dict[str, np.ndarray]:
    """The tiles put together again."""
    out: dict[str, list[np.ndarray]] = {}
    for tile in tiles(x, step):
        out.setdefault(tile.at.name, []).append(kept_of(tile).numpy())
    return {n: np.concatenate(parts, 1) for n, parts in out.items()}


def by_sorting(x: dict[str, torch.Tensor], density: float, cut: float = 0.0) -> dict[str, np.ndarray]:
    """The `density` largest entries of each expert but for the `cut` largest."""
    flat = np.concatenate([x[n].numpy() for n in sorted(x)], 1).copy()
    for row in flat:
        order = np.argsort(-np.abs(row), kind="stable")
        row[order[int(density * row.size + 1e-9) :]] = 0
        row[order[: int(cut * row.size + 1e-9)]] = 0
    cuts = np.cumsum([x[n].shape[1] for n in sorted(x)])[:-1]
    return dict(zip(sorted(x), np.split(flat, cuts, 1), strict=True))


@pytest.mark.parametrize("step", [701, 65_536])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "equal"])
@pytest.mark.parametrize("way", ["bracket", "no shared values", "bracket too low", "values between", "no bracket"])
@pytest.mark.few(20)
def test_every_way_keeps_what_a_stable_sort_keeps(monkeypatch, kind, density, step, way):
    plain = select.bracket

    def spoilt(sample, k, *widest):
        found = plain(sample, k, *widest)
        if way == "no bracket" or found is None:
            return None
        if way == "bracket too low":
            found = found._replace(low=found.low // 2, width=np.ones_like(found.width))
        if way == "values between":
            found = found._replace(shift=found.shift + 3)
        return found._replace(shared=np.full_like(found.shared, -1))

    if way != "bracket":
        monkeypatch.setattr(select, "bracket", spoilt)
    x = model(kind, 3)
    got, _ = kept(x, density, step)
    for name, want in by_sorting(x, density).items():
        np.testing.assert_array_equal(got[name], want)
    for name in ("b", "c") if density in (0.05, 0.5) else ():
        alone, _ = kept({name: x[name]}, density, step, "tensor")
        np.testing.assert_array_equal(alone[name], by_sorting({name: x[name]}, density)[name])


@pytest.mark.skipif(not fused.available(), reason="the library was not compiled: no C compiler")
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "equal"])
@pytest.mark.parametrize("way", ["bracket", "no shared values", "no bracket"])
def test_stored_values_have_the_thresholds_of_tensors(monkeypatch, kind, way):
    plain = select.bracket

    def spoilt(*sample):
        found = plain(*sample)
        return None if way == "no bracket" or found is None else found._replace(shared=np.full_like(found.shared, -1))

    if way != "bracket":
        monkeypatch.setattr(select, "bracket", spoilt)
    x = model(kind, 3)
    for density, scope, names in [(0.05, "model", x), (0.5, "model", x), (0.0, "model", x), (0.2, "tensor", ["c"])]:
        own = {n: x[n] for n in names}
        (one, ran), (other, others) = (passed(Ties(density=density), own, 65_536, scope, s) for s in (False, True))
        assert ran == others
        for tile in tiles(own, 65_536):
            assert trim.trim_rule(tile.at, one) == trim.trim_rule(tile.at, other)


def test_a_good_sample_saves_the_histograms_and_the_count_of_ties():
    _, ran = kept(model("ties", 1), 0.2, 65_536)
    assert ran == ["trim_sketch", "trim_bracket", "trim_ties_by_tile"]
    _, ran = kept(model("plain", 1), 0.2, 65_536)
    assert ran == ["trim_sketch", "trim_bracket"]


def test_a_good_sample_saves_them_by_tensor_too():
    for kind in ("ties", "plain"):
        _, ran = kept({"c": model(kind, 1)["c"]}, 0.2, 65_536, "tensor")
        assert ran == ["trim_sketch", "trim_bracket"]


class Band(Method):
    """θ0 + λ Σ of the entries between two ranks of each task vector: a method with two thresholds for each expert."""

    cut: float = 0.01
    keep: float = 0.2
    scope: Scope = "model"
    scale: float = 1.0

    trims_stored: ClassVar[bool] = True
    counts_zeros: ClassVar[bool] = True

    def trimmed_quantity(self, tile: Tile, known: Known) -> torch.Tensor:
        return tile.x

    def keep_counts(self, totals: select.Counts) -> select.Counts:
        counts = [[select.keep_count(share, size) for share in (self.cut, self.keep)] for size in totals.tolist()]
        return np.array(counts)

    def passes(self) -> Sequence[Pass]:
        return trim.trim_passes(self, self.scope)

    def between(self, tile: Tile, known: Known) -> torch.Tensor:
        return trim.trimmed(tile.x, tile, known, threshold=1) - trim.trimmed(tile.x, tile, known, threshold=0)

    def apply(self, tile: Tile, known: Known) -> torch.Tensor:
        return moved(tile, weighted_sum(1.0, self.between(tile, known), tile.work), self.scale)


BANDS = [(0.01, 0.2), (0.2, 0.2), (0.05, 0.95), (0.0, 0.3), (0.3, 1.0), (0.0001, 0.5)]


@pytest.mark.parametrize("step", [701, 65_536])
@pytest.mark.parametrize("cut, keep", BANDS)
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "equal"])
@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.few(12)
def test_two_thresholds_of_each_expert_keep_what_a_stable_sort_keeps(monkeypatch, kind, cut, keep, step, sampled):
    if not sampled:
        monkeypatch.setattr(select, "bracket", lambda *_: None)
    x, method = model(kind, 4), Band(cut=cut, keep=keep)
    known, _ = passed(method, x, step, "model")
    got = whole(x, step, lambda tile: method.between(tile, known))
    for name, want in by_sorting(x, keep, cut).items():
        np.testing.assert_array_equal(got[name], want)
    for name in ("b", "c"):
        alone = {name: x[name]}
        known, _ = passed(method, alone, step, "tensor")
        got = whole(alone, step, lambda tile, known=known: method.between(tile, known))
        np.testing.assert_array_equal(got[name], by_sorting(alone, keep, cut)[name])


def test_two_thresholds_take_no_more_passes_than_one():
    for kind in ("plain", "ties"):
        assert passed(Band(), model(kind, 1), 65_536, "model")[1] == kept(model(kind, 1), 0.2, 65_536)[1]
