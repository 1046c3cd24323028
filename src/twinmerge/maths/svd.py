"""Singular value decompositions that do not break.

One rule for degenerate matrices: a singular vector is used only when its singular value is above the
numerical rank's threshold, since the vectors below it are an arbitrary choice of LAPACK's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.errors import ModelError, UsageError

SVD = tuple[Tensor, Tensor, Tensor]
_NotConverged = torch.linalg.LinAlgError  # type: ignore[attr-defined]


def numerical_rank(s: Tensor, shape: Sequence[int]) -> int:
    """The number of singular values that rounding cannot have made: #{s_i > s_1 * max(m, n) * eps}.

    Args:
        s: (k,) singular values, of the dtype in which they were computed (its eps is used).
        shape: (m, n) of the matrix.

    Returns:
        0 for a zero or an empty matrix.

    Example:
        >>> numerical_rank(torch.tensor([2.0, 1.0, 1e-9]), (3, 3))
        2

    Source: Golub and Van Loan, Matrix Computations, section 5.4; the rule of `numpy.linalg.matrix_rank`.
    """
    if s.numel() == 0:
        return 0
    return int((s > s.max() * (max(shape) * torch.finfo(s.dtype).eps)).sum())


def thin_svd(x: Tensor, name: str = "matrix") -> SVD:
    """x = U diag(s) V^T, thin, without the rows and columns of x that are all zero.

    Computed in float32, or in float64 for a float64 matrix. LAPACK's gesdd is tried first, then gesvd, then
    the eigenvectors of the smaller Gram matrix. The largest entry of each right singular vector is positive,
    so that signs are not left to chance.

    Args:
        x: (m, n), any real dtype.
        name: what an error calls the matrix.

    Returns:
        U (m, k), s (k,) descending, V^T (k, n), where k is the smaller count of non-zero rows and non-zero
        columns: k <= min(m, n), and 0 for a zero matrix.

    Raises:
        TwinmergeError: x is not a matrix, or holds NaN or infinity.

    Example:
        >>> u, s, vh = thin_svd(torch.tensor([[0.0, 3.0], [0.0, 0.0], [-4.0, 0.0]]))
        >>> s.tolist(), vh.tolist()
        ([4.0, 3.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    core = Core.of(x, name)
    return core.restore(svd_core(core.x))


def polar(x: Tensor, name: str = "matrix") -> Tensor:
    """U V^T of the singular value decomposition: the (partial) isometry nearest to x.

    Only the directions within the numerical rank enter, so a matrix of rank r gives an isometry of rank r.

    Args:
        x: (m, n), any real dtype.
        name: what an error calls the matrix.

    Returns:
        (m, n) in float32 (float64 for a float64 matrix); zero for a zero matrix.

    Raises:
        TwinmergeError: x is not a matrix, or holds NaN or infinity.

    Example:
        >>> polar(torch.tensor([[0.0, 2.0], [0.0, 0.0]])).tolist()
        [[0.0, 1.0], [0.0, 0.0]]

    Source: Higham, SIAM J. Sci. Stat. Comput. 7 (1986); used by TSV-Merge (CVPR 2025).
    """
    core = Core.of(x, name)
    u, s, vh = core.restore(svd_core(core.x))
    keep = numerical_rank(s, core.x.shape)
    return u[:, :keep] @ vh[:keep]


class Core(NamedTuple):
    """What there is to decompose: x without its zero rows and columns, scaled if its squares overflow."""

    x: Tensor
    rows: Tensor
    cols: Tensor
    scale: float

    @classmethod
    def of(cls, x: Tensor, name: str = "matrix") -> Core:
        """Checks x and takes its core, in float32 at least."""
        if x.ndim != 2:
            raise UsageError(f"{name} has shape {tuple(x.shape)}: only a matrix (two axes) can be decomposed")
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        peak = float(torch.stack(torch.aminmax(x)).abs().max()) if x.numel() else 0.0
        if not math.isfinite(peak):
            raise ModelError(f"{name} holds NaN or infinity: leave it out, or mend the model that it came from")
        rows, cols = (x != 0).any(dim=1), (x != 0).any(dim=0)
        if not bool(rows.all()):
            x = x[rows]
        if not bool(cols.all()):
            x = x[:, cols]
        # A power of two, so that scaling rounds nothing.
        scale = 1.0 if peak == 0 or 2.0**-60 < peak < 2.0**60 else 2.0 ** -max(-120, min(120, math.frexp(peak)[1]))
        return cls(x if scale == 1 else x * scale, rows, cols, scale)

    def restore(self, svd: SVD) -> SVD:
        """Puts the zero rows and columns and the scale back, and fixes the signs."""
        u, s, vh = svd
        peak = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)) if len(vh) else vh.new_zeros(0, 1)
        sign = torch.where(peak < 0, -1.0, 1.0).to(vh.dtype)
        u, vh = u * sign.mT, vh * sign
        return _in_rows(u, self.rows), s / self.scale, _in_rows(vh.mT, self.cols).mT

    def placed(self, x: Tensor) -> Tensor:
        """What a matrix of the core's shape is in the whole one, zero elsewhere."""
        return _in_rows(_in_rows(x, self.rows).mT, self.cols).mT


