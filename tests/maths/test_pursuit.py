"""Orthogonal matching pursuit against a greedy search with least squares, vector by vector in NumPy's float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths.pursuit import Sparse, batches, matching_pursuit, nearest


def by_hand(atoms: np.ndarray, target: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
    """Atoms in the order in which they are chosen, and their coefficients."""
    chosen: list[int] = []
    weight, left = np.zeros(0), target
    for _ in range(k):
        if np.linalg.norm(left) <= 1e-9 * np.linalg.norm(target):
            break
        scores = np.abs(atoms @ left)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weight = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
        left = target - weight @ atoms[chosen]
    return chosen, weight


def made(found: Sparse, atoms: np.ndarray) -> np.ndarray:
    return np.einsum("tk,tkd->td", found.weight.numpy(), atoms[found.atom.numpy()].astype(float))


@pytest.mark.parametrize("atoms, width, k", [(30, 12, 4), (8, 16, 3), (5, 3, 64), (40, 6, 6), (1, 4, 2), (200, 64, 17)])
def test_as_a_greedy_search(atoms: int, width: int, k: int) -> None:
    rng = np.random.default_rng(atoms * width)
    pool = (rng.normal(size=(atoms, width)) * rng.uniform(0.2, 3, (atoms, 1))).astype(np.float32)
    targets = rng.normal(size=(9, width)).astype(np.float32)
    found = matching_pursuit(torch.tensor(pool), torch.tensor(targets), k)
    assert found.atom.shape == found.weight.shape == (9, k)
    for row, target in enumerate(targets.astype(float)):
        chosen, weight = by_hand(pool.astype(float), target, min(k, atoms, width))
        used = found.weight[row] != 0
        assert found.atom[row][used].tolist() == chosen
        np.testing.assert_allclose(found.weight[row][used].numpy(), weight, rtol=1e-7, atol=1e-9)


def test_a_sum_of_few_atoms_is_found_and_no_more_are_taken() -> None:
    rng = np.random.default_rng(0)
    pool = np.linalg.qr(rng.normal(size=(20, 20)))[0].astype(np.float32)
    targets = np.stack([3 * pool[4] - 2 * pool[11] + pool[7], 5 * pool[0]])
    found = matching_pursuit(torch.tensor(pool), torch.tensor(targets), 10)
    assert found.atom[0, :3].tolist() == [4, 11, 7] and found.atom[1, 0] == 0
    np.testing.assert_allclose(found.weight[0, :3], [3, -2, 1], rtol=1e-5)
    np.testing.assert_allclose(made(found, pool), targets, atol=1e-5)


def test_equal_atoms_zeros_and_targets_out_of_reach() -> None:
    pool = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [2, 0, 0], [0, 1, 0]], np.float32)
    targets = np.array([[4, 1, 0], [0, 0, 0], [0, 0, 5], [3, 0, 1]], np.float32)
    found = matching_pursuit(torch.tensor(pool), torch.tensor(targets), 4)
    assert bool(found.weight.isfinite().all())
    np.testing.assert_allclose(made(found, pool), [[4, 1, 0], [0, 0, 0], [0, 0, 0], [3, 0, 0]], atol=1e-12)
    assert int((found.weight[1:3] != 0).sum()) == 0 and int((found.weight[0] != 0).sum()) == 2


def test_targets_do_not_depend_on_their_neighbours() -> None:
    rng = np.random.default_rng(1)
    pool = torch.tensor(rng.normal(size=(50, 8)), dtype=torch.float32)
    targets = torch.tensor(rng.normal(size=(7, 8)), dtype=torch.float32)
    whole = matching_pursuit(pool, targets, 5)
    for row in range(7):
        alone = matching_pursuit(pool, targets[row : row + 1], 5)
        assert torch.equal(alone.atom[0], whole.atom[row])
        np.testing.assert_allclose(alone.weight[0], whole.weight[row], rtol=1e-9, atol=1e-12)


def test_batches_are_bounded_and_leave_nothing_out() -> None:
    for targets, atoms, width, k in [(1000, 1 << 20, 4096, 64), (3, 1, 1, 1), (0, 5, 5, 5), (500, 80_000, 2048, 64)]:
        parts = list(batches(targets, atoms, width, k))
        assert [i for part in parts for i in range(targets)[part]] == list(range(targets))
        assert all((p.stop - p.start) * atoms <= 1 << 25 or p.stop - p.start == 1 for p in parts)


@pytest.mark.parametrize("seed", [0, 1])
def test_nearest_by_cosine(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pool, targets = rng.normal(size=(40, 6)), rng.normal(size=(20, 6))
    cosine = (targets @ pool.T) / np.linalg.norm(pool, axis=1)
    assert nearest(torch.tensor(pool).float(), torch.tensor(targets).float()).tolist() == cosine.argmax(1).tolist()
