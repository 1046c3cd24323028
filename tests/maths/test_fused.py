"""The compiled library against the torch path: the same bits for every rule, dtype and instruction set."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from twinmerge.engine.rounding import Rounding, erased
from twinmerge.errors import TwinmergeError
from twinmerge.maths import fused, keyed_random, select, sums
from twinmerge.maths.bits import pack
from twinmerge.maths.fused import CODES, gram, in_bracket, masks, merge, norms, staged
from twinmerge.maths.keyed_random import philox_key, uniform
from twinmerge.maths.ranks import DRAWS, Ranks, band, rising
from twinmerge.maths.rule import Drop, Elect, Mark, Outcome, Ranked, Rule, Select, Trim, Values
from twinmerge.methods.average import Average
from twinmerge.methods.breadcrumbs_ties import BreadcrumbsTies
from twinmerge.methods.consensus import Consensus
from twinmerge.methods.dare import Dare
from twinmerge.methods.dare_ties import DareTies
from twinmerge.methods.della import Della
from twinmerge.methods.della_linear import DellaLinear
from twinmerge.methods.emr import Emr
from twinmerge.methods.kit.base import Known, Method, Place, Tile
from twinmerge.methods.kit.masks import Marks, MaskMethod
from twinmerge.methods.magmax import Magmax
from twinmerge.methods.nearswap import Nearswap
from twinmerge.methods.ram_plus import Overlaps, RamPlus
from twinmerge.methods.sce import Sce, deviations
from twinmerge.methods.tall_masks import TallMasks
from twinmerge.methods.task_arithmetic import TaskArithmetic
from twinmerge.methods.ties import Majority, Ties

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BYTES = {"BF16": 2, "F16": 2, "F32": 4}
ALL = 1 << 62
COMPILER = os.environ.get("CC") or (sysconfig.get_config_var("CC") or "cc").split()[0]

compiled = pytest.mark.skipif(not fused.available(), reason="the library was not compiled: no C compiler")


@pytest.mark.skipif(not shutil.which(COMPILER.split()[0]), reason="no C compiler")
def test_it_is_there_wherever_there_is_a_compiler() -> None:
    assert fused.available(), "install again: pip install -e ."


@pytest.fixture(
    autouse=True, scope="module", params=[0, pytest.param(1, marks=pytest.mark.slow), 2], ids=["any", "AVX2", "AVX-512"]
)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each instruction set that this machine has."""
    library = fused._library()
    if library is None:
        if request.param:
            pytest.skip("the library was not compiled")
        yield
        return
    if library.twinmerge_fused_level(request.param) != request.param:
        library.twinmerge_fused_level(-1)
        pytest.skip("this machine does not have it")
    yield
    library.twinmerge_fused_level(-1)


# -------------------------------------------------------------------------------------------- what the torch path gives


class TrimmedTies(Ties):
    """TIES with thresholds and rooms that are given."""

    def left(self, tile: Tile, known: Known) -> Tensor:
        return trimmed(self.trimmed_quantity(tile, known), known["trim"])


class TrimmedDareTies(DareTies):
    def left(self, tile: Tile, known: Known) -> Tensor:
        return trimmed(self.trimmed_quantity(tile, known), known["trim"])


class TrimmedBand(BreadcrumbsTies):
    """The same with a second trim, whose entries are cut, and with factors."""

    def left(self, tile: Tile, known: Known) -> Tensor:
        return trimmed(tile.x, known["trim"]).masked_fill_(trimmed(tile.x, known["cut"]) != 0, 0.0)

    def factors(self, count: int, known: Known) -> tuple[float, ...]:
        return known["factors"]


class SelectedSce(Sce):
    """SCE with a threshold and a room that are given."""

    def selected(self, tile: Tile, known: Known) -> Tensor:
        select = known["select"]
        return tile.x.masked_fill(trimmed(deviations(tile.x)[None], Trim(*[(of,) for of in select])) == 0, 0.0)


def trimmed(x: Tensor, trim: Trim | None) -> Tensor:
    if trim is None:
        return x
    out = torch.empty_like(x)
    for row, to, bits, room in zip(x, out, trim.thresholds, trim.rooms, strict=True):
        select.keep_above(row, bits, room, to)
    return out


def numbers(values: Values) -> Tensor:
    dtype = DTYPES[values.code]
    return torch.from_numpy(values.memory).view(dtype) if len(values.memory) else torch.empty(0, dtype=dtype)


def memory(x: Tensor) -> NDArray[np.uint8]:
    return x.view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)


def deltas(base: Values | None, experts: Sequence[Values]) -> tuple[Tensor, Tensor | None]:
    x = torch.stack([numbers(e).float() for e in experts])
    return (x, None) if base is None else (x - numbers(base).float(), numbers(base).float())


def by_torch(
    method: Method,
    known: Known,
    base: Values | None,
    experts: Sequence[Values],
    code: str,
    offset: int = 0,
    length: int = 0,
) -> tuple[NDArray[np.uint8] | None, Outcome]:
    """What the engine does tile by tile; no bytes where it refuses the result. length: of rows, if there are any."""
    x, theirs = deltas(base, experts)
    wide = "F32" in [v.code for v in (*experts, *([] if base is None else [base]))]
    shape = (-1, length) if length else (x.shape[1],)
    x, theirs = x.reshape(len(x), *shape), None if theirs is None else theirs.reshape(shape)
    place = Place("w", tuple(x.shape[1:]), offset, tuple("abcdefghij"[: len(experts)]))
    tile = Tile(x, theirs, place, torch.float64 if wide else torch.float32)
    merged, rounding = method.apply(tile, known), Rounding(code)
    try:
        out = rounding.of(merged, tile, method)
    except TwinmergeError:
        return None, Outcome(0, 0, True, False)
    return memory(out), Outcome(*erased(merged, out, tile, rounding), True, True)


