"""Low rank: matrices kept as the product of two thin ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import ModelError, UsageError
from twinmerge.maths.sums import BLOCK
from twinmerge.maths.svd import Core, numerical_rank, polar, svd_core, svd_range, thin_svd

__all__ = [
    "Factors",
    "in_full",
    "numerical_rank",
    "polar",
    "rank_of_rate",
    "retained_energy",
    "thin_svd",
    "truncate",
    "truncate_product",
]


class Factors(NamedTuple):
    """A matrix (m, n) of low rank r, as the product b @ a.

    Args:
        b: (m, r).
        a: (r, n).

    Example:
        >>> f = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]]))
        >>> f.rank, f.shape
        (1, (2, 3))
        >>> f.dense().tolist()
        [[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]
    """

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """r, the inner dimension."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n), the shape of the product."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """b @ a, (m, n), in the factors' dtype and at least float32."""
        dtype = torch.promote_types(torch.promote_types(self.b.dtype, self.a.dtype), torch.float32)
        return self.b.to(dtype) @ self.a.to(dtype)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return Factors(self.b.to(dtype), self.a.to(dtype))

    @property
    def wide(self) -> bool:
        """Whether the factors were not rounded to less than float64."""
        return torch.float64 in (self.b.dtype, self.a.dtype)

    def energy(self) -> float:
        """‖b a‖², the sum of the squared entries, out of the factors.

        Example:
            >>> Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]])).energy()
            125.0
        """
        b, a = self.b.double(), self.a.double()
        return float(((b.mT @ b) * (a @ a.mT)).sum())

    def entries(self, start: int, stop: int) -> Tensor:
        """Entries start ... stop − 1 of the product, row by row, without the rest of it.

        Made block by block of 65,536 entries, so that an entry has the same bits in whatever range it is asked for.

        Example:
            >>> Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 5.0]])).entries(2, 5).tolist()
            [5.0, 6.0, 8.0]
        """
        width = self.a.shape[1]
        parts = []
        for at in range(start - start % BLOCK, stop, BLOCK):
            end = min(at + BLOCK, self.b.shape[0] * width)
            top = at // width
            rows = Factors(self.b[top : -(-end // width)], self.a).dense().flatten()
            parts.append(rows[max(at, start) - top * width : min(end, stop) - top * width])
        return torch.cat(parts) if parts else self.a.new_empty(0)


def in_full(x: Tensor) -> Tensor:
    """The same numbers in the dtype that products are taken in: float32, float64 where they are that.

    Example:
        >>> in_full(torch.ones(1, dtype=torch.float16)).dtype, in_full(torch.ones(1, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def truncate(x: Tensor, rank: int, name: str = "matrix", *, exact: bool = False) -> Factors:
    """The best approximation of x of rank r: the first r terms of its singular value decomposition.

    The error is sum_{i>r} s_i^2 (squared Frobenius norm). When r is small beside the matrix, a randomised
    range finder with four power iterations takes the place of the full decomposition; its error is well
    within 1 % of the best, and its random numbers are its own, so the same matrix gives the same factors.

    Args:
        x: (m, n), any real dtype.
        rank: r >= 1; the numerical rank of x is the most that comes back.
        name: what an error calls the matrix.
        exact: never use the randomised range finder.

    Returns:
        b = U diag(s), a = V^T, in float32 (float64 for a float64 matrix). Rank 0 for a zero matrix, else >=
        1.

    Raises:
        TwinmergeError: the rank is below 1; x is not a matrix, or holds NaN or infinity.

    Example:
        >>> truncate(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1).dense().tolist()
        [[2.0, 0.0], [0.0, 0.0]]

    Source: Eckart and Young, Psychometrika 1 (1936); Halko, Martinsson and Tropp, SIAM Review 53 (2011), alg.
    4.4.
    """
    if rank < 1:
        raise UsageError(f"rank {rank} of {name} is below 1: give a rank of 1 or more, or leave it out")
    core = Core.of(x, name)
    small = min(core.x.shape)
    sketch = not exact and small >= 256 and rank * 8 <= small
    u, s, vh = core.restore(svd_range(core.x, rank) if sketch else svd_core(core.x))
    keep = min(rank, numerical_rank(s, core.x.shape))
    return Factors(u[:, :keep] * s[:keep], vh[:keep].contiguous())


def truncate_product(parts: Sequence[Factors], weights: Sequence[float], rank: int | None = None) -> Factors:
    """sum_t w_t B_t A_t as one low-rank product, never as a dense matrix.

    With no rank the answer is exact: the columns w_t B_t side by side and the rows A_t one above the other.
    With a rank, or when that would be wider than the matrix itself, both sides go through QR and the small
    matrix between them is truncated in float64: the best approximation of that rank, at the cost of the
    factors.

    Args:
        parts: factors of matrices of one shape (m, n).
        weights: w_t, one for each part; a part of weight 0 is left out.
        rank: r >= 1, or None for the exact sum.

    Returns:
        Factors in float32 (float64 if any part is), of rank 0 when the sum is exactly zero.

    Raises:
        TwinmergeError: no parts, a count or a shape that differs, a weight or a factor that is not finite, a rank
            below 1.

    Example:
        >>> one = Factors(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
        >>> two = Factors(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0, 1.0]]))
        >>> truncate_product([one, two], [0.5, 2.0]).dense().tolist()
        [[0.5, 0.0], [0.0, 2.0]]
        >>> truncate_product([one, two], [0.5, 2.0], rank=1).dense().tolist()
        [[0.0, 0.0], [0.0, 2.0]]
    """
    if not parts or len(parts) != len(weights):
        raise UsageError(f"{len(parts)} low-rank parts and {len(weights)} weights: give one weight per part")
    if len({p.shape for p in parts}) > 1:
        raise UsageError(f"low-rank parts of shapes {[p.shape for p in parts]} cannot be summed: use one shape")
    if not all(math.isfinite(w) for w in weights):
        raise UsageError(f"weights {list(weights)} hold NaN or infinity: give finite numbers")
    if rank is not None and rank < 1:
        raise UsageError(f"rank {rank} is below 1: give a rank of 1 or more, or None for the exact sum")
    m, n = parts[0].shape
    dtype = functools.reduce(torch.promote_types, (t.dtype for p in parts for t in p), torch.float32)
    used = [(p, w) for p, w in zip(parts, weights, strict=True) if w != 0]
    if not used:
        return Factors(parts[0].b.new_zeros((m, 0), dtype=dtype), parts[0].a.new_zeros((0, n), dtype=dtype))
    b = torch.cat([p.b.to(dtype) * w for p, w in used], dim=1)
    a = torch.cat([p.a.to(dtype) for p, _ in used], dim=0)
    if not (bool(b.isfinite().all()) and bool(a.isfinite().all())):
        raise ModelError("a low-rank part holds NaN or infinity: leave it out, or mend the expert it came from")
    if rank is None and len(a) <= min(m, n):
        return Factors(b, a)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vh = thin_svd(r_b.double() @ r_a.double().mT)
    # The singular values are float64, but what they are made of was rounded to `dtype`: its eps sets the
    # rank.
    keep = min(min(m, n) if rank is None else rank, numerical_rank(s.to(dtype), (m, n)))
    return Factors(q_b @ (u[:, :keep] * s[:keep]).to(dtype), vh[:keep].to(dtype) @ q_a.mT)


def retained_energy(x: Tensor, factors: Factors) -> float:
    """The share of the matrix that its factors keep: 1 - ||x - b a||_F^2 / ||x||_F^2.

    The residual itself is summed in float64, a few rows at a time, instead of subtracting two nearly equal
    norms.

    Args:
        x: (m, n).
        factors: an approximation of x.

    Returns:
        1.0 for a zero matrix; below 0 when the factors are worse than nothing.

    Example:
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> retained_energy(x, truncate(x, 1))
        0.8
    """
    a = factors.a.double()
    residual = norm = 0.0
    for rows, b in zip(x.split(1024), factors.b.split(1024), strict=True):
        rows = rows.double()
        norm += float(rows.square().sum())
        residual += float((rows - b.double() @ a).square().sum())
    return 1.0 - residual / norm if norm > 0 else 1.0


def rank_of_rate(mask_rate: float, shape: Sequence[int]) -> int:
    """The rank that Twin-Merging's code keeps: int((1 - mask_rate) * min(m, n)), in Python floats.

    The floor of a rounded product is part of the rule (511, not 512, for 5120 at 0.9), and so is 0 for a
    small matrix at a high rate; a caller that is not after parity keeps at least 1.

    Args:
        mask_rate: the share of the singular values to drop, between 0 and 1.
        shape: (m, n).

    Raises:
        TwinmergeError: the rate is outside [0, 1].

    Example:
        >>> rank_of_rate(0.9, (768, 3072)), rank_of_rate(0.9, (5120, 5120)), rank_of_rate(0.9, (1, 768))
        (76, 511, 0)

    Source: Lu et al., Twin-Merging (NeurIPS 2024), official code.
    """
    if not 0 <= mask_rate <= 1:
        raise UsageError(f"mask rate {mask_rate} is outside [0, 1]: give the share of singular values to drop")
    return int((1 - mask_rate) * min(shape))
