"""Vectors at the logits whose outer products add up to the Fisher information of what a model predicts.

With J the gradient of the logits z by a parameter, the Fisher information of one example is Jᵀ V J, V being that of the
predicted distribution by its logits. V = Σk rk rkᵀ turns it into Σk (rkᵀ J)²: one backward pass for each rk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twinmerge.maths.keyed_random import uniform


def of_classes(logits: Tensor) -> Tensor:
    """r with Σk rk rkᵀ = diag(p) − p pᵀ, p = softmax(z): all classes in expectation, one vector less than there are
    classes.

    The columns of the Cholesky factor of the covariance of a multinomial draw. With classes in falling order of p and
    qk = Σj>k pj: r_kk = √(pk qk / qk−1), r_kj = −pj √(pk / (qk−1 qk)) for j > k.

    Args:
        logits: (rows, classes).

    Returns:
        (rows, classes − 1, classes), in the dtype of the logits; computed in float64.

    Source: Tanabe & Sagae 1992, "An exact Cholesky decomposition and the generalized inverse of the variance-covariance
    matrix of the multinomial distribution", J. R. Stat. Soc. B 54.

    Example:
        >>> r = of_classes(torch.tensor([[1.0, 0.0, -1.0]]))
        >>> r.square().sum(1)  # p (1 − p)
        tensor([[0.2227, 0.1848, 0.0819]])
    """
    p, order = logits.double().softmax(-1).sort(-1, descending=True)
    from_here = p.flip(-1).cumsum(-1).flip(-1)  # q_{k−1}: from the smallest on, so that no tail is a difference
    after = from_here[..., 1:]
    own, above = p[..., :-1], from_here[..., :-1]
    some = after > 0
    factor = torch.where(some, (own / (above * torch.where(some, after, 1.0))).sqrt(), 0.0)
    columns = (-factor[..., None] * p[..., None, :]).triu(1)
    columns.diagonal(dim1=-2, dim2=-1).copy_(torch.where(some, (own * after / above).sqrt(), 0.0))
    back = order.argsort(-1)[..., None, :].expand_as(columns)
    return columns.gather(-1, back).to(logits.dtype)


def of_sampled(logits: Tensor, draws: Tensor) -> Tensor:
    """r = e_y − softmax(z) with y drawn from the model's own prediction: E[r rᵀ] = diag(p) − p pᵀ.

    Args:
        logits: (..., classes).
        draws: (...) uniform in [0, 1), which y is the quantile of.

    Returns:
        (..., classes).

    Example:
        >>> of_sampled(torch.tensor([[0.0, 0.0]]), torch.tensor([0.75]))
        tensor([[-0.5000,  0.5000]])
    """
    p = logits.float().softmax(-1)
    below = p.cumsum(-1, dtype=torch.float64)
    y = (below < draws[..., None].to(below.device) * below[..., -1:]).sum(-1).clamp_(max=p.shape[-1] - 1)
    r = p.neg_()
    r.scatter_add_(-1, y[..., None], torch.ones_like(y[..., None], dtype=r.dtype))
    return r.to(logits.dtype)


def of_bernoullis(logits: Tensor) -> Tensor:
    """rk = ek √(pk (1 − pk)) with p = sigmoid(z), for labels that are independent of each other: (rows, labels,
    labels).

    Example:
        >>> of_bernoullis(torch.zeros(1, 2))
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    wide = logits.double()
    return torch.diag_embed((wide.sigmoid() * (-wide).sigmoid()).sqrt()).to(logits.dtype)


def draws_of(rows: Sequence[int], counts: Sequence[int], samples: int, seed: int, width: int) -> Tensor:
    """Uniform numbers keyed by the rows' numbers in their file, so that no batch changes them.

    Args:
        rows: numbers.
        counts: how many positions each has.
        width: of the longest.

    Returns:
        (samples, rows, width) float64; 0 beyond a row's positions.
    """
    out = torch.zeros(samples, len(rows), width, dtype=torch.float64)
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        drawn = uniform(seed, "fisher", f"row {row}", 0, samples * count).double()
        out[:, i, :count] = drawn.reshape(samples, count)
    return out