def agree(
    method: Method,
    rule: Rule,
    known: Known,
    base: Values | None,
    experts: Sequence[Values],
    code: str,
    offset: int = 0,
    length: int = 0,
) -> None:
    """The library gives the bits and the counts that the method gives."""
    size = numbers(experts[0]).numel()
    out = empty(size, code)
    found = merge(rule, base, experts, out, offset)
    expected, outcome = by_torch(method, known, base, experts, code, offset, length)
    assert found.sound
    if rule.scale == 0 and expected is None:
        return  # of a delta that overflows float32, torch makes 0 · infinity = NaN; the library leaves the base as it is
    assert found.fits == outcome.fits
    if expected is not None:
        assert found == outcome
        kind = np.uint32 if code == "F32" else np.uint16
        np.testing.assert_array_equal(out.memory.view(kind), expected.view(kind))


# -------------------------------------------------------------------------------------------------------- what is merged


def empty(size: int, code: str) -> Values:
    return Values(np.empty(size * DTYPES[code].itemsize, np.uint8), code)


def stored(x: Any, code: str) -> Values:
    return Values(memory(torch.as_tensor(np.asarray(x, np.float32)).to(DTYPES[code])), code)


def finite(values: Values, limit: float = math.inf) -> Values:
    """With zeros for NaN, infinity and what is beyond the limit."""
    x = numbers(values)
    x[~(x.float().abs() < limit)] = 0
    return values


Kind = Literal["near", "bits", "huge"]


def models(seed: int, size: int, codes: Sequence[str], kind: Kind) -> list[Values]:
    """near: fine-tuned from the first, with equal and zero entries; bits: any finite numbers; huge: also such that
    overflow."""
    rng = np.random.default_rng(seed)
    if kind != "near":
        random = [Values(rng.integers(0, 256, size * DTYPES[c].itemsize, np.uint8), c) for c in codes]
        return [finite(v, 1e12 if kind == "bits" else math.inf) for v in random]
    first = rng.normal(size=size) * 0.02
    first[rng.random(size) < 0.1] = 0.0
    first[rng.random(size) < 0.1] = -0.0
    rows = [first]
    for _ in codes[1:]:
        moved = first + rng.choice([0.0, 1e-7, 1e-3], size) * rng.integers(-8, 9, size)
        rows.append(np.where(rng.random(size) < 0.2, first, moved))
    return [stored(row, code) for row, code in zip(rows, codes, strict=True)]


@st.composite
def merges(draw: st.DrawFn) -> tuple[Values, list[Values], str]:
    """base, experts, code of the output."""
    codes = draw(
        st.lists(st.sampled_from(CODES), min_size=2, max_size=6) | st.integers(2, 6).map(lambda n: ["BF16"] * n)
    )
    size = draw(st.sampled_from([0, 1, 7, 64, 1023, 4097, 65_536 + 13]) | st.integers(0, 5000))
    base, *experts = models(draw(st.integers(0, 1 << 32)), size, codes, draw(st.sampled_from(["near", "bits", "huge"])))
    return base, experts, draw(st.sampled_from(CODES))


WEIGHT = st.sampled_from([1.0, 0.3, -0.7, 0.0, 2.0, 1e-3]) | st.floats(-4, 4, allow_subnormal=False)
SCALE = st.sampled_from([1.0, 0.4, 0.0, -0.3]) | st.floats(-2, 2, allow_subnormal=False)


