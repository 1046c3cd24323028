"""TACT: values by hand, RegMean on the same Gram matrices, and the transcription."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import Known, Place, Tile
from twinmerge.methods.tact import Tact

VARIANTS = [{"density": 1.0, "scale": 0.7}]
SLOW_VARIANTS = [{"density": 0.1}, {"inputs": "rows", "rest": "sum"}]
OTHERS = [{"calibration": 0.2}]


def transcription(x: dict[str, np.ndarray], experts: tuple[str, ...], p: SimpleNamespace) -> dict[str, np.ndarray]:
    """RegMean as NumPy's pseudo-inverse has it."""
    w = np.broadcast_to(np.asarray(p.weights, dtype=np.float64), (len(experts),))

    def trimmed(t: np.ndarray) -> np.ndarray:
        out = np.zeros(t.size)
        kept = np.argsort(-np.abs(t.ravel()), kind="stable")[: max(1, int(p.density * t.size + 1e-9))]
        out[kept] = t.ravel()[kept]
        return out.reshape(t.shape)

    def solved(v: np.ndarray) -> np.ndarray:
        turned = p.inputs == "rows"
        v = v.transpose(0, 2, 1) if turned else v
        grams = [trimmed(t).T @ trimmed(t) for t in v]
        normal = sum(each * t @ g for each, t, g in zip(w, v, grams, strict=True))
        merged = normal @ np.linalg.pinv(sum(grams), rcond=v.shape[2] * 2.0**-23, hermitian=True)
        return merged.T if turned else merged

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


def test_experts_on_one_input_weigh_by_the_squares_of_their_changes(merge_rows):
    """(2, 0) with 4 and (0, 1) with 1."""
    x = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])
    close(merge_rows("tact", x), [[1.6, 0], [0.2, 0]])


def test_experts_on_inputs_of_their_own_are_summed(merge_rows):
    x = torch.tensor([[[2.0, 0.0], [3.0, 0.0]], [[0.0, 1.0], [0.0, 4.0]]])
    close(merge_rows("tact", x, density=1.0), [[2, 1], [3, 4]])


def test_the_trim_is_in_the_gram_matrices_alone(merge_rows):
    """Half of four entries: the Gram matrices are diag(25, 0) and diag(0, 16); small entries stay in what is merged."""
    x = torch.tensor([[[4.0, 1.0], [3.0, 0.5]], [[1.0, 4.0], [-1.0, 0.0]]])
    trimmed = torch.diag(torch.tensor([25.0, 0])), torch.tensor([[1.0, 4], [4, 16]])
    want = (x[0] @ trimmed[0] + x[1] @ trimmed[1]).double() @ torch.linalg.inv((trimmed[0] + trimmed[1]).double())
    close(merge_rows("tact", x), want)
    assert not torch.allclose(merge_rows("tact", x, density=1.0), want.float(), rtol=1e-2)


def test_a_density_of_one_is_regmean_on_the_task_vectors_gram_matrices(merge_rows):
    experts = deltas(3, 7, 5).double()
    rows = torch.cat(list(experts))
    wanted = torch.cat([t @ t.mT for t in experts], 1)
    close(merge_rows("tact", experts, density=1.0), np.linalg.lstsq(rows.numpy(), wanted.mT.numpy(), rcond=None)[0].T)


def test_equal_entries_are_taken_in_order_and_one_at_least(merge_rows):
    x = torch.tensor([[[1.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 2.0]]])
    grams = torch.tensor([[1.0, -1], [-1, 1]]), torch.diag(torch.tensor([0.0, 4]))
    want = (x[0] @ grams[0] + x[1] @ grams[1]).double() @ torch.linalg.inv((grams[0] + grams[1]).double())
    close(merge_rows("tact", x), want)
    assert merge_rows("tact", x[:1], density=0.0)[:, 0].tolist() == [1, 1]  # of the first entry alone


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
def test_one_expert_comes_back_where_its_gram_matrix_has_full_rank(merge_rows, shape):
    x = deltas(1, 30, *shape[1:])
    close(merge_rows("tact", x).flatten(), x[0].flatten(), 1e-5)


def test_what_the_trimmed_rows_do_not_span_stays_the_base(merge_rows):
    x = torch.tensor([[[5.0, 0.1], [4.0, 0.2]]])
    assert merge_rows("tact", x)[:, 1].tolist() == [0, 0]


def test_eigenvalues_that_float32_cannot_tell_from_0_count_as_0(merge_rows):
    """1e-8 beside 1 is below 2 · 1.2e-7."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 1e-4]]])
    assert merge_rows("tact", x, density=1.0).tolist() == [[1, 0], [0, 0]]
    near = torch.tensor([[[1.0, 0.0], [0.0, 1e-3]]])
    close(merge_rows("tact", near, density=1.0), near[0])


@pytest.mark.parametrize("c", [-3.0, 1e-12, 1e12, 1e-30, 1e30])
def test_scaled_deltas_scale_the_merge(merge_rows, c):
    x = deltas(3, 7, 9)
    close(merge_rows("tact", c * x).double() / c, merge_rows("tact", x))


def test_rows_that_the_layer_reads_are_those_of_the_transpose(merge_rows):
    x = deltas(2, 5, 7)
    close(merge_rows("tact", x, inputs="rows"), merge_rows("tact", x.mT).mT)


def test_adapters_are_trimmed_as_the_matrices_that_they_make():
    rng, at = torch.Generator().manual_seed(0), Place("w", (12, 9))
    parts = [Factors(torch.randn(12, r, generator=rng), torch.randn(r, 9, generator=rng)) for r in (2, 3)]
    x, base = torch.stack([part.dense() for part in parts]), torch.zeros(12, 9)
    got = Tact().apply(Tile(x, base, at, factors=parts), Known())
    assert torch.equal(got, Tact().apply(Tile(x, base, at), Known()))


def test_an_expert_of_weight_0_counts_for_nothing(merge_rows):
    x = deltas(3, 6, 5)
    close(merge_rows("tact", x, **{"b.weights": 0.0}), merge_rows("tact", x[[0, 2]]))


def test_nothing_changed_stays_the_base(merge_rows):
    assert not merge_rows("tact", torch.zeros(2, 4, 5)).any()
    x = deltas(2, 60, 5)
    x[1] = 0
    close(merge_rows("tact", x), x[0], 1e-5)
