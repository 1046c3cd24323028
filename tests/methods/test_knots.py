"""KnOTS: K1 to K3, and checks 5 and 6, of the specification (continual and optimised, 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.base import Place, Tile
from twinmerge.methods.knots import Knots, aligned


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def factors(m, n, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def test_k1_the_aligned_parts_are_the_experts():
    x = deltas(3, 6, 5)
    left, parts = aligned(x)
    close(left @ parts, x.numpy())
    close((left @ parts).sum(0), x.sum(0).numpy())  # a plain sum of them is task arithmetic
    close(left.mT @ left, np.eye(6))


def test_k2_two_directions_of_two(merge_rows):
    x = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    left, parts = aligned(x)
    assert left.shape == (2, 2)
    close(parts.permute(1, 0, 2).flatten(1).norm(dim=1), [2, 1])
    close(merge_rows("knots", x, density=1.0, scale=1.0), np.diag([2, 1]))


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (2, 0, 4), (5, 5)])
def test_k3_kept_rank_is_at_most_the_sum_of_the_ranks(ranks):
    parts = [factors(12, 9, rank, seed) for seed, rank in enumerate(ranks)]
    x = torch.stack([part.b.double() @ part.a.double() for part in parts]).float()
    assert len(aligned(x)[0].T) == min(sum(ranks), 12)
    tile = Tile(x, torch.zeros(12, 9), Place("w", (12, 9)))
    s = torch.linalg.svdvals(Knots(density=0.5).apply(tile, {}).double())
    assert int((s > 1e-5 * s[0]).sum()) <= min(sum(ranks), 9)


def test_check_5_one_expert_kept_whole_comes_back(merge_rows):
    x = deltas(1, 7, 5)
    close(merge_rows("knots", x, density=1.0, scale=1.0), x[0])


def test_check_6_heterogeneous_ranks_have_a_core_of_their_sum():
    parts = [factors(20, 15, 2, 0), factors(20, 15, 3, 1)]
    assert CoreSpace.of(parts).cores.shape == (2, 5, 5)
    merged = Knots(density=0.5).merge_factors(parts, Place("w", (20, 15)))
    assert merged.rank == 5 and merged.shape == (20, 15)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("ranks", [(2, 3), (4, 4, 1), (3, 0), (12, 12)])
def test_check_6_factors_equal_dense(ranks, density):
    parts = [factors(20, 15, rank, seed) for seed, rank in enumerate(ranks)]
    x = torch.stack([part.b.double() @ part.a.double() for part in parts]).float()
    method, at, base = (
        Knots(density=density, weights=tuple(0.5 + i for i in range(len(ranks)))),
        Place("w", (20, 15)),
        torch.zeros(20, 15),
    )
    dense, low = method.apply(Tile(x, base, at), {}), method.apply(Tile(x, base, at, factors=parts), {})
    close(low, dense.numpy())


def test_an_expert_that_is_there_twice_takes_no_rank_of_its_own():
    """The same matrix by other factors: rounding must not count as a direction, whose zeros TIES would keep."""
    one = factors(20, 15, 3, 0)
    turn = torch.linalg.qr(deltas(1, 3, 3, seed=5)[0])[0]
    same = Factors(one.b @ turn, turn.mT @ one.a)
    x = torch.stack([one.dense(), same.dense()])
    method, at, base = Knots(density=0.3), Place("w", (20, 15)), torch.zeros(20, 15)
    dense, low = method.apply(Tile(x, base, at), {}), method.apply(Tile(x, base, at, factors=[one, same]), {})
    close(low, dense.numpy(), 1e-5)


def test_signs_are_elected_in_the_aligned_space():
    """Entry by entry: 3 and −1 disagree, the larger wins alone; 2 and 4 agree, their mean stays."""
    parts = torch.tensor([[[3.0, 2.0]], [[-1.0, 4.0]]])
    assert Knots(density=1.0).ties(parts).tolist() == [[3.0, 3.0]]
    assert Knots(density=0.5).ties(parts).tolist() == [[3.0, 4.0]]
    assert Knots(density=0.0).ties(parts).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("c", [-2.0, 1e-20, 1e20])
def test_small_deltas_are_merged_like_large_ones(merge_rows, c):
    """Where the authors' cut at 1e-5 would leave nothing."""
    x = deltas(3, 7, 9)
    close(merge_rows("knots", c * x).double() / c, merge_rows("knots", x), 1e-5)


def test_nothing_changed_stays_the_base(merge_rows):
    assert not merge_rows("knots", torch.zeros(2, 4, 5)).any()
    assert not merge_rows("knots", deltas(2, 4, 5), density=0.0).any()


@pytest.mark.parametrize("bad", [{"density": 1.5}, {"density": -0.1}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="density"):
        Knots(**bad)