def at_most(examples: int) -> settings:
    """So many with the slow tests, else two fifths of them (tests/conftest.py)."""
    return settings(deadline=None, max_examples=examples * settings().max_examples // 100)


FEW = at_most(60)


def weights_of(data: st.DataObject, count: int) -> tuple[float, ...]:
    return data.draw(st.tuples(*[WEIGHT] * count) | st.just((1.0,) * count), "weights")


def key_of(expert: str, tensor: str = "w", seed: int = 5) -> tuple[int, int]:
    return keyed_random.philox_key(seed, expert, tensor)


def thresholds_of(data: st.DataObject, x: Tensor) -> Trim:
    """Of each expert: some entry's magnitude, or an end of the range; room for some of those that equal it."""
    bits, rooms = [], []
    for row in x:
        sizes = select.magnitude_bits(row[None])[0].tolist()
        ends = st.sampled_from([0, 1, 0x7FFF_FFFF])
        bits.append(data.draw(ends if not sizes else st.integers(0, len(sizes) - 1).map(sizes.__getitem__) | ends))
        equal = sizes.count(bits[-1])
        rooms.append(data.draw(st.sampled_from([0, 1, equal // 2, max(0, equal - 1), equal, equal + 1, ALL])))
    return Trim(tuple(bits), tuple(rooms))


# ------------------------------------------------------------------------------------------------------------ the rules


@compiled
@FEW
@given(case=merges(), data=st.data())
def test_task_arithmetic(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    weights, scale = weights_of(data, len(experts)), data.draw(SCALE)
    method = TaskArithmetic(weights=weights, scale=scale)
    agree(method, Rule(weights, deltas=True, scale=scale), {}, base, experts, code)


@compiled
@FEW
@given(case=merges(), data=st.data())
def test_average(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    _, experts, code = case
    weights = weights_of(data, len(experts))
    if abs(sum(weights)) < 1e-6:
        weights = (*weights[:-1], weights[-1] + 1.0)
    agree(Average(weights=weights), Rule(weights, deltas=False, divisor=sum(weights)), {}, None, experts, code)


@compiled
@FEW
@given(case=merges(), data=st.data())
def test_dare(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count = len(experts)
    weights, scale, offset = weights_of(data, count), data.draw(SCALE), data.draw(st.integers(0, 1 << 40))
    shares = data.draw(st.tuples(*[st.sampled_from([0.0, 0.5, 0.1, 1 - 1e-9, 1.0])] * count))
    method = Dare(weights=weights, scale=scale, density=shares, rescale="none", seed=5)
    drop = Drop(tuple(map(key_of, "abcdefghij"[:count])), shares, (1.0,) * count)
    agree(method, Rule(weights, deltas=True, scale=scale, drop=drop), {}, base, experts, code, offset)


@compiled
@at_most(200)
@given(case=merges(), data=st.data())
def test_ties(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count = len(experts)
    weights, scale = weights_of(data, count), data.draw(SCALE)
    how: Literal["mean", "sum", "max"] = data.draw(st.sampled_from(["mean", "sum", "max"]))
    majority = data.draw(st.sampled_from([-1, 0, 1]))
    both_signs = how == "mean" and min(weights) < 0 < max(weights)  # of which mergekit leaves some sums undivided
    mergekit = not both_signs and data.draw(st.booleans())
    trim = thresholds_of(data, deltas(base, experts)[0]) if data.draw(st.booleans()) else None
    if mergekit:
        tie, votes, flip = 1, weights, tuple(w < 0 for w in weights)
    else:
        tie, votes, flip = majority, (1.0,) * count, (False,) * count
    method = TrimmedTies(
        weights=weights,
        scale=scale,
        merge=how,
        tie="positive" if mergekit else "majority",
        compat="mergekit" if mergekit else "paper",
    )
    elect = Elect(how, votes, tie, flip, rounds=mergekit)
    rule = Rule(weights, deltas=True, scale=scale, trim=trim, elect=elect)
    agree(method, rule, Known({"trim": trim, Majority.name: majority}), base, experts, code)


@compiled
@pytest.mark.parametrize("rounds", [True, False])
def test_a_vote_that_is_no_number_does_not_fit(rounds: bool) -> None:
    """Of a delta that overflows float32 and has weight 0 the vote is 0 · infinity: it has no sign, as in torch."""
    base, expert = (Values(memory(torch.tensor([x, 1.0], dtype=torch.bfloat16)), "BF16") for x in (3e38, -3e38))
    elect = Elect("mean", (0.0,), 1, (False,), rounds)
    found = merge(Rule((0.0,), deltas=True, elect=elect), base, [expert], empty(2, "BF16"))
    assert found.sound and not found.fits


@compiled
@at_most(100)
@given(case=merges(), data=st.data())
def test_dare_ties(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count = len(experts)
    weights, scale, offset = weights_of(data, count), data.draw(SCALE), data.draw(st.integers(0, 1 << 40))
    shares = data.draw(st.tuples(*[st.sampled_from([0.3, 0.5, 0.9, 1.0])] * count))
    method = TrimmedDareTies(weights=weights, scale=scale, density=shares, seed=5)
    drop = Drop(tuple(map(key_of, "abcdefghij"[:count])), shares, tuple(1 / share for share in shares))
    trim = thresholds_of(data, deltas(base, experts)[0]) if data.draw(st.booleans()) else None
    elect = Elect("mean", (1.0,) * count, 0, (False,) * count)
    rule = Rule(weights, deltas=True, scale=scale, drop=drop, trim=trim, elect=elect)
    agree(method, rule, Known(trim=trim), base, experts, code, offset)


FACTOR = st.sampled_from([1.0, 0.5, 2.0, 1.7])


@compiled
@settings(FEW, max_examples=25)
@given(case=merges(), data=st.data())
def test_band_of_magnitudes(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count, x = len(experts), deltas(base, experts)[0]
    weights, scale = weights_of(data, count), data.draw(SCALE)
    trim, cut = thresholds_of(data, x), thresholds_of(data, x)
    pairs = zip(trim.thresholds, trim.rooms, cut.thresholds, cut.rooms, strict=True)
    order = [((-a, b), (-c, d)) for a, b, c, d in pairs]  # what is cut must be kept first
    trim, cut = (Trim(*zip(*[(-t, room) for t, room in map(which, order)], strict=True)) for which in (max, min))
    factors = data.draw(st.tuples(*[FACTOR] * count))
    how: Literal["mean", "sum", "max"] = data.draw(st.sampled_from(["mean", "sum", "max"]))
    method = TrimmedBand(weights=weights, scale=scale, merge=how)
    elect = Elect(how, (1.0,) * count, 0, (False,) * count)
    rule = Rule(weights, deltas=True, scale=scale, trim=trim, cut=cut, factors=factors, elect=elect)
    known = Known(trim=trim, cut=cut, factors=factors)
    agree(method, rule, known, base, experts, code)
    left, sound = staged(rule, base, experts)
    expected = trimmed(x, trim).masked_fill_(trimmed(x, cut) != 0, 0.0).double()
    expected *= torch.tensor(factors, dtype=torch.float64)[:, None]
    assert sound
    if "F32" in [v.code for v in (base, *experts)]:  # else a product of float32
        np.testing.assert_array_equal(left, expected.float().numpy())


@st.composite
def rows(draw: st.DrawFn) -> tuple[Values, list[Values], str, int]:
    """base, experts, code of the output, length of a row."""
    codes = draw(st.lists(st.sampled_from(CODES), min_size=2, max_size=4) | st.just(["BF16"] * 3))
    length = draw(st.sampled_from([1, 2, 31, 32, 33, 1023, 1024, 2500]) | st.integers(1, 3000))
    size = length * draw(st.integers(1, max(1, min(20, 4000 // length))))
    base, *experts = models(draw(st.integers(0, 1 << 32)), size, codes, draw(st.sampled_from(["near", "bits", "huge"])))
    return base, experts, draw(st.sampled_from(CODES)), length


@compiled
@settings(FEW, max_examples=25)
@given(case=rows(), data=st.data())
def test_rows_by_rank(case: tuple[Values, list[Values], str, int], data: st.DataObject) -> None:
    base, experts, code, length = case
    count = len(experts)
    weights, scale, row = weights_of(data, count), data.draw(SCALE), data.draw(st.integers(0, 1 << 20))
    shares = data.draw(st.tuples(*[st.sampled_from([0.0, 0.3, 0.5, 1.0])] * count))
    rescale: Any = data.draw(st.sampled_from(["inverse_keep", "none"]))
    own = {"weights": weights, "scale": scale, "density": shares, "epsilon": 0.2, "seed": 5, "rescale": rescale}
    place = Place("w", (1 << 21, length), row * length, tuple("abcdefghij"[:count]))
    for method in (DellaLinear(**own), Della(**own)):
        rule = method.rule(place, Known())
        assert rule is not None
        agree(method, rule, Known(), base, experts, code, row * length, length)
    cut, keep = data.draw(st.tuples(st.integers(0, length), st.integers(0, length)))
    crumbs = BreadcrumbsTies(scope="row", density=keep / length, gamma=cut / length, weights=weights, scale=scale)
    ranked = Ranked((band(length, *crumbs.counts(length, keep / length, cut / length)),) * count)
    elect = Elect("mean", (1.0,) * count, 0, (False,) * count)
    if not crumbs.all_kept:
        agree(crumbs, Rule(weights, True, scale, elect=elect, ranked=ranked), Known(), base, experts, code, 0, length)


@compiled
@settings(FEW, max_examples=25)
@given(case=merges(), data=st.data())
def test_selection_by_spread(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count, x = len(experts), deltas(base, experts)[0]
    trim = thresholds_of(data, deviations(x)[None])
    select = Select(trim.thresholds[0], trim.rooms[0])
    weights = data.draw(st.tuples(*[st.sampled_from([0.0, 1e-9, 0.25, 0.5])] * count))
    compat: Any = data.draw(st.sampled_from(["paper", "mergekit"]))
    method = SelectedSce(scale=data.draw(SCALE), compat=compat)
    theirs = compat == "mergekit"
    elect = Elect("mean", (1.0,) * count, int(theirs), (False,) * count, theirs, method.least)
    rule = Rule(weights, deltas=True, scale=method.scale, elect=elect, select=select)
    known = Known(select=select, sce_weights=weights)
    agree(method, rule, known, base, experts, code)
    left, sound = staged(rule, base, experts)
    place = Place("w", (x.shape[1],), 0, tuple("abcdefghij"[:count]))
    assert sound
    np.testing.assert_array_equal(left, method.selected(Tile(x, None, place), known).numpy())
    np.testing.assert_array_equal(fused.spread(x.numpy()), deviations(x).numpy())


@compiled
@settings(FEW, max_examples=25)
@given(case=merges(), data=st.data(), epsilon=st.sampled_from([0.0, 1e-5, 1e-3, 1.0]))
def test_overlaps(case: tuple[Values, list[Values], str], data: st.DataObject, epsilon: float) -> None:
    base, experts, code = case
    overlaps = data.draw(st.tuples(*[st.sampled_from([0.0, 0.25, 3.0])] * len(experts)))
    method, known = RamPlus(epsilon=epsilon, scale=data.draw(SCALE)), Known({Overlaps.name: overlaps})
    place = Place("w", (numbers(base).numel(),), 0, tuple("abcdefghij"[: len(experts)]))
    agree(method, method.rule(place, known), known, base, experts, code)


@compiled
@pytest.mark.parametrize("length", [1, 31, 32, 1023, 1024, 1025, 40_000])
def test_rows_of_equal_magnitudes_are_in_order(length: int) -> None:
    x = np.where(np.arange(length) % 3 == 0, -1.0, 1.0).astype(np.float32)
    rule = Rule((1.0,), False, ranked=Ranked((band(length, length // 4, length // 2),)))
    left, _ = staged(rule, None, [stored(x, "F32")])
    assert np.flatnonzero(left[0]).tolist() == list(range(length // 4, length // 4 + length // 2))


@compiled
@pytest.mark.parametrize("code", CODES)
def test_one_model_alone_is_copied(code: str) -> None:
    """Every number of 16 bits, and as many of float32, at odd addresses."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    raw = (bits << 16 | bits).view(np.uint8) if code == "F32" else bits.astype(np.uint16).view(np.uint8)
    width, nan = raw.size >> 16, np.full(raw.size + 1, 0xFF, np.uint8)
    finite = np.isfinite(numbers(Values(raw, code)).double().numpy())
    rule = Rule((0.0, 1.0), deltas=False, only=1)

    def copied(some: NDArray[np.uint8], to: str) -> tuple[Outcome, NDArray[np.uint8]]:
        odd, out = np.concatenate([nan[:1], some])[1:], np.empty(some.size // width * BYTES[to] + 1, np.uint8)[1:]
        others = Values(nan[1 : 1 + some.size], code)
        return merge(rule, None, [others, Values(odd, code)], Values(out, to)), out

    sound = raw.reshape(-1, width)[finite].reshape(-1)
    outcome, out = copied(sound, code)
    assert outcome == (0, 0, True, True)
    assert out.tobytes() == sound.tobytes()
    outcome, out = copied(sound, "F32")
    assert outcome == (0, 0, True, True)
    torch.testing.assert_close(
        torch.from_numpy(out.copy()).view(torch.float32), numbers(Values(sound, code)).float(), rtol=0, atol=0
    )
    for at in np.flatnonzero(~finite)[::97]:
        outcome, _ = copied(np.concatenate([sound[: 64 * width], raw[at * width : (at + 1) * width]]), code)
        assert not outcome.sound


ROWS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "normal": lambda draw, n: draw.standard_normal(n),
    "few values": lambda draw, n: np.round(3 * draw.standard_normal(n)),
    "zeros and a few": lambda draw, n: np.where(draw.random(n) < 0.9, 0, draw.standard_normal(n)),
    "one": lambda draw, n: np.full(n, -2.5),
    "all sizes": lambda draw, n: np.exp(30 * draw.standard_normal(n)).clip(1e-44, 3e38),
    "subnormal": lambda draw, n: 1e-42 * draw.standard_normal(n),
    "close": lambda draw, n: 1 + 1e-6 * draw.random(n),
    "many of each": lambda draw, n: draw.choice(np.exp(2 * draw.standard_normal(3000)), n),
    "one far off": lambda draw, n: np.where(np.arange(n) == n // 2, 1e30, 1e-5 * draw.standard_normal(n)),
    "falling": lambda draw, n: -np.sort(-np.abs(draw.standard_normal(n))),
}
"""Rows that a sort may stumble over."""


@compiled
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("rising_", [True, False])
def test_every_rank_by_a_stable_sort(kind: str, rising_: bool) -> None:
    draw = np.random.default_rng(0)
    for length in (1, 31, 32, 100, 4096, 70_000):
        row = ROWS[kind](draw, length).astype(np.float32)
        factors, below = draw.random(length) + 0.5, np.where(draw.random(length) < 0.7, DRAWS, 0).astype(np.uint32)
        ranks = Ranks(below, factors, rising_)
        left, _ = staged(Rule((1.0,), False, ranked=Ranked((ranks,))), None, [stored(row, "F32")])
        size, wanted = np.abs(row), np.zeros(length, np.float32)
        order = np.argsort(size, kind="stable") if rising_ else length - 1 - np.argsort(size[::-1], kind="stable")
        wanted[order] = np.where(below > 0, (row[order] * factors).astype(np.float32), 0)
        np.testing.assert_array_equal(left[0], wanted)


@compiled
@pytest.mark.parametrize("count", [6, 64, 1024])
@pytest.mark.parametrize("code", ["BF16", "F32"])
def test_many_experts(count: int, code: str) -> None:
    base, *experts = models(count, 3000, [code] * (count + 1), "near")
    weights = tuple(np.random.default_rng(0).normal(size=count).tolist())
    agree(TaskArithmetic(weights=weights), Rule(weights, deltas=True, scale=0.3), {}, base, experts, code)
    rule = Rule(weights, deltas=True, elect=Elect("mean", (1.0,) * count, 0, (False,) * count))
    agree(TrimmedTies(weights=weights), rule, Known(trim=None), base, experts, code)


# ------------------------------------------------------------------------------------------------------- dtypes and ends


@compiled
@pytest.mark.parametrize("code", ["BF16", "F16"])
@pytest.mark.parametrize("to", CODES)
def test_every_number_of_16_bits(code: str, to: str) -> None:
    every = Values(np.arange(1 << 16, dtype=np.uint16).view(np.uint8), code)
    x = finite(Values(every.memory.copy(), code))
    out = empty(1 << 16, to)
    found = merge(Rule((1.0,), deltas=False), None, [x], out)
    expected = numbers(x).float().to(DTYPES[to])
    assert found.sound and found.fits == bool(expected.isfinite().all())
    assert np.array_equal(out.memory, expected.view(torch.uint8).numpy())
    if to == code:
        assert np.array_equal(out.memory, x.memory)
    for i in np.flatnonzero(~np.isfinite(numbers(every).float().numpy()))[::7].tolist():  # NaN and infinity, one by one
        one = Values(every.memory[2 * i : 2 * i + 2], code)
        assert not merge(Rule((1.0,), deltas=False), None, [one], empty(1, to)).sound


@compiled
@pytest.mark.parametrize("to", ["BF16", "F16"])
def test_rounding_at_and_beside_every_halfway_point(to: str) -> None:
    numbers16 = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(DTYPES[to]).float()
    numbers16 = numbers16[numbers16.isfinite()]
    halfway = ((numbers16[1:].double() + numbers16[:-1].double()) / 2).float()
    largest = numbers16[-1] + (numbers16[-1] - numbers16[-2]) / 2  # what rounds to infinity, and the number before
    points = torch.cat([halfway, torch.stack([largest])])
    x = torch.cat([points, points.nextafter(torch.tensor(0.0)), points.nextafter(torch.tensor(math.inf)), -points])
    out = empty(len(x), to)
    assert not merge(Rule((1.0,), deltas=False), None, [stored(x, "F32")], out).fits
    assert np.array_equal(out.memory, x.to(DTYPES[to]).view(torch.uint8).numpy())


@compiled
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_input_that_is_not_finite_is_found_wherever_it_is(code: str, bad: float) -> None:
    count, size = 3, 2100
    linear = Rule((1.0,) * count, deltas=True)
    elected = linear._replace(elect=Elect("mean", (1.0,) * count, 0, (False,) * count))
    dropped = linear._replace(drop=Drop((key_of("a"),) * count, (0.0,) * count, (1.0,) * count))
    ranked = linear._replace(ranked=Ranked((rising(700, 0.0, 0.1, False),) * count))
    selected = elected._replace(select=Select(0x7FFF_FFFF, 0))
    overlapping = linear._replace(trim=Trim((0x7F7F_FFFF,) * count, (0,) * count), combine="overlap")
    rules = (linear, elected, dropped, ranked, selected, overlapping)
    for at in (0, 15, 2047, 2048, size - 1):
        for who in range(count + 1):
            values = models(at, size, [code] * (count + 1), "near")
            for rule in rules:
                assert merge(rule, values[0], values[1:], empty(size, code)).sound
            numbers(values[who])[at] = bad
            for rule in rules:
                assert not merge(rule, values[0], values[1:], empty(size, code)).sound


@compiled
def test_a_result_that_overflows_its_dtype_does_not_fit() -> None:
    x, rule = stored([1.0, 65_504.0], "F16"), Rule((1.0,), deltas=False, divisor=0.5)
    assert merge(rule, None, [x], empty(2, "BF16")).fits
    assert not merge(rule, None, [x], empty(2, "F16")).fits
    assert not merge(Rule((1e30, 1e30), False), None, [stored([1e9], "F32")] * 2, empty(1, "BF16")).fits


@compiled
def test_memory_without_alignment_and_read_only_memory() -> None:
    base, *experts = models(3, 999, ["BF16", "F32", "F16"], "near")
    out = empty(999, "F32")
    merge(Rule((0.5, 2.0), deltas=True), base, experts, out)

    def shifted(values: Values) -> Values:
        memory = np.empty(len(values.memory) + 1, np.uint8)[1:]
        memory[:] = values.memory
        memory.flags.writeable = False
        return Values(memory, values.code)

    odd = Values(np.empty(999 * 4 + 1, np.uint8)[1:], "F32")
    merge(Rule((0.5, 2.0), deltas=True), shifted(base), [shifted(e) for e in experts], odd)
    assert np.array_equal(out.memory, odd.memory)


@compiled
def test_any_number_of_threads_at_once() -> None:
    base, *experts = models(4, 50_001, ["BF16"] * 4, "near")
    rule = Rule((1.0,) * 3, deltas=True, elect=Elect("mean", (1.0,) * 3, 0, (False,) * 3))
    outs = [empty(50_001, "BF16") for _ in range(8)]
    threads = [threading.Thread(target=lambda out=out: merge(rule, base, experts, out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(out.memory, outs[0].memory) for out in outs)


@compiled
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, out: merge(Rule((1.0,), False), None, [x, x], out),
        lambda x, out: merge(Rule((1.0,), True), None, [x], out),
        lambda x, out: merge(Rule((), False), None, [], out),
        lambda x, out: merge(Rule((1.0,) * 1025, False), None, [x] * 1025, out),
        lambda x, out: merge(Rule((1.0,), False), None, [stored([1.0], "F32")], out),
        lambda x, out: merge(Rule((1.0,), False), None, [Values(x.memory, "F64")], out),
        lambda x, out: merge(Rule((1.0,), False), None, [Values(np.repeat(x.memory, 2)[::2], "F32")], out),
        lambda x, out: merge(Rule((1.0,), False), None, [x], Values(np.frombuffer(bytes(8), np.uint8), "F32")),
        lambda x, out: merge(Rule((1.0,), False, trim=Trim((1, 2), (1, 2))), None, [x], out),
        lambda x, out: merge(Rule((1.0,), False, only=1), None, [x], out),
        lambda x, out: merge(Rule((1.0,), False, only=-1), None, [x], out),
        lambda x, out: merge(Rule((1.0,), True, only=0), x, [x], out),
        lambda x, out: merge(Rule((1.0,), False, ranked=Ranked((band(3, 0, 1),))), None, [x], out),
        lambda x, out: merge(Rule((1.0,), False, ranked=Ranked((band(2, 0, 1),) * 2)), None, [x], out),
        lambda x, out: merge(Rule((1.0, 1.0), False, ranked=Ranked((band(1, 0, 1), band(2, 0, 1)))), None, [x, x], out),
        lambda x, out: staged(Rule((1.0,), True), None, [x]),
        lambda x, out: in_bracket(x, None, 0, 1, [0, 1, 2, 3, 4]),
        lambda x, out: gram(None, [x, stored([1.0], "F32")]),
        lambda x, out: gram(stored([1.0], "F32"), [x]),
        lambda x, out: gram(None, [Values(x.memory, "I8"), x]),
        lambda x, out: gram(None, []),
    ],
)
def test_what_does_not_fit_together_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="."):
        wrong(stored([1.0, 2.0], "F32"), empty(2, "F32"))


def test_without_the_library_calls_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_library", lambda: None)
    assert not fused.available()
    with pytest.raises(RuntimeError, match="compiled"):
        gram(None, [stored([1.0], "F32")])


@compiled
def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_VERSION", -1)
    assert fused._library.__wrapped__() is None


# ------------------------------------------------------------------------------------------------------------- reductions


@compiled
def test_a_rule_may_leave_it_to_the_base_what_it_works_on() -> None:
    base, *experts = models(1, 2000, ["BF16", "F32", "BF16"], "near")
    for theirs in (base, None):
        found = {}
        for deltas in (None, theirs is not None):
            out = empty(2000, "F32")
            assert merge(Rule((0.3, 0.6), deltas), theirs, experts, out).sound
            found[deltas] = out.memory.tobytes()
        assert len(found) == 2 and len(set(found.values())) == 1


@compiled
@FEW
@given(
    seed=st.integers(0, 1 << 32),
    size=st.sampled_from([0, 1, 63, 64, 65, 65_535, 65_536, 65_537, 200_001]) | st.integers(0, 3000),
    codes=st.lists(st.sampled_from(CODES), min_size=2, max_size=11),
    with_base=st.booleans(),
    kind=st.sampled_from(["near", "bits"]),
)
def test_gram(seed: int, size: int, codes: list[str], with_base: bool, kind: Kind) -> None:
    """Of more experts than a panel has, too."""
    base, *experts = models(seed, size, codes, kind)
    theirs = base if with_base else None
    found = gram(theirs, experts)
    assert found.shape == (len(experts), len(experts), -(-size // sums.BLOCK))
    if size:
        x = deltas(theirs, experts)[0]
        np.testing.assert_array_equal(found, sums.blocked_gram(x.reshape(len(x), -1)).numpy())


@compiled
@FEW
@given(
    case=merges(),
    with_base=st.booleans(),
    share=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 1.0]),
    blocks=st.integers(0, 3),
)
def test_norms(case: tuple[Values, list[Values], str], with_base: bool, share: float, blocks: int) -> None:
    """As the sums of the blocks of what DARE drops, to the bit."""
    theirs, experts, _ = case
    base, x = theirs if with_base else None, experts[0]
    row, start = deltas(base, [x])[0].flatten(), blocks * sums.BLOCK
    found = norms(x, base, philox_key(3, "a", "w"), share, start)
    kept = row.clone()
    kept[uniform(3, "a", "w", start, len(row)) >= share] = 0
    expected = [sums.block_sums(each.abs()).tolist() if len(row) else [] for each in (row, kept)]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@compiled
@FEW
@given(case=merges(), with_base=st.booleans(), data=st.data())
def test_in_bracket(case: tuple[Values, list[Values], str], with_base: bool, data: st.DataObject) -> None:
    theirs, experts, _ = case
    base, x = theirs if with_base else None, experts[0]
    row = deltas(base, [x])[0]
    sizes = sorted(set(select.magnitude_bits(row)[0].tolist())) or [0]
    some = st.integers(0, len(sizes) - 1).map(sizes.__getitem__)
    low, high = sorted(data.draw(st.tuples(some, some)))
    inside = [size for size in sizes if low <= size <= high]
    shared = data.draw(st.lists(st.sampled_from(inside), unique=True, max_size=4))
    shared += [-1] * (select.SHARED - len(shared))
    one = [torch.tensor([value]) for value in (low, high - low + 1, 0)]
    of = select.Bracket(one[0], one[1], one[2], torch.tensor([shared]))
    above, bins, ties, _ = select.in_bracket(row[0], of, 0) if row.numel() else (0, torch.zeros(0), [0] * 4, 0)
    found = in_bracket(x, base, low, high - low + 1, shared)
    assert (found[0], found[1].tolist(), found[2]) == (above, bins.tolist(), ties)


@compiled
@pytest.mark.parametrize("offset", [0, 1, 7, 8, 12_345, (1 << 40) + 3])
@pytest.mark.parametrize("share", [0.0, 2.0**-25, 0.25, 0.5, 1 - 1e-9])
def test_random_masks_are_those_of_keyed_random(offset: int, share: float) -> None:
    size = 70_001
    out = empty(size, "F32")
    drop = Drop((key_of("a"),), (share,), (1.0,))
    merge(Rule((1.0,), False, drop=drop), None, [stored(np.ones(size), "F32")], out, offset)
    mask = keyed_random.kept_bits(5, "a", "w", offset, size, share)
    assert torch.equal(numbers(out) != 0, mask != 0)


# --------------------------------------------------------------------------------------- marks, the furthest, the nearest


class TrimmedConsensus(Consensus):
    """Consensus whose TIES has thresholds and rooms that are given."""

    @property
    def ties(self) -> Ties:
        return TrimmedTies(merge="sum", scale=1.0)


class TrimmedMasks(TallMasks):
    """TALL-masks of such a TIES."""

    @property
    def ties(self) -> Ties:
        return TrimmedTies(merge="sum", scale=1.0)


THRESHOLD = st.sampled_from([0.2, 0.4, 1.0]) | st.floats(0.01, 1)
LITTLE = at_most(40)


def summed(data: st.DataObject, x: Tensor) -> tuple[str, Known, Rule]:
    """How the task vectors make up one: what the method is told, what is known, and the rule."""
    ones = (1.0,) * len(x)
    if data.draw(st.booleans(), "sum"):
        return "sum", Known(), Rule(ones, deltas=True)
    trim, elect = thresholds_of(data, x), Elect("sum", ones, 0, (False,) * len(x))
    return "ties", Known({"trim": trim}), Rule(ones, deltas=True, trim=trim, elect=elect)


@compiled
@LITTLE
@given(case=merges(), data=st.data())
def test_consensus(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    count = len(experts)
    vector, known, rule = summed(data, deltas(base, experts)[0])
    marks, scale = data.draw(st.tuples(*[THRESHOLD] * count)), data.draw(SCALE)
    least = data.draw(st.integers(0, count + 1))
    method = TrimmedConsensus(threshold=marks, k=least, scale=scale, vector=vector)
    agree(method, rule._replace(scale=scale, mark=Mark(marks, least)), known, base, experts, code)


@compiled
@LITTLE
@given(case=merges(), data=st.data())
def test_magmax(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, experts, code = case
    weights, scale = weights_of(data, len(experts)), data.draw(SCALE)
    rule = Rule(weights, deltas=True, scale=scale, combine="furthest")
    agree(Magmax(weights=weights, scale=scale), rule, Known(), base, experts, code)


@compiled
@LITTLE
@given(case=merges(), data=st.data())
def test_nearswap(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    base, (expert, *_), code = case
    method = Nearswap(
        t=data.draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-3, 1.0, -1.0])),
        compat=data.draw(st.sampled_from(["paper", "mergekit"])),
    )
    agree(method, method.rule(Place("w", ()), Known()), Known(), None, [base, expert], code)


@compiled
@at_most(80)
@given(case=merges(), data=st.data())
def test_masks(case: tuple[Values, list[Values], str], data: st.DataObject) -> None:
    """The vector, the bits, the counts and the masses are those of the torch path."""
    base, experts, code = case
    x, theirs = deltas(base, experts)
    known: Known
    method: MaskMethod
    if data.draw(st.booleans(), "emr"):
        method, known = Emr(), Known()
        rule = method.mask_rule(Place("w", (), 0, tuple("abcdefghij"[: len(x)])), known)
    else:
        vector, known, rule = summed(data, x)
        marks = data.draw(st.tuples(*[THRESHOLD] * len(x)))
        method, rule = TrimmedMasks(threshold=marks, vector=vector), rule._replace(mark=Mark(marks))
    work = torch.float64 if "F32" in [v.code for v in (base, *experts)] else torch.float32
    tile = Tile(x, theirs, Place("w", tuple(x.shape[1:])), work)
    one = method.one_vector(tile, known)
    flags = method.masks(tile, one)
    size, out = x.shape[1], empty(x.shape[1], code)
    bits = np.full((len(x), -(-size // 8)), 255, np.uint8)
    has_masses = type(method).has_masses()
    found = masks(rule, base, experts, out, bits, masses=has_masses)
    assert found.sound
    if not bool(one.isfinite().all()):
        return  # the engine takes the torch path, which says so
    assert found.fits == bool(one.to(DTYPES[code]).isfinite().all())
    if found.fits:
        np.testing.assert_array_equal(out.memory, memory(one.to(DTYPES[code])))
    np.testing.assert_array_equal(bits, np.stack([pack(row).numpy() for row in flags]))
    assert Marks.counted(found) == Marks.of(x, one, flags)
    if has_masses:
        np.testing.assert_array_equal(found.masses, method.masses(tile, one, flags))


@compiled
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 65_536, 2 * 65_536 + 1])
def test_masks_by_hand(size: int) -> None:
    """τ1 = 2, −1, 0, 0, … and τ2 = −1, −3, 4, 0, … again and again: EMR elects 2, −3, 4, 0."""
    one, two = (np.resize(row, size).astype(np.float32) for row in ([2, -1, 0, 0], [-1, -3, 4, 0]))
    base, out = stored(np.zeros(size), "BF16"), empty(size, "F16")
    bits = np.zeros((2, -(-size // 8)), np.uint8)
    rule = Rule((1.0, 1.0), deltas=True, combine="united")
    found = masks(rule, base, [stored(one, "F16"), stored(two, "F32")], out, bits, masses=True)
    flags = [np.resize(row, size) for row in ([1, 1, 0, 0], [0, 1, 1, 0])]
    assert numbers(out).tolist() == np.resize([2.0, -3.0, 4.0, 0.0], size).tolist()
    assert [np.unpackbits(row, count=size, bitorder="little").tolist() for row in bits] == [f.tolist() for f in flags]
    both = int((flags[0] & flags[1]).sum())
    assert found.by_task == (int(flags[0].sum()), int(flags[1].sum()))
    assert found.by_count == (0, sum(found.by_task) - 2 * both, both)
    assert found.trained == int(((one != 0) | (two != 0)).sum())
    assert found.masses is not None and found.masses.shape == (2, 2, -(-size // 65_536))
    vector = np.resize([2.0, 3.0, 4.0, 0.0], size)
    expected = [[np.abs(one).sum(), np.abs(two).sum()], [(vector * f).sum() for f in flags]]
    assert found.masses.sum(2).tolist() == expected  # of small whole numbers, exactly


@compiled
@pytest.mark.parametrize("place", [0, 100, 70_000])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("whose", [0, 1, 2])
def test_masks_of_what_is_not_finite_are_not_sound(place: int, bad: float, whose: int) -> None:
    rows = np.zeros((3, 70_001), np.float32)
    rows[whose, place] = bad
    base, *experts = (stored(row, "BF16") for row in rows)
    bits = np.zeros((2, 8751), np.uint8)
    for rule, masses in [
        (Rule((1.0, 1.0), deltas=True, combine="united"), True),
        (Rule((1.0, 1.0), deltas=True, mark=Mark((0.4, 0.4))), False),
    ]:
        assert not masks(rule, base, experts, empty(70_001, "BF16"), bits, masses=masses).sound


@compiled
def test_many_experts_and_their_limit() -> None:
    x = torch.randn(300, 130, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    base, experts = stored(np.zeros(130), "BF16"), [stored(row, "BF16") for row in x]
    bits, ones = np.zeros((300, 17), np.uint8), (1.0,) * 300
    tile = Tile(x, torch.zeros(130), Place("w", (130,)), torch.float32)
    for method, rule in [
        (Emr(), Rule(ones, deltas=True, combine="united")),
        (TallMasks(), Rule(ones, deltas=True, mark=Mark((0.4,) * 300))),
    ]:
        one = method.one_vector(tile, Known())
        flags = method.masks(tile, one)
        found = masks(rule, base, experts, empty(130, "BF16"), bits, masses=type(method).has_masses())
        np.testing.assert_array_equal(bits, np.stack([pack(row).numpy() for row in flags]))
        assert Marks.counted(found) == Marks.of(x, one, flags)
    with pytest.raises(ValueError, match="masks are made of 1 to 512"):
        masks(Rule((1.0,) * 513, deltas=True), base, [base] * 513, empty(130, "BF16"), np.zeros((513, 17), np.uint8))
    with pytest.raises(ValueError, match=r"bits of uint8 \(300, 16\)"):
        masks(Rule(ones, deltas=True), base, experts, empty(130, "BF16"), np.zeros((300, 16), np.uint8))
    trim = Trim((0,) * 300, (0,) * 300)
    with pytest.raises(ValueError, match="without masses"):
        masks(Rule(ones, deltas=True, trim=trim), base, experts, empty(130, "BF16"), bits, masses=True)
