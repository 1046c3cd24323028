"""The core space: C1, T7 and O10 of the specification (continual and optimised, 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.errors import TwinmergeError
from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method

METHODS = ["tsv", "svc", "iso_c", "iso_cts", "wudi", "knots", "opcm"]
# where TIES has no ties to break, and where WUDI does not take the rounding of a dense expert for inputs of it
SETTINGS = {"knots": {"density": 1.0}, "wudi": {"ridge": 1e-2}}
RANKS = [(2, 3), (4, 4, 4), (1, 0, 5), (0, 3), (7, 8, 9), (20, 25), (3,)]


def factors(m, n, rank, seed, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=draw).to(dtype), torch.randn(rank, n, generator=draw).to(dtype))


def exact(part):
    return part.b.double() @ part.a.double()


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_c1_nothing_is_lost(ranks, m, n, seed):
    parts = [factors(m, n, rank, seed + t) for t, rank in enumerate(ranks)]
    space = CoreSpace.of(parts)
    p, q = min(m, sum(ranks)), min(n, sum(ranks))
    assert space.left.shape == (m, p) and space.right.shape == (n, q) and space.cores.shape == (len(ranks), p, q)
    np.testing.assert_allclose(space.left.mT @ space.left, np.eye(p), atol=1e-12)
    np.testing.assert_allclose(space.right.mT @ space.right, np.eye(q), atol=1e-12)
    for part, core in zip(parts, space.cores, strict=True):
        want = exact(part)
        np.testing.assert_allclose(space.left @ core @ space.right.mT, want, atol=1e-12 * max(1, float(want.norm())))
        merged = space.factors(core)
        assert merged.rank == min(p, q) and merged.shape == (m, n)
        np.testing.assert_allclose(merged.dense(), want, atol=1e-5 * max(1, float(want.norm())))


def run(method, tile):
    """The passes over matrices in one piece, then the merge."""
    known = Known()
    for each in method.passes():
        wanted = each.wanted(known)
        if each.grain == "rows" or (wanted is not None and tile.at.name not in wanted):
            continue
        total = {}
        each.add(total, each.observe(tile, known))
        known[each.name] = each.finish(total, known)
    return method.apply(tile, known)


@pytest.mark.few(17)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_t7_o10_a_merge_in_the_core_is_the_dense_merge(name, ranks):
    """Ranks 0, of different sizes, and with a sum above the short side."""
    parts = [factors(40, 30, rank, seed) for seed, rank in enumerate(ranks)]
    x = torch.stack([exact(part) for part in parts]).float()
    method, at, base = make_method(name, tuple("abc"[: len(ranks)]), {}), Place("w", (40, 30)), torch.zeros(40, 30)
    close(run(method, Tile(x, base, at, factors=parts)), run(method, Tile(x, base, at)).numpy())


@pytest.mark.parametrize("name", METHODS)
def test_ranks_that_are_all_zero_leave_the_base(name):
    parts = [factors(6, 5, 0, 0)] * 2
    base = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    base[0, 0] = -0.0
    method = make_method(name, ("a", "b"), {})
    got = run(method, Tile(torch.zeros(2, 6, 5), base, Place("w", (6, 5)), factors=parts))
    assert got.numpy().tobytes() == base.numpy().tobytes()


@pytest.mark.few(23)
@pytest.mark.parametrize("scale", [1.0, 0.01, 100.0, 3.3])
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("name", METHODS)
def test_the_same_matrix_by_other_factors_is_no_direction_of_its_own(name, rank, scale):
    """Two adapters alike but for a factor and rounding: merged as dense experts are, whose rounding has no rank
    either."""
    one, own = factors(48, 36, rank, rank), factors(48, 36, 2, 99)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(7)))[0]
    same = Factors(scale * one.b @ turn, turn.mT @ one.a)
    for parts in ([one, same], [one, same, own]):
        x = torch.stack([exact(part) for part in parts]).float()
        method = make_method(name, tuple("abc"[: len(parts)]), SETTINGS.get(name, {}))
        at, base = Place("w", (48, 36)), torch.zeros(48, 36)
        dense = run(method, Tile(x, base, at))
        # calibration divides by what the small one of two copies keeps of its digits in their sum
        close(run(method, Tile(x, base, at, factors=parts)), dense.numpy(), 1e-3 if name == "svc" else 1e-4)


def test_half_precision_factors_are_exact():
    parts = [factors(9, 8, 2, seed, torch.bfloat16) for seed in range(2)]
    space = CoreSpace.of(parts)
    close(space.left @ space.cores[0] @ space.right.mT, exact(parts[0]).numpy(), 1e-14)


def test_kernels_are_given_back_in_their_shape():
    parts = [factors(8, 12, 2, seed) for seed in range(2)]
    x = torch.stack([exact(part) for part in parts]).float().reshape(2, 8, 3, 2, 2)
    at, base = Place("w", (8, 3, 2, 2)), torch.zeros(8, 3, 2, 2)
    for name in METHODS:
        method = make_method(name, ("a", "b"), {})
        close(run(method, Tile(x, base, at, factors=parts)), run(method, Tile(x, base, at)).numpy())


def test_parts_of_different_shapes_share_no_space():
    with pytest.raises(TwinmergeError, match=r"\(4, 5\).*\(5, 5\).* share no space"):
        CoreSpace.of([factors(5, 5, 1, 0), factors(4, 5, 1, 1)])


@pytest.mark.parametrize("side", ["b", "a"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(side, bad):
    part = factors(5, 4, 2, 0)
    getattr(part, side)[1, 1] = bad
    with pytest.raises(TwinmergeError, match="NaN or infinity"):
        CoreSpace.of([factors(5, 4, 2, 1), part])
