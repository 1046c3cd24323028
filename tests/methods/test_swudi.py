"""SWUDI: gradient flow, its ends, the ranks by hand, and the transcription."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.swudi import Swudi

VARIANTS = [{"share": 0.5, "time": 3.0, "scale": 0.7}]
SLOW_VARIANTS = [{"share": 0.5}, {"time": 300.0}, {"inputs": "rows", "rest": "sum"}, {"share": 1.0}]
OTHERS = [{"calibration": 0.2}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    """By a singular value decomposition of all rows, τt / ‖τt‖ above one another."""
    w = np.broadcast_to(np.asarray(p.weights, dtype=np.float64), (len(experts),))

    def solved(v: np.ndarray) -> np.ndarray:
        v = v.transpose(0, 2, 1) if p.inputs == "rows" else v
        _, s, vt = np.linalg.svd(np.concatenate([t / np.linalg.norm(t) for t in v]), full_matrices=False)
        share = s.sum() ** 2 / (s**2).sum() if p.share is None else p.share * v.shape[2]
        k = min(math.ceil(share - 1e-9), len(s))
        h = np.ones(k) if p.time is None else 1 - np.exp(-p.time * s[:k] ** 2)
        total, normal = (np.einsum("t,tij->ij", w, each) for each in (v, [t @ t.T @ t / (t**2).sum() for t in v]))
        moved = normal @ vt[:k].T / s[:k] ** 2 - total @ vt[:k].T
        merged = total + (moved * h) @ vt[:k]
        return merged.T if p.inputs == "rows" else merged

    out = {}
    for n, v in x.items():
        if v.ndim > 2 and min(v.shape[1], int(np.prod(v.shape[2:]))) > 1:
            out[n] = p.scale * solved(v.reshape(*v.shape[:2], -1)).reshape(v.shape[1:])
        else:
            out[n] = p.scale * np.einsum("t,t...->...", w, v) / (len(v) if p.rest == "mean" else 1)
    return out


def deltas(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def close(got, want, rtol=1e-6):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= rtol * np.linalg.norm(want)


def loss_gradient(merged, experts):
    """Half of that of Σ ‖(M − τt) τtᵀ‖² / ‖τt‖²."""
    return sum((merged - t) @ t.mT @ t / t.square().sum() for t in experts)


@pytest.mark.parametrize("m, n", [(6, 5), (4, 9)])
def test_the_soft_filter_is_gradient_flow_from_the_sum(merge_rows, m, n):
    """Explicit steps of 1/2,000 of the time."""
    experts = deltas(3, m, n)
    merged, steps = experts.double().sum(0), 4000
    for _ in range(steps):
        merged = merged - 2.0 / steps * loss_gradient(merged, experts.double())
    close(merge_rows("swudi", experts, share=1.0, time=2.0), merged, 2e-3)
    assert float((merged - experts.double().sum(0)).norm()) > 0.1 * float(merged.norm())


def test_no_time_is_the_sum_and_all_time_is_the_minimum(merge_rows):
    experts = deltas(3, 7, 5)
    close(merge_rows("swudi", experts, time=1e-9), experts.sum(0), 1e-6)
    whole = merge_rows("swudi", experts, share=1.0)
    close(whole, merge_rows("wudi", experts, ridge=1e-13), 1e-5)
    close(merge_rows("swudi", experts, share=1.0, time=1e6), whole, 1e-5)
    assert float(loss_gradient(whole.double(), experts.double()).norm()) < 1e-5 * float(whole.norm())


@pytest.mark.parametrize("share, k", [(0.2, 1), (0.4, 2), (0.41, 3), (0.6, 3), (0.8, 4), (1.0, 5)])
def test_a_share_keeps_so_many_directions(share, k):
    grams = torch.diag(torch.tensor([5.0, 1, 4, 3, 2], dtype=torch.float64))
    lead, v, h = Swudi(share=share).directions_of(grams, 5, 5)
    assert lead.tolist() == pytest.approx([5, 4, 3, 2, 1][:k]) and h.tolist() == [1] * k
    assert v.abs().argmax(0).tolist() == [0, 2, 3, 4, 1][:k]


@pytest.mark.parametrize(
    "singular, k",
    [
        ([1.0, 1, 1, 1], 4),  # (4)² / 4
        ([3.0, 1, 0, 0], 2),  # 16 / 10
        ([10.0, 1, 0.5, 0], 2),  # 132.25 / 101.25
        ([10.0, 0.01, 0.01, 0.01], 4),  # 1.006, so 2 directions, and all that equal the second
        ([10.0, 0.02, 0.01, 0.001], 2),
        ([2.0, 0, 0, 0], 1),
    ],
)
def test_the_rank_is_the_participation_ratio_of_the_singular_values(singular, k):
    grams = torch.diag(torch.tensor(singular, dtype=torch.float64).square())
    assert len(Swudi().directions_of(grams, 4, 4)[0]) == k


def test_experts_on_one_input_are_averaged_and_on_two_are_summed(merge_rows):
    one, two = torch.zeros(2, 2), torch.zeros(2, 2)
    one[0, 0] = two[1, 0] = 1
    assert merge_rows("swudi", torch.stack([one, two])).tolist() == [[0.5, 0], [0.5, 0]]
    apart = torch.zeros(2, 2)
    apart[1, 1] = 3
    close(merge_rows("swudi", torch.stack([one, apart])), [[1, 0], [0, 3]])


def test_a_half_life_is_half_of_the_way(merge_rows):
    """λ is 2 where both experts use the input."""
    one, two = torch.zeros(2, 2), torch.zeros(2, 2)
    one[0, 0] = two[1, 0] = 1
    close(merge_rows("swudi", torch.stack([one, two]), time=math.log(2) / 2), [[0.75, 0], [0.75, 0]])


@pytest.mark.parametrize("parameters", [{}, {"share": 0.3}, {"time": 2.0}])
@pytest.mark.parametrize("shape", [(6, 5), (5, 8), (4, 3, 2, 2)])
def test_one_expert_comes_back(merge_rows, shape, parameters):
    x = deltas(1, *shape)
    close(merge_rows("swudi", x, **parameters).flatten(), x[0].flatten(), 1e-5)


@pytest.mark.parametrize("parameters", [{}, {"share": 0.5, "time": 5.0}])
@pytest.mark.parametrize("c", [-3.0, 1e-12, 1e12, 1e-30, 1e30])
def test_scaled_deltas_scale_the_merge(merge_rows, c, parameters):
    x = deltas(3, 7, 9)
    close(merge_rows("swudi", c * x, **parameters).double() / c, merge_rows("swudi", x, **parameters))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -1.0), (1.0, 0.0, 2.0)])
@pytest.mark.parametrize("parameters", [{}, {"share": 0.25, "time": 4.0}])
def test_tall_tables_in_rows_are_merged_as_in_one_piece(weights, parameters):
    x, at = deltas(3, 60, 8), Place("w", (60, 8))
    method = Swudi(weights=weights, **parameters)
    whole = method.apply(Tile(x, torch.zeros(60, 8), at), Known())
    (step,), total, known = method.passes(), {}, Known()
    for part in x.split(25, 1):
        step.add(total, step.observe(Tile(part, torch.zeros(part.shape[1:]), at), known))
    known[step.name] = step.finish(total, known)
    rows = [method.apply(Tile(part, torch.zeros(part.shape[1:]), at), known) for part in x.split(25, 1)]
    close(torch.cat(rows), whole, 1e-6)


def test_an_expert_of_weight_0_counts_for_nothing(merge_rows):
    x = deltas(3, 6, 5)
    got = merge_rows("swudi", x, **{"b.weights": 0.0})
    close(got, merge_rows("swudi", x[[0, 2]]))


@pytest.mark.parametrize("parameters", [{}, {"share": 0.2}, {"time": 50.0}])
def test_low_rank_experts_are_merged_in_their_core_space(parameters):
    rng, at = torch.Generator().manual_seed(0), Place("w", (12, 9))
    parts = [Factors(torch.randn(12, r, generator=rng), torch.randn(r, 9, generator=rng)) for r in (2, 0, 3)]
    method = Swudi(**parameters)
    x = torch.stack([part.dense() for part in parts])
    close(method.merge_factors(parts, at, Known()).dense(), method.apply(Tile(x, x[1], at), Known()), 1e-5)


def test_nothing_changed_stays_the_base(merge_rows):
    assert not merge_rows("swudi", torch.zeros(2, 4, 5)).any()
    x = deltas(2, 6, 5)
    x[1] = 0
    close(merge_rows("swudi", x), x[0], 1e-5)


@pytest.mark.parametrize("bad", [{"share": 0.0}, {"share": 1.1}, {"time": 0.0}, {"time": -1.0}])
def test_parameters_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Swudi(**bad)
