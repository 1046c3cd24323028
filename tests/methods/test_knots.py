"""KnOTS: K1 to K3, and checks 5 and 6, of the specification (continual and optimised, 7)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.engine.run import Run
from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.knots import Knots
from twinmerge.methods.knots import aligned as aligned_tile


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def factors(m, n, rank, seed):
    draw = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


def aligned(x):
    """U, and the parts of all experts."""
    left, tile = aligned_tile(x, Place("w", tuple(x.shape[1:])))
    return left.float(), tile.x


def run(method, tile):
    """The passes over one matrix, then the merge."""
    return method.apply(tile, known(method, tile))


def known(method, *tiles):
    """What the passes find of some matrices."""
    found = Known()
    for each in method.passes():
        total = {}
        wanted = each.wanted(found)
        for tile in tiles if wanted is None else [t for t in tiles if t.at.name in wanted]:
            each.add(total, each.observe(tile, found))
        if total:
            found[each.name] = each.finish(total, found)
    return found


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
    s = torch.linalg.svdvals(run(Knots(density=0.5), tile).double())
    assert int((s > 1e-5 * s[0]).sum()) <= min(sum(ranks), 9)


def test_check_5_one_expert_kept_whole_comes_back(merge_rows):
    x = deltas(1, 7, 5)
    close(merge_rows("knots", x, density=1.0, scale=1.0), x[0])


def test_check_6_heterogeneous_ranks_have_a_core_of_their_sum():
    parts = [factors(20, 15, 2, 0), factors(20, 15, 3, 1)]
    assert CoreSpace.of(parts).cores.shape == (2, 5, 5)
    method, at = Knots(density=0.5), Place("w", (20, 15))
    merged = method.merge_factors(parts, at, known(method, Tile(torch.zeros(2, 20, 15), None, at, factors=parts)))
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
    dense, low = run(method, Tile(x, base, at)), run(method, Tile(x, base, at, factors=parts))
    close(low, dense.numpy())


def test_an_expert_that_is_there_twice_takes_no_rank_of_its_own():
    """The same matrix by other factors: rounding must not count as a direction, whose zeros TIES would keep."""
    one = factors(20, 15, 3, 0)
    turn = torch.linalg.qr(deltas(1, 3, 3, seed=5)[0])[0]
    same = Factors(one.b @ turn, turn.mT @ one.a)
    x = torch.stack([one.dense(), same.dense()])
    method, at, base = Knots(density=0.3), Place("w", (20, 15)), torch.zeros(20, 15)
    dense, low = run(method, Tile(x, base, at)), run(method, Tile(x, base, at, factors=[one, same]))
    close(low, dense.numpy(), 1e-5)


def entries(parts):
    """A matrix whose aligned parts are these, as a tile of them."""
    return Tile(parts, torch.zeros_like(parts[0]), Place("w", tuple(parts.shape[1:])))


@pytest.mark.parametrize("density, want", [(1.0, [[3, 3]]), (0.5, [[3, 4]]), (0.0, [[0, 0]])])
def test_signs_are_elected_in_the_aligned_space(density, want):
    """Entry by entry: 3 and −1 disagree, the larger wins alone; 2 and 4 agree, their mean stays."""
    tile = entries(torch.tensor([[[3.0, 2.0]], [[-1.0, 4.0]]]))
    method = Knots(density=density, scope="tensor").ties
    assert method.apply(tile, known(method, tile)).tolist() == want


def test_the_density_counts_the_entries_of_all_matrices(combine):
    """Two entries a matrix and half of four kept: both of the large one, none of the small one, whose change is a
    hundredth."""
    tall = torch.diag(torch.tensor([4.0, 3.0]))
    experts = {e: {"a": tall, "b": tall / 100} for e in "xy"}
    base = {n: torch.zeros(2, 2) for n in "ab"}
    whole = combine("knots", base, experts, density=0.5, scale=1.0)
    close(whole["a"], tall)  # diag(s) Vᵀ of each is (4, 0 | 0, 3): 2 of 8 entries are not 0
    close(whole["b"], tall / 100)
    fewer = combine("knots", base, experts, density=0.25, scale=1.0)
    close(fewer["a"], tall)
    assert not fewer["b"].any()
    own = combine("knots", base, experts, density=0.25, scale=1.0, scope="tensor")
    close(own["a"], torch.diag(torch.tensor([4.0, 0.0])))
    close(own["b"], torch.diag(torch.tensor([0.04, 0.0])))


def test_matrices_of_a_model_equal_the_paper_step_by_step(combine):
    """Written out with NumPy's own selection: tall, wide and square matrices, a kernel, a bias, unequal weights."""
    rng = np.random.default_rng(5)
    shapes = {"a": (6, 4), "b": (4, 7), "c": (5, 5), "k": (4, 2, 3, 1), "bias": (6,)}
    scales = {"a": 1.0, "b": 0.1, "c": 3.0, "k": 0.5, "bias": 1.0}
    x = {n: rng.normal(size=(3, *s)).astype(np.float32) * scales[n] for n, s in shapes.items()}
    weights = {"x": 0.5, "y": 1.0, "z": 2.0}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    experts = {e: {n: torch.tensor(v[i]) for n, v in x.items()} for i, e in enumerate(weights)}
    got = combine("knots", base, experts, weights=weights, density=0.3)
    w = np.array([0.5, 1.0, 2.0])
    left, parts = {}, {}
    for n in "abck":
        matrices = [a * m.reshape(len(m), -1).astype(float) for a, m in zip(w, x[n], strict=True)]
        left[n], s, vt = np.linalg.svd(np.hstack(matrices), full_matrices=False)
        parts[n] = np.stack(np.split(s[:, None] * vt, 3, axis=1))
    flat = np.concatenate([parts[n].reshape(3, -1) for n in "abck"], 1)
    keep = int(0.3 * flat.shape[1])
    for row in flat:
        row[np.abs(row) < np.partition(np.abs(row), -keep)[-keep]] = 0
    agree = np.sign(flat) * np.sign(flat.sum(0)) > 0
    merged = (flat * agree).sum(0) / np.maximum(agree.sum(0), 1)
    for n, piece in zip("abck", np.split(merged, np.cumsum([parts[n][0].size for n in "abc"])), strict=True):
        close(got[n].reshape(shapes[n][0], -1), 0.6 * left[n] @ piece.reshape(parts[n][0].shape), 1e-5)
    close(got["bias"], 0.6 * (w[:, None] * x["bias"]).mean(0))


