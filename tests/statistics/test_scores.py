"""Vectors at the logits: their outer products are the Fisher information of the prediction."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinmerge.statistics.scores import draws_of, of_bernoullis, of_classes, of_sampled


def covariance(p):
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9).flatmap(
        lambda c: st.lists(st.lists(st.floats(-80, 80), min_size=c, max_size=c), min_size=1, max_size=4)
    )
)
def test_classes_add_up_to_the_covariance(rows):
    logits = torch.tensor(rows, dtype=torch.float64)
    r = of_classes(logits)
    assert r.shape == (len(rows), len(rows[0]) - 1, len(rows[0]))
    torch.testing.assert_close(r.transpose(1, 2) @ r, covariance(logits.softmax(-1)), rtol=1e-9, atol=1e-14)


def test_logits_of_the_specification():
    diagonal = of_classes(torch.tensor([[1.0, 0.0, -1.0]])).square().sum(1)[0]
    assert diagonal.tolist() == pytest.approx([0.222695, 0.184836, 0.081925], abs=5e-7)


@pytest.mark.parametrize("p, want", [(0.5, 0.25), (0.9, 0.09), (0.99, 0.0099)])
def test_a_binary_prediction_has_one_vector(p, want):
    """logits (z, 0): the derivative by z alone."""
    r = of_classes(torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64))
    assert r.shape[1] == 1 and float(r[0, 0, 0] ** 2) == pytest.approx(want, abs=1e-9)


def test_small_tails_are_not_lost():
    r = of_classes(torch.tensor([[0.0, -30.0, -31.0]], dtype=torch.float64))
    p = torch.tensor([[0.0, -30.0, -31.0]], dtype=torch.float64).softmax(-1)
    others = torch.stack([p[0, [1, 2]].sum(), p[0, [0, 2]].sum(), p[0, [0, 1]].sum()])
    torch.testing.assert_close(r.square().sum(1), p * others, rtol=1e-9, atol=0)


def test_sampled_scores_have_the_covariance_in_the_mean():
    logits = torch.tensor([1.0, 0.0, -1.0])
    draws = torch.from_numpy((np.arange(20_000) + 0.5) / 20_000)  # every quantile once
    r = of_sampled(logits.expand(len(draws), 3), draws).double()
    torch.testing.assert_close(r.T @ r / len(r), covariance(logits[None].double().softmax(-1))[0], rtol=0, atol=1e-4)
    assert float(r.mean(0).abs().max()) < 1e-4


def test_the_last_class_takes_what_rounding_leaves():
    r = of_sampled(torch.zeros(1, 3), torch.tensor([1 - 2**-30], dtype=torch.float64))
    assert r[0].argmax() == 2


def test_independent_labels():
    logits = torch.tensor([[0.3, -2.0]], dtype=torch.float64)
    r = of_bernoullis(logits)
    p = logits.sigmoid()
    torch.testing.assert_close((r.transpose(1, 2) @ r)[0], torch.diag((p * (1 - p))[0]))


def test_draws_follow_the_row_and_not_the_batch():
    together = draws_of([4, 9], [3, 5], 2, 7, 5)
    alone = draws_of([9], [5], 2, 7, 5)
    assert torch.equal(together[:, 1], alone[:, 0]) and not together[:, 0, 3:].any()
    assert not torch.equal(alone, draws_of([9], [5], 2, 8, 5))
