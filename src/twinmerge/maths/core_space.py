"""The core space of low-rank matrices: the small square in which all of them live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import ModelError, UsageError
from twinmerge.maths.lowrank import Factors


class CoreSpace(NamedTuple):
    """τt = Q_B Mt Q_Aᵀ for every t, exactly: what a method does to the small Mt, it does to the τt.

    That holds for every method that is indifferent to the choice of orthonormal bases: sums, singular values and
    vectors, Gram matrices; not for those that look at single entries (TIES).

    Args:
        left: Q_B (m, p) with orthonormal columns, a basis of all B.
        right: Q_A (n, q), of all A.
        cores: (experts, p, q); p and q are the sums of the ranks, at most m and n. All float64.

    Source: Panariello et al. 2025, "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS.

    Example:
        >>> one = Factors(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0, 0.0]]))
        >>> space = CoreSpace.of([one])
        >>> space.cores.shape, space.factors(space.cores[0]).dense().abs().tolist()
        (torch.Size([1, 1, 1]), [[3.0, 4.0, 0.0], [6.0, 8.0, 0.0]])
    """

    left: Tensor
    right: Tensor
    cores: Tensor

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> CoreSpace:
        """The space of the parts (any ranks, 0 too), and their cores.

        Raises:
            TwinmergeError: a part holds NaN or infinity, or has another shape.
        """
        shapes = {part.shape for part in parts}
        if len(shapes) != 1:
            raise UsageError(f"low-rank parts of shapes {sorted(shapes)} share no space: use one shape")
        b = [part.b.double() for part in parts]
        a = [part.a.double() for part in parts]
        if not all(bool(x.isfinite().all()) for x in (*b, *a)):
            raise ModelError("a low-rank part holds NaN or infinity: leave it out, or mend the expert it came from")
        left, right = _basis(torch.cat(b, 1)), _basis(torch.cat(a).mT)
        cores = [(left.mT @ one) @ (two @ right) for one, two in zip(b, a, strict=True)]
        return cls(left, right, torch.stack(cores))

    def factors(self, core: Tensor, dtype: torch.dtype = torch.float32) -> Factors:
        """Q_B M Q_Aᵀ as a product of rank min(p, q) at most."""
        if core.shape[0] <= core.shape[1]:
            return Factors(self.left, core @ self.right.mT).to(dtype)
        return Factors(self.left @ core, self.right.mT).to(dtype)


def _basis(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x)[0]
    return q
