"""The r directions on either side that low-rank matrices share best: what all of them are brought into before they are
merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.lowrank import Factors

ROUNDS = 1000  # of the iteration, at most
ENOUGH = 1e-6  # less change of the relative error ends it


class SharedSpace(NamedTuple):
    """τt ≈ U Mt Vᵀ for every t, with r directions on either side that hold the most of all τt together.

    U and V maximise Σt ‖Uᵀ τ̂t V‖² (a Tucker decomposition of the stack, τt along its third axis, by higher-order
    orthogonal iteration), and Mt = Uᵀ τt V. All is computed in the core space of the matrices. Where that has r
    directions or fewer on a side, it is the space itself, and nothing is lost.

    Args:
        left: U (m, r) with orthonormal columns.
        right: V (n, r).
        cores: Mt (experts, r, r). All float64.
        kept: Σt ‖Mt‖² / Σt ‖τt‖², over the matrices that were to share.
        is_cut: whether directions were left out.

    Source: He et al. 2026, "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", ICML, arXiv
    2606.03723, and its code; De Lathauwer et al. 2000, for the iteration.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> parts = [Factors(x, torch.eye(2)), Factors(x * torch.tensor([1.0, -1.0]), torch.eye(2))]
        >>> space = SharedSpace.of(parts, 1)
        >>> space.cores.flatten().abs().round(decimals=6).tolist(), round(space.kept, 6)
        ([3.0, 3.0], 0.9)
    """

    left: Tensor
    right: Tensor
    cores: Tensor
    kept: float
    is_cut: bool

    @classmethod
    def of(
        cls, parts: Sequence[Factors], rank: int, by_norm: float = 0.0, share: Sequence[bool] | None = None
    ) -> SharedSpace:
        """The space of the parts, of any ranks.

        Args:
            parts: of one shape.
            rank: r.
            by_norm: how much parts count by their norms: τ̂t = τt / ‖τt‖ · (by_norm ‖τt‖ + (1 − by_norm) mean ‖τ‖).
            share: which of them the directions are for; all where None.

        Raises:
            TwinmergeError: a part holds NaN or infinity, or has another shape.
        """
        whole = CoreSpace.of(parts)
        norms = torch.linalg.matrix_norm(whole.cores)
        used = (norms > 0) & torch.tensor([True] * len(parts) if share is None else list(share))
        if min(whole.cores.shape[1:]) <= rank or not bool(used.any()):
            return cls(*whole, 1.0, False)
        own, sizes = whole.cores[used], norms[used]
        own = own * ((by_norm * sizes + (1 - by_norm) * sizes.mean()) / sizes / sizes.max())[:, None, None]
        u, v = _tucker(own, rank)
        cores: Tensor = u.mT @ whole.cores @ v
        kept = cores[used].square().sum() / whole.cores[used].square().sum()
        return cls(whole.left @ u, whole.right @ v, cores, float(kept), True)

    def factors(self, core: Tensor) -> Factors:
        """U M Vᵀ as a product, in float64."""
        return Factors(self.left @ core.double(), self.right.mT)


def _tucker(stack: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (p, r) and V (q, r) of a stack (experts, p, q), begun with those of either unfolding by itself."""
    whole = float(stack.square().sum())
    u = _leading(stack, rank)
    v = _leading(stack.mT, rank)
    before = 1.0
    for _ in range(ROUNDS):
        u = _leading(stack @ v, rank)
        v = _leading(stack.mT @ u, rank)
        lost = max(1 - float((u.mT @ stack @ v).square().sum()) / whole, 0.0) ** 0.5
        if abs(before - lost) < ENOUGH:
            break
        before = lost
    return u, v


def _leading(stack: Tensor, rank: int) -> Tensor:
    """The r leading left singular vectors of [X1 X2 …] for a stack (experts, p, q)."""
    gram = (stack @ stack.mT).sum(0)
    vectors: Tensor = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
    return vectors
