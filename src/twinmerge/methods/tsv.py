"""TSV-Merge: the experts' leading singular vectors, made orthogonal to each other."""

import torch
from torch import Tensor

from twinmerge.maths.gram_svd import gram_polar, gram_svd
from twinmerge.methods.base import Place
from twinmerge.methods.spectral import Spectral, short_side


class Tsv(Spectral):
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

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Gargiulo et al. 2025, CVPR, arXiv 2412.00081"

    def combine(self, deltas: Tensor, at: Place) -> Tensor:
        return merge_singular(deltas, max(1, short_side(at) // len(deltas)), at.name)


def merge_singular(deltas: Tensor, k: int, name: str) -> Tensor:
    """U⊥ S V⊥ᵀ of the k leading triplets of each of `deltas` (T, m, n); a matrix that no expert changed stays zero."""
    if len(deltas) == 1:
        return deltas[0]
    found = [gram_svd(delta, name, torch.float32) for delta in deltas]
    u = torch.cat([u[:, :k] for u, _, _ in found], 1).to(deltas.dtype)
    s = torch.cat([s[:k] for _, s, _ in found])
    v = torch.cat([vh[:k].mT for _, _, vh in found], 1).to(deltas.dtype)
    if not len(s):
        return torch.zeros_like(deltas[0])
    left, right = (gram_polar(side, name, torch.float32) for side in (u, v))
    return ((left * s) @ right.mT).to(deltas.dtype)
