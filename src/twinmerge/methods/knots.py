"""KnOTS: low-rank experts are aligned by one decomposition of them all, then merged entry by entry by TIES."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import gram_svd
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.select import keep_count, largest
from twinmerge.methods.base import Place, per_expert, scale_field
from twinmerge.methods.spectral import Spectral


class Knots(Spectral):
    """Matrices: [w1 τ1 … wT τT] = U diag(s) [V1ᵀ … VTᵀ]; θ = θ0 + λ U · ties(diag(s) V1ᵀ, …); all other tensors: mean.

    TIES keeps the `density` largest entries of each expert's diag(s) Vtᵀ (an exact count, equals by index), elects the sign of
    their sum, and takes the mean of what agrees with it. With low-rank adapters the decomposition is that of their factors, and
    the merge is an adapter of at most the summed rank. Singular values that are alike leave U to LAPACK's choice, which TIES sees.
    Directions below s1 · max(m, n) · eps are left out; the authors' code cuts at 1e-5, whatever the scale of the deltas.

    Source: Stoica et al. 2025, "Model Merging with SVD to Tie the Knots", ICLR, arXiv 2410.19735, section 4.

    Example:
        >>> from twinmerge.methods.base import Tile
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> Knots(density=1.0, scale=1.0).apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), {})
        tensor([[2., 0.],
                [0., 1.]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Stoica et al. 2025, ICLR, arXiv 2410.19735"

    scale: float = scale_field(0.6)
    density: float = Field(default=0.2, ge=0, le=1, description="share of each expert's entries that TIES keeps")

    def combine(self, deltas: Tensor, at: Place) -> Tensor:
        left, parts = aligned(deltas, at.name)
        return (left @ self.ties(parts)).to(deltas.dtype)

    def merge_factors(self, parts: Sequence[Factors], at: Place) -> Factors:
        by = per_expert(self.weights, len(parts))
        basis: Tensor = torch.linalg.qr(torch.cat([part.b.double() for part in parts], 1))[0]
        reduced = torch.stack([w * (basis.mT @ p.b.double()) @ p.a.double() for w, p in zip(by, parts, strict=True)])
        left, aligned_parts = aligned(reduced, at.name)
        merged = left @ self.ties(aligned_parts)
        return Factors(basis.float(), (self.calibrated(merged, reduced, at) * self.scale).float())

    def ties(self, parts: Tensor) -> Tensor:
        """The mean of what agrees with the elected sign, of (experts, rank, n)."""
        narrow = parts.float()
        kept = torch.where(largest(narrow, keep_count(self.density, narrow[0].numel())), parts, 0)
        sign = kept.sum(0).sign()
        agree = (kept.sign() == sign) & (kept != 0)
        return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def aligned(deltas: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor]:
    """U (m, r) and diag(s) Vtᵀ (experts, r, n) of deltas (experts, m, n), so that U @ diag(s) Vtᵀ is expert t's delta."""
    experts, m, n = deltas.shape
    u, s, vh = gram_svd(deltas.permute(1, 0, 2).reshape(m, experts * n), name, torch.float32)
    return u, (s[:, None] * vh).reshape(len(s), experts, n).permute(1, 0, 2).contiguous()
