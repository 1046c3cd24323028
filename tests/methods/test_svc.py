"""Singular value calibration, as a method and as a parameter of the others (the specification, 14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twinmerge.maths.gram_svd import gram_svd
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.kit.registry import make_method
from twinmerge.methods.kit.spectral import calibrate
from twinmerge.methods.svc import Svc


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_copies_of_one_expert_count_once(merge_rows, count):
    x = deltas(1, 6, 5)
    close(merge_rows("svc", x.expand(count, -1, -1)), x[0])
    close(merge_rows("svc", 0.7 * x.expand(count, -1, -1), calibration=1.0), 0.7 * x[0])


def test_one_expert_is_not_changed_by_any_bound_below_one(merge_rows):
    x = deltas(1, 7, 4)
    for calibration in (0.01, 0.5, 1.0):
        close(merge_rows("svc", x, calibration=calibration), x[0])
    close(merge_rows("svc", x, calibration=2.0), 0.5 * x[0])


def test_experts_apart_from_each_other_by_hand(merge_rows):
    """In each direction one expert's answer is there once, and the other has none: s · 2 / (1 + α)."""
    x = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
    close(merge_rows("svc", x, calibration=0.25), np.diag([2, 1]) * 2 / 1.25)


def test_a_shared_direction_beside_an_own_one_by_hand(merge_rows):
    """e1: both have 3, the sum 6, p = 2 and 2, so 6 · 2/4. e2: a has 1, b nothing, so 1 · 2/(1 + 0.5)."""
    x = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.0, 0.0]))])
    close(merge_rows("svc", x, calibration=0.5), np.diag([3, 4 / 3]))


def test_an_expert_that_changed_nothing_counts_as_the_least(merge_rows):
    x = deltas(2, 5, 6)
    x[1] = 0
    close(merge_rows("svc", x, calibration=0.25), x[0] * 2 / 1.25)
    assert not merge_rows("svc", torch.zeros(2, 4, 5)).any()


def test_directions_stay_and_values_stay_positive(merge_rows):
    x = deltas(3, 6, 5)
    u, s, vt = np.linalg.svd(x.double().sum(0).numpy(), full_matrices=False)
    core = u.T @ merge_rows("svc", x).double().numpy() @ vt.T
    np.testing.assert_allclose(core - np.diag(np.diag(core)), 0, atol=1e-5)
    assert (np.diag(core) > 0).all()


def test_experts_that_cancel_are_not_made_infinite(merge_rows):
    x = deltas(1, 4, 4)[0]
    nearly = -x.clone()
    nearly[0, 0] += 1e-3
    got = merge_rows("svc", torch.stack([x, nearly]), calibration=0.1)
    assert got.isfinite().all() and float(got.norm()) <= 10.1e-3


def test_iso_c_is_calibrated_in_the_directions_of_the_sum(merge_rows):
    """Its own singular values are equal, so those directions would be LAPACK's choice."""
    x = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.0, 0.0]))])
    mean = 3.5  # of 6 and 1
    p1, p2 = mean / 3, mean / 1  # times that a's own answer is in e1, e2; b's in e1 alike, in e2 none
    want = np.diag([mean * 2 / (2 * p1), mean * 2 / (p2 + 0.1)])
    close(merge_rows("iso_c", x, calibration=0.1), want)
    turned = torch.linalg.qr(deltas(1, 2, 2, seed=3)[0])[0]
    close(merge_rows("iso_c", turned @ x, calibration=0.1), turned.double().numpy() @ want)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "wudi", "svc", "knots"])
def test_calibration_of_factors_equals_that_of_dense_experts(name):
    parts = [Factors(deltas(1, 20, r, seed=r)[0], deltas(1, r, 15, seed=10 + r)[0]) for r in (2, 3)]
    x = torch.stack([part.b.double() @ part.a.double() for part in parts]).float()
    settings = {"calibration": 0.2} | (
        {"density": 1.0, "tie": "zero"} if name == "knots" else {}
    )  # which then has no passes
    method, at, base = make_method(name, ("a", "b"), settings), Place("w", (20, 15)), torch.zeros(20, 15)
    close(
        method.apply(Tile(x, base, at, factors=parts), Known()), method.apply(Tile(x, base, at), Known()).numpy(), 2e-6
    )


def test_calibrate_of_nothing_is_nothing():
    assert calibrate(gram_svd(torch.zeros(3, 2)), torch.zeros(2, 3, 2), 0.1).tolist() == [[0.0, 0.0]] * 3


def test_no_bound_is_refused():
    with pytest.raises(ValueError, match="calibration"):
        Svc(calibration=0.0)
