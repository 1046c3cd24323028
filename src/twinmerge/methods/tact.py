"""TACT: RegMean with the Gram matrices of the task vectors' largest entries in place of the data's."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import gram
from twinmerge.maths.select import keep_count, largest
from twinmerge.methods.kit.base import Place
from twinmerge.methods.kit.spectral import OnInputs, Weights

EPS = torch.finfo(torch.float32).eps


class Tact(OnInputs):
    """Matrices: θ = θ0 + λ (Σt wt τt Ct)(Σt Ct)⁺, Ct = τ′tᵀ τ′t; all other tensors: θ = θ0 + λ mean(wt τt).

    τ′t is τt with all but its k = ⌊density · m n⌋ largest entries at zero, matrix by matrix (one at least, of equal
    ones the first, output by output). Training moves the weights along the inputs that the expert saw, so τtᵀ τt stands
    for their Gram matrix, and the small entries of τt are mostly noise in it: they are trimmed there, and nowhere else.
    density=1 is ACTMat. Ct are not divided by ‖τt‖², so experts that went far weigh more (`wudi` divides).

    The pseudo-inverse takes the eigenvalues above n · 1.2e-7 of the largest, as that of float32 does in the authors'
    code; what lies beyond stays the base's. Their k is rounded, not cut off. An expert of weight 0 counts for nothing.
    What is trimmed are entries, so low-rank experts have no core space here. Tables and `inputs` as in `wudi`.

    Cost: one eigendecomposition of n × n and one selection per expert and matrix; no data. Strong on vision models
    (1.2 to 1.5 points above TSV-Merge on CLIP B/32 and B/16 in the authors' runs) and T5; on experts trained by
    reinforcement learning the plain mean was better there.

    Source: "ACTMat" and its trimmed form, TACT, COLM 2026, arXiv 2604.01329, and its code.

    Example:
        >>> from twinmerge.methods.kit.base import Known, Tile
        >>> deltas = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])  # one input, which both use
        >>> Tact().apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[1.6000, 0.0000],
                [0.2000, 0.0000]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "COLM 2026, arXiv 2604.01329"
    group = "spectral"
    cost = "eigh per matrix"
    strong = "CLIP: 1.2–1.5 points above TSV"
    core_space = False

    density: float = Field(default=0.5, description="share of each matrix' entries that its Gram matrix is made of")

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        _, m, n = deltas.shape
        peak = float(deltas.abs().max()) if deltas.numel() else 0.0
        if not peak:
            return torch.zeros_like(deltas[0])
        count = max(1, keep_count(self.density, m * n))
        normal, grams = deltas.new_zeros(m, n, dtype=torch.float64), deltas.new_zeros(n, n, dtype=torch.float64)
        for weight, delta in zip(weights, deltas, strict=True):
            if not weight:
                continue
            own = delta.double() / peak  # so that nothing overflows
            trimmed = own if count == m * n else own.masked_fill(~largest(delta[None], count)[0], 0.0)
            square = gram(trimmed)
            normal.add_(own @ square, alpha=weight * peak)
            grams.add_(square)
        return over(normal, grams, n * EPS).to(deltas.dtype)


def over(normal: Tensor, grams: Tensor, least: float) -> Tensor:
    """normal grams⁺ (m, n), float64.

    Args:
        normal: (m, n). grams: (n, n), symmetric, no eigenvalue below 0.
        least: eigenvalues that are no more than this share of the largest count as 0.

    Example:
        >>> over(torch.tensor([[8.0, 1.0]]), torch.diag(torch.tensor([4.0, 1e-9])), 1e-7).tolist()
        [[2.0, 0.0]]
    """
    values, v = torch.linalg.eigh(grams)
    kept = (values > least * values.max()) & (values > 0)
    values, v = values[kept], v[:, kept]
    merged: Tensor = ((normal @ v) / values) @ v.mT
    return merged
