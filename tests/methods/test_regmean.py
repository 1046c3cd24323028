"""RegMean against the specification's numbers and against least squares on the tokens themselves."""

from __future__ import annotations

import pytest
import torch

from twinmerge.errors import TwinmergeError
from twinmerge.methods.kit.base import Gram, Known, Place, Tile
from twinmerge.methods.regmean import Regmean

W = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
G = [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.diag(torch.tensor([1.0, 3.0]))]


def merged(w, grams, turned=False, **parameters):
    names = tuple("abcdefgh"[: len(w)])
    given = [lambda g=g: None if g is None else Gram(g.double(), turned) for g in grams]
    return Regmean(**parameters).apply(Tile(w, None, Place("w", tuple(w.shape[1:]), 0, names), grams=given), Known())


@pytest.mark.parametrize(
    "alpha, want",
    [
        (1.0, [[1.571429, 4.285714], [3.571429, 6.285714]]),
        (0.9, [[1.648344, 4.283298], [3.648344, 6.283298]]),
        (0.0, [[2.333333, 4.4], [4.333333, 6.4]]),
    ],
)
def test_closed_form(alpha, want):
    torch.testing.assert_close(merged(W, G, alpha=alpha), torch.tensor(want), rtol=0, atol=1e-6)


def test_sums_of_products_give_least_squares_and_means_weigh_experts_alike():
    x1, x2 = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[0.0, 2], [1, 0], [1, 1]])
    sums = [x1.T @ x1, x2.T @ x2]
    want = torch.tensor([[2.2, 5.6], [4.2, 7.6]])
    torch.testing.assert_close(merged(W, sums, alpha=1.0), want, rtol=0, atol=1e-6)
    both = torch.cat([x1, x2]).double()
    targets = torch.cat([x1.double() @ W[0].double().T, x2.double() @ W[1].double().T])
    torch.testing.assert_close(torch.linalg.lstsq(both, targets).solution.T.float(), want, rtol=0, atol=1e-6)
    means = [sums[0] / 2, sums[1] / 3]
    want = torch.tensor([[1.685714, 5.428571], [3.685714, 7.428571]])
    torch.testing.assert_close(merged(W, means, alpha=1.0), want, rtol=0, atol=1e-6)


def test_weights_multiply_the_grams():
    torch.testing.assert_close(merged(W, G, weights=(1.0, 3.0)), merged(W, [G[0], 3 * G[1]]), rtol=0, atol=0.2)
    assert torch.equal(merged(W, G, weights=(1.0, 0.0)), W[0]) or torch.allclose(
        merged(W, G, weights=(1.0, 0.0)), W[0], atol=1e-6
    )


def test_equal_grams_give_the_mean_and_equal_weights_give_the_weight():
    torch.testing.assert_close(merged(W, [G[0], G[0]]), W.mean(0), rtol=0, atol=1e-6)
    assert torch.equal(merged(torch.stack([W[0], W[0]]), G), W[0])


def test_inputs_that_nobody_saw_stay_at_the_mean():
    dead = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([3.0, 0.0]))]
    got = merged(W, dead)
    torch.testing.assert_close(got, torch.tensor([[4.0, 4.0], [6.0, 6.0]]), rtol=0, atol=1e-6)
    one = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert merged(W, [one, one], alpha=1.0).isfinite().all()  # singular
    assert torch.equal(merged(W, [0 * one, 0 * one]), W.mean(0))
    assert torch.equal(merged(W, [one, None]), W.mean(0))


def test_a_rank_deficient_gram_of_a_few_tokens():
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 5, 40, generator=rng), torch.randn(3, 4, 40, generator=rng)
    got = merged(w, [t.T @ t / 4 for t in x], alpha=1.0)
    assert got.isfinite().all()
    # 12 tokens, 40 inputs: every expert's outputs can be kept exactly
    for theta, tokens in zip(w, x, strict=True):
        torch.testing.assert_close(tokens @ got.T, tokens @ theta.T, rtol=1e-3, atol=1e-3)


def test_turned_matrices_are_those_of_conv1d():
    turned = merged(W.transpose(1, 2).contiguous(), G, turned=True)
    torch.testing.assert_close(turned.T, merged(W, G), rtol=0, atol=1e-6)


def test_blocks_are_solved_alone_and_the_last_may_be_shorter():
    rng = torch.Generator().manual_seed(1)
    w = torch.randn(2, 4, 5, generator=rng)
    x = torch.randn(2, 50, 6, generator=rng)
    x[:, :, 5] = 0  # what the padding is
    blocks = [torch.stack([t[:, :3].T @ t[:, :3], t[:, 3:].T @ t[:, 3:]]) for t in x]
    got = merged(w, blocks, alpha=1.0)
    parts = [
        merged(w[:, :, :3], [b[0] for b in blocks], alpha=1.0),
        merged(w[:, :, 3:], [b[1, :2, :2] for b in blocks], alpha=1.0),
    ]
    torch.testing.assert_close(got, torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


def test_kernels_are_matrices():
    rng = torch.Generator().manual_seed(2)
    w = torch.randn(2, 4, 2, 2, 2, generator=rng)
    x = torch.randn(2, 50, 8, generator=rng)
    grams = [t.T @ t / 50 for t in x]
    assert torch.allclose(merged(w, grams).flatten(1), merged(w.flatten(2), grams), atol=1e-6)


@pytest.mark.parametrize(
    "grams, parameters, said",
    [
        ([G[0], torch.eye(3)], {}, r"of 'b' for 'w' is \[3, 3\], the matrix has 2 inputs"),
        ([G[0], torch.full((2, 2), float("nan"))], {}, "'b' for 'w' has NaN"),
        ([G[0], -torch.eye(2)], {}, "'b' for 'w' has NaN, infinite or negative"),
        (G, {"weights": (3.0, -1.0)}, "weight is -1"),
    ],
)
def test_bad_grams_are_named(grams, parameters, said):
    with pytest.raises(TwinmergeError, match=said):
        merged(W, grams, **parameters)
