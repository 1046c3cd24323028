"""Singular value decompositions by the Gram matrix of the shorter side: one symmetric eigenproblem instead of gesdd.

The eigenvalues are squares, which costs half of the digits: so the Gram matrix is float64, and the singular values
that float32 entries define (above s1 · max(m, n) · 1.2e-7, the numerical rank) keep more digits than gesdd in float32
gives them. On one core it takes a fifth of gesdd's time for 768 × 3072, and nine tenths for a square.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from twinmerge.maths.svd import SVD, Core, numerical_rank, svd_core

LEAF = 128  # columns from which on a Gram matrix is put together from the parts above its diagonal
SMALL = 256  # a short side for which gesdd in float64 costs little


def gram_svd(x: Tensor, name: str = "matrix", rounded: torch.dtype | None = None) -> SVD:
    """x = U diag(s) V^T, the terms within the numerical rank only.

    Error of a singular value: at most about max(m, n) · 1.1e-16 · s1² / s_i, so below 1e-7 · s1 down to float32's
    numerical rank. Entries that are exact to float64 need more than that and go to gesdd.

    Args:
        x: (m, n), any real dtype.
        name: what an error calls the matrix.
        rounded: the dtype that the entries were rounded to once, whose eps sets the numerical rank; x's own where
            None.

    Returns:
        U (m, k), s (k,) descending, V^T (k, n) in float64; k = 0 for a zero matrix.

    Raises:
        TwinmergeError: x is not a matrix, or holds NaN or infinity.

    Source: Golub and Van Loan, Matrix Computations, section 8.6.

    Example:
        >>> u, s, vh = gram_svd(torch.tensor([[0.0, 3.0], [0.0, 0.0], [-4.0, 0.0]]))
        >>> s.tolist(), vh.abs().tolist()
        ([4.0, 3.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    core = Core.of(x, name)
    rounded = rounded or core.x.dtype
    found = svd_core(core.x.double()) if _exact(core.x, rounded) else _by_gram(core.x)
    keep = numerical_rank(found[1].to(rounded), core.x.shape)  # before the scale is back, which float32 may not hold
    u, s, vh = core.restore(found)
    return u[:, :keep], s[:keep], vh[:keep]


def gram(x: Tensor) -> Tensor:
    """x^T x (n, n) of x (m, n), in x's dtype: exactly symmetric, with little more than half of the product's
    operations.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    n = x.shape[1]
    if n <= LEAF:
        return x.mT @ x
    half = n // 2
    left, right = x[:, :half], x[:, half:]
    out = x.new_empty(n, n)
    out[:half, :half], out[half:, half:] = gram(left), gram(right)
    torch.mm(left.mT, right, out=out[:half, half:])
    out[half:, :half] = out[:half, half:].mT
    return out


def right_side(of: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """s and V of x = U diag(s) V^T out of x^T x alone, the terms within float32's numerical rank only.

    Args:
        of: x^T x (n, n) float64.
        rows: of x, those that are zero left out.

    Returns:
        s (k,) descending, V (n, k) in float64; U is x V diag(1/s).

    Example:
        >>> s, v = right_side(torch.diag(torch.tensor([4.0, 0.0, 9.0], dtype=torch.float64)), 5)
        >>> s.tolist(), v.abs().tolist()
        ([3.0, 2.0], [[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])

    Source: as `gram_svd`.
    """
    if not bool(of.any()):
        return of.new_zeros(0), of.new_zeros(len(of), 0)
    squares, v = torch.linalg.eigh(of)
    s, v = squares.clamp_min(0).sqrt().flip(0), v.flip(1)
    keep = numerical_rank((s / s[0]).float(), (rows, int((of.diagonal() > 0).sum())))
    return s[:keep], v[:, :keep]


def gram_polar(x: Tensor, name: str = "matrix", rounded: torch.dtype | None = None) -> Tensor:
    """U V^T over the numerical rank: the partial isometry nearest to x, (m, n), float64; arguments as `gram_svd`.

    Example:
        >>> gram_polar(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).float().tolist()
        [[0.0, 1.0], [0.0, 0.0]]

    Source: as `gram_svd`; TSV-Merge and Iso-C use it.
    """
    return with_values(x, torch.ones_like, name, rounded)


def with_values(
    x: Tensor, values: Callable[[Tensor], Tensor], name: str = "matrix", rounded: torch.dtype | None = None
) -> Tensor:
    """U diag(f(s)) V^T over the numerical rank, (m, n), float64: one of the singular vectors' sides is never made.

    Args:
        values: f, s (k,) -> (k,), not negative; other arguments as `gram_svd`.

    Example:
        >>> with_values(torch.diag(torch.tensor([4.0, 9.0])), torch.sqrt).round(decimals=6).tolist()
        [[2.0, 0.0], [0.0, 3.0]]

    Source: as `gram_svd`; for m >= n it is x V diag(f(s)/s) V^T.
    """
    core = Core.of(x, name)
    if _exact(core.x, rounded or core.x.dtype):
        u, s, vh = gram_svd(x, name, rounded)
        return (u * values(s)) @ vh
    wide = core.x.double()
    m, n = wide.shape
    if m < n:
        return core.placed(coefficients(gram(wide.mT), n, values, core.scale) @ wide)
    return core.placed(wide @ coefficients(gram(wide), m, values, core.scale))


def coefficients(of: Tensor, rows: int, values: Callable[[Tensor], Tensor], scale: float = 1.0) -> Tensor:
    """V diag(f(s)/s) V^T (n, n), which takes x to U diag(f(s)) V^T, out of x^T x; arguments as `right_side` and
    `with_values`."""
    s, v = right_side(of, rows)
    return gram((v * (values(s / scale) / s).sqrt()).mT)


def _exact(x: Tensor, rounded: torch.dtype) -> bool:
    """Whether a matrix goes to gesdd in float64."""
    return rounded == torch.float64 or (x.dtype == torch.float64 and min(x.shape) <= SMALL)


def _by_gram(x: Tensor) -> SVD:
    m, n = x.shape
    if m > n:
        v, s, uh = _by_gram(x.mT)
        return uh.mT, s, v.mT
    wide = x.double()
    if x.numel() == 0:
        k = min(m, n)
        return wide.new_zeros(m, k), wide.new_zeros(k), wide.new_zeros(k, n)
    squares, u = torch.linalg.eigh(gram(wide.mT))
    s, u = squares.clamp_min(0).sqrt().flip(0), u.flip(1)
    keep = max(1, numerical_rank(s.float(), x.shape))  # beyond it the quotient below is noise
    u, s = u[:, :keep], s[:keep]
    return u, s, (u.mT @ wide) / s.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
