"""TSV-Merge: the experts' leading singular vectors, made orthogonal to each other."""

import math

import torch
from torch import Tensor

from twinmerge.maths.lowrank import polar, truncate
from twinmerge.methods.base import (
    Known,
    Method,
    PerExpert,
    Tile,
    column,
    moved,
    scale_field,
    weighted_sum,
    weights_field,
)


class Tsv(Method):
    """Matrices: θ = θ0 + λ U⊥ S V⊥ᵀ; all other tensors: θ = θ0 + λ mean(wt τt).

    Each τt (m × n) is cut to its k = ⌊min(m, n)/T⌋ leading singular triplets (at least one); U = [U1 … UT],
    V = [V1 … VT], S = diag(S1 … ST), and U⊥, V⊥ are the nearest matrices with orthonormal columns (polar factors).
    Rank-aware: singular vectors beyond the numerical rank are never used, so the result does not depend on the
    basis that LAPACK picks for a null space. Convolution kernels are matrices (out, in·kh·kw); embeddings are matrices.

    Source: Gargiulo et al. 2025, "Task Singular Vectors", CVPR, arXiv 2412.00081, TSV-Merge.

    Example:
        >>> import torch
        >>> from twinmerge.methods.base import Place, Tile
        >>> v = torch.tensor([0.6, 0.8])
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), 3 * torch.outer(v, v)])
        >>> Tsv().apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), {})
        tensor([[2.1000, 0.3000],
                [0.3000, 2.9000]])
    """

    grain = "matrix"
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Gargiulo et al. 2025, CVPR, arXiv 2412.00081"

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if not tile.at.is_matrix:
            return moved(tile, weighted_sum(self.weights, tile.x, tile.work) / len(tile.x), self.scale)
        deltas = column(self.weights, tile.x) * tile.x
        return moved(tile, merge_singular(deltas.flatten(2), tile.at.name).reshape(tile.x[0].shape), self.scale)


def merge_singular(deltas: Tensor, name: str) -> Tensor:
    """U⊥ S V⊥ᵀ of the stack `deltas` (T, m, n); a matrix that no expert changed stays zero."""
    experts, m, n = deltas.shape
    if experts == 1:
        return deltas[0]
    k = max(1, math.floor(min(m, n) / experts))
    left, values, right = [], [], []
    for delta in deltas:
        factors = truncate(delta, k, name=name)
        if factors.rank == 0:
            continue
        b = factors.b.double()  # squares of float32 numbers below 1e-23 or above 1e19 leave its range
        s = b.norm(dim=0)
        left.append((b / s).to(delta.dtype))
        values.append(s.to(delta.dtype))
        right.append(factors.a.T)
    if not left:
        return torch.zeros_like(deltas[0])
    u, v = polar(torch.cat(left, 1)), polar(torch.cat(right, 1))
    return (u * torch.cat(values)) @ v.T
