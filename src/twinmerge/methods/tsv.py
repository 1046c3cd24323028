"""TSV-Merge: the experts' leading singular vectors, made orthogonal to each other."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinmerge.maths.gram_svd import gram_polar, gram_svd, right_side
from twinmerge.methods.kit.base import Known, Partial, Pass, Place
from twinmerge.methods.kit.spectral import Spectral, Weights, short_side, weighted
from twinmerge.methods.kit.tall import Coefficients, RowPass, gram_of


class Tsv(Spectral):
    """Matrices: θ = θ0 + λ U⊥ S V⊥ᵀ; all other tensors: θ = θ0 + λ mean(wt τt).

    Each wt τt (m × n) is cut to its k = ⌊min(m, n)/T⌋ leading singular triplets, at least one; a weight of 0 has none.
    They stand side by side: U = [U1 … UT], V = [V1 … VT], S = diag(S1 … ST). U⊥ and V⊥ are the matrices with
    orthonormal columns that are nearest to U and V (their polar factors).

    Singular vectors beyond the numerical rank are never used, so the result does not depend on the basis that LAPACK
    picks for a null space. Convolution kernels are matrices (out, in·kh·kw); embeddings are matrices too.

    Source: Gargiulo et al. 2025, "Task Singular Vectors", CVPR, arXiv 2412.00081, TSV-Merge.

    Example:
        >>> import torch
        >>> from twinmerge.methods.kit.base import Place, Tile
        >>> v = torch.tensor([0.6, 0.8])
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), 3 * torch.outer(v, v)])
        >>> Tsv().apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2.1000, 0.3000],
                [0.3000, 2.9000]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Gargiulo et al. 2025, CVPR, arXiv 2412.00081"
    group = "spectral"
    cost = "SVD per change"
    strong = "simple and strong without data"

    def passes(self) -> tuple[Pass[Any], ...]:
        return () if self.calibration else (Triplets(self), Orthogonal(self))

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        return merge_singular(deltas, weights, max(1, short_side(at) // len(deltas)), at)


class Leading(NamedTuple):
    """Of one expert: s (k,) and V (n, k) of wt τt, and W so that its U is τt W."""

    s: Tensor
    v: Tensor
    w: Tensor


class Triplets(RowPass[list[Leading]]):
    """The leading singular triplets of each expert, out of its Gram matrix."""

    name = "triplets"

    def sums(self, deltas: Tensor, known: Known) -> Partial:
        found = [gram_of(delta.double()) for delta in deltas]
        return {key: torch.stack([one[key] for one in found]) for key in ("gram", "rows")}

    def finish(self, total: Partial, known: Known) -> list[Leading]:
        k = max(1, total["gram"].shape[-1] // len(total["gram"]))
        leading = []
        weights = self.weights(len(total["gram"]))
        for weight, gram, rows in zip(weights, total["gram"], total["rows"].tolist(), strict=True):
            s, v = right_side(gram, rows)
            s, v = s[: k * bool(weight)], v[:, : k * bool(weight)]
            leading.append(Leading(s * abs(weight), v, v / s * math.copysign(1, weight)))
        return leading


class Orthogonal(Coefficients):
    """U⊥ S V⊥ᵀ = Σt τt Ct: U⊥ is [U1 … UT] times a small matrix, which the Gram matrix of [U1 … UT] gives."""

    def sums(self, deltas: Tensor, known: Known) -> Partial:
        sides = [delta.double() @ one.w for delta, one in zip(deltas, known.of(Triplets), strict=True)]
        return gram_of(torch.cat(sides, 1))

    def finish(self, total: Partial, known: Known) -> Tensor:
        leading = known.of(Triplets)
        if len(leading) == 1:
            return (
                self.weights(1)[0] * torch.eye(len(leading[0].v), dtype=torch.float64, device=leading[0].v.device)[None]
            )
        lengths, v = right_side(total["gram"], int(total["rows"]))
        right = gram_polar(torch.cat([one.v for one in leading], 1), rounded=torch.float32)
        inner = (v / lengths) @ v.mT @ (torch.cat([one.s for one in leading])[:, None] * right.mT)
        parts = inner.split([len(one.s) for one in leading])
        return torch.stack([one.w @ part for one, part in zip(leading, parts, strict=True)])


def merge_singular(deltas: Tensor, weights: Weights, k: int, at: Place) -> Tensor:
    """U⊥ S V⊥ᵀ of the k leading triplets of each wt τt (T, m, n); a matrix that no expert changed stays zero."""
    if len(deltas) == 1:
        return weighted(deltas, weights)[0]
    found = [(w, *gram_svd(delta, at.name, at.rounded)) for w, delta in zip(weights, deltas, strict=True) if w]
    if not sum(len(s) for _, _, s, _ in found):
        return torch.zeros_like(deltas[0])
    u = torch.cat([u[:, :k] * math.copysign(1, w) for w, u, _, _ in found], 1).to(deltas.dtype)
    s = torch.cat([s[:k] * abs(w) for w, _, s, _ in found])
    v = torch.cat([vh[:k].mT for *_, vh in found], 1).to(deltas.dtype)
    left, right = (gram_polar(side, at.name, at.rounded) for side in (u, v))
    return ((left * s) @ right.mT).to(deltas.dtype)