def test_votes_that_cancel_go_to_the_majority_of_the_model():
    """Two entries cancel; most entries of the model are negative, so the negative one of them stays."""
    cancels = torch.tensor([[[2.0, -5.0]], [[-2.0, -5.0]]])
    for others, want in ((-1.0, -2.0), (1.0, 2.0)):
        tiles = [entries(cancels), entries(torch.full((2, 1, 3), others))]
        method = Knots(density=1.0).ties
        assert method.apply(tiles[0], known(method, *tiles)).tolist() == [[want, -5.0]]
    method = Knots(density=1.0, tie="zero").ties
    assert method.apply(tiles[0], known(method, *tiles)).tolist() == [[0.0, -5.0]]


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


@pytest.mark.parametrize("tie", ["majority", "zero"])
def test_factors_of_rows_alone_are_averaged_and_count_for_nothing(tie):
    names, shape = ("a", "b"), (1, 5)
    parts = [Factors(torch.ones(1, 1), torch.full((1, 5), float(i + 1))) for i in range(2)]
    tile = Tile(torch.stack([part.dense() for part in parts]), None, Place("row", shape, 0, names), factors=parts)
    method = Knots(tie=tie, scale=1.0)
    run = Run(method, ["row"], {"row": shape}, lambda each, digests: tile, grains={"row": "matrix"}, progress=False)
    run.survey()
    work = run.merge(run.groups(), lambda each, known: method.merge_factors(parts, tile.at, known).dense())
    assert torch.allclose(next(work)[0], torch.full(shape, 1.5, dtype=torch.float64))
