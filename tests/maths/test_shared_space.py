"""The shared space: its optimum by brute force, its ends, and what it keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.shared_space import SharedSpace


def parts(*ranks, m=12, n=9, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [
        Factors(torch.randn(m, r, generator=rng, dtype=dtype), torch.randn(r, n, generator=rng, dtype=dtype))
        for r in ranks
    ]


def held(u, v, stack):
    return float(sum((u.T @ x @ v).square().sum() for x in stack))


def orthonormal(space):
    for side in (space.left, space.right):
        torch.testing.assert_close(side.mT @ side, torch.eye(side.shape[1], dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2,), (2, 3), (4, 0, 2)])
def test_no_more_directions_than_the_rank_lose_nothing(ranks):
    own = parts(*ranks)
    space = SharedSpace.of(own, sum(ranks))
    assert not space.is_cut and space.kept == 1
    for part, core in zip(own, space.cores, strict=True):
        torch.testing.assert_close(space.factors(core).dense(), part.to(torch.float64).dense(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_one_adapter_alone_is_cut_as_its_singular_values_say(rank):
    (one,) = parts(5)
    space = SharedSpace.of([one], rank)
    orthonormal(space)
    u, s, vt = np.linalg.svd(one.to(torch.float64).dense().numpy())
    want = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(space.factors(space.cores[0]).dense().numpy(), want, atol=1e-9)
    assert space.kept == pytest.approx((s[:rank] ** 2).sum() / (s**2).sum(), rel=1e-12)


def test_the_same_adapter_twice_needs_its_own_directions_alone():
    (one,) = parts(3)
    space = SharedSpace.of([one, one], 3)
    assert space.is_cut and space.kept == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(space.factors(space.cores[1]).dense(), one.to(torch.float64).dense(), rtol=0, atol=1e-5)


def test_rank_1_by_brute_force_over_all_angles():
    """Two 2 × 2 matrices of one norm: the best pair of directions on a grid of 0.001."""
    own = [Factors(x, torch.eye(2)) for x in torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(3))]
    own = [Factors(part.b / part.b.norm(), part.a) for part in own]
    angles = np.arange(0, np.pi, 1e-3)
    turns = np.stack([np.cos(angles), np.sin(angles)])
    best = sum((turns.T @ part.to(torch.float64).dense().numpy() @ turns) ** 2 for part in own).max()
    space = SharedSpace.of(own, 1)
    stack = [part.to(torch.float64).dense() for part in own]
    assert held(space.left, space.right, stack) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_both_sides_are_the_best_for_each_other_and_no_worse_than_where_they_began(rank):
    own = parts(3, 4, 2, m=20, n=15)
    stack = [part.to(torch.float64).dense() / part.to(torch.float64).dense().norm() for part in own]
    space = SharedSpace.of(own, rank)
    orthonormal(space)
    best = held(space.left, space.right, stack)
    for side, other, these in ((space.left, space.right, stack), (space.right, space.left, [x.T for x in stack])):
        s = np.linalg.eigvalsh(sum((x @ other) @ (x @ other).T for x in these).numpy())
        assert held(side, other, these) >= s[-rank:].sum() * (1 - 1e-4)
    began = [
        np.linalg.svd(np.concatenate(list(xs), 1))[0][:, :rank]
        for xs in (np.stack(stack), np.stack([x.T for x in stack]))
    ]
    assert best >= held(*map(torch.from_numpy, began), stack) * (1 - 1e-12)


def test_norms_count_as_they_are_told_to():
    """A tenfold adapter owns the only direction, or does not."""
    big, small = (Factors(torch.eye(4)[:, [i]] * size, torch.eye(4)[[i]]) for i, size in ((0, 10.0), (1, 1.0)))
    tie = Factors(torch.eye(4)[:, [1]] * 0.5, torch.eye(4)[[1]])
    for by_norm, kept in ((1.0, [10, 0, 0]), (0.0, [0, 1, 0.5])):
        cores = SharedSpace.of([big, small, tie], 1, by_norm).cores.flatten().abs()
        torch.testing.assert_close(cores, torch.tensor(kept, dtype=torch.float64), rtol=0, atol=1e-9)


def test_who_does_not_share_is_brought_there_all_the_same():
    own = parts(2, 2)
    space = SharedSpace.of(own, 2, share=[True, False])
    whole = own[0].to(torch.float64).dense()
    torch.testing.assert_close(space.factors(space.cores[0]).dense(), whole, rtol=0, atol=1e-5)
    want = space.left @ space.left.mT @ own[1].to(torch.float64).dense() @ space.right @ space.right.mT
    torch.testing.assert_close(space.factors(space.cores[1]).dense(), want, rtol=0, atol=1e-9)
    assert space.kept == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_scale_of_all_is_irrelevant(size):
    own = parts(3, 3)
    scaled = [Factors(part.b * size, part.a) for part in own]
    one, two = SharedSpace.of(own, 2), SharedSpace.of(scaled, 2)
    torch.testing.assert_close((two.left.mT @ one.left).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-5)


def test_nothing_at_all_has_a_space():
    space = SharedSpace.of(parts(0, 0), 3)
    assert space.cores.shape == (2, 0, 0) and not space.is_cut
    zero = [Factors(torch.zeros(5, 4), torch.zeros(4, 6))] * 2
    assert not SharedSpace.of(zero, 2).cores.any()


def test_a_number_that_is_none_is_refused():
    bad = parts(2)[0]
    bad.b[0, 0] = float("nan")
    with pytest.raises(TwinmergeError, match="NaN"):
        SharedSpace.of([bad], 1)