def _in_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x in the rows that `rows` marks, zero in all others."""
    if len(x) == len(rows):
        return x
    return x.new_zeros(len(rows), x.shape[1]).masked_scatter_(rows[:, None], x)


def svd_core(x: Tensor) -> SVD:
    """The thin decomposition of a matrix that `Core` has prepared."""
    m, n = x.shape
    if m < n:
        v, s, uh = svd_core(x.mT)
        return uh.mT, s, v.mT
    if m < 4 * n or n == 0:
        return _lapack(x)
    q, r = torch.linalg.qr(x)  # the decomposition of a square costs the short side only
    u, s, vh = _lapack(r)
    return q @ u, s, vh


def svd_range(x: Tensor, rank: int) -> SVD:
    """The leading terms by a randomised range finder: four power iterations, products made orthonormal."""
    own = torch.Generator().manual_seed(0)
    width = min(rank + max(8, rank), *x.shape)
    q = torch.randn(x.shape[1], width, generator=own, dtype=x.dtype).to(x.device)
    for _ in range(4):
        q = _orthonormal(x @ q)
        q = _orthonormal(x.mT @ q)
    q = _orthonormal(x @ q)
    u, s, vh = svd_core(q.mT @ x)
    return q @ u[:, :rank], s[:rank], vh[:rank]


def _orthonormal(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y)[0]
    return q


def _lapack(x: Tensor) -> SVD:
    if x.numel() == 0:
        k = min(x.shape)
        return x.new_zeros(x.shape[0], k), x.new_zeros(k), x.new_zeros(k, x.shape[1])
    for decompose in (_gesdd, _gesvd):
        try:
            u, s, vh = decompose(x)
        except (np.linalg.LinAlgError, _NotConverged):
            continue
        if bool(s.isfinite().all()):
            return u, s, vh
    return _gram(x)


def _gesdd(x: Tensor) -> SVD:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u, s, vh


def _gesvd(x: Tensor) -> SVD:
    import scipy.linalg  # 0.2 s and 30 MB, for the rare matrix that gets here

    found = scipy.linalg.svd(x.cpu().numpy(), full_matrices=False, lapack_driver="gesvd", check_finite=False)
    u, s, vh = (torch.from_numpy(part).to(x.device) for part in found)
    return u, s, vh


def _gram(x: Tensor) -> SVD:
    """For m >= n: V and s^2 are the eigenvectors and eigenvalues of x^T x; in float64, since s is squared."""
    if x.shape[0] < x.shape[1]:
        v, s, uh = _gram(x.mT)
        return uh.mT, s, v.mT
    wide = x.double()
    v = torch.linalg.eigh(wide.mT @ wide)[1].flip(1)
    u, r = torch.linalg.qr(wide @ v)  # x V = U diag(s) up to signs; QR keeps U orthonormal where s is tiny
    s, order = r.diagonal().abs().sort(descending=True)
    u = u * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return u[:, order].to(x.dtype), s.to(x.dtype), v[:, order].mT.to(x.dtype)
