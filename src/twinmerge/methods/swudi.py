"""SWUDI-Merging: WUDI's minimum in the directions that the task vectors fill, their sum in all others."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import gram, right_side
from twinmerge.methods.kit.base import Known, Partial, Place, column, weighted_sum
from twinmerge.methods.kit.spectral import OnInputs, Weights
from twinmerge.methods.kit.tall import Coefficients
from twinmerge.methods.wudi import normal_equations

EQUAL = 1e-6  # eigenvalues that differ by less, relatively, are kept or left out together


class Swudi(OnInputs):
    """Matrices: θ = θ0 + λ [S + (M* − S) Σk hk vk vkᵀ], S = Σt wt τt; all other tensors: θ = θ0 + λ mean(wt τt).

    M* is the minimum of WUDI's objective (see `wudi`), and vk, λk are the eigenvectors of Σt Gt, largest first, with
    Gt = τtᵀ τt / ‖τt‖². Where λk is small M* is mostly noise, which is why WUDI's few steps of gradient descent from S
    give better models than M* does. In closed form such a descent is a filter of the spectrum,

        hk = 1 for the K largest λk and 0 for the others,                 time: none (the default)
        hk = 1 − exp(−time · λk) for those, 0 for the others,             gradient flow for that long.

    K is ⌈share · n⌉, n the number of inputs; without a share it follows from each spectrum, K = ⌈(Σ √λk)² / Σ λk⌉
    (participation ratio of the singular values), so that nothing is to be tuned: that is SWUDI-A. Directions whose λk
    equals the K-th are kept with it. Since every Gt has trace 1, λk and `time` do not depend on the size of the task
    vectors; the authors take times from 300 to 1,800 and shares from 0.65 to 0.85. Tables and `inputs` as in `wudi`.
    The other ranks and filters of the authors' code are not here; its Gavish-Donoho rule has a constant that is not
    Gavish and Donoho's.

    Cost: one eigendecomposition of n × n per matrix; no data and no descent. Strong where experts are many or their
    spectra are uneven, in vision and language models, and where a ridge of WUDI cannot be tuned.

    Source: Wei et al. 2026, "Closed-Form Spectral Regularization for Multi-Task Model Merging", arXiv 2606.07289, and
    its code (swudi with `share` and `time`, aswudi without).

    Example:
        >>> from twinmerge.methods.kit.base import Tile
        >>> deltas = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0]]])  # one input, which both use
        >>> tile = Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2)))
        >>> Swudi().apply(tile, Known()).tolist(), Swudi(time=math.log(2) / 2).apply(tile, Known()).tolist()
        ([[0.5, 0.0], [0.5, 0.0]], [[0.75, 0.0], [0.75, 0.0]])
    """

    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Wei et al. 2026, arXiv 2606.07289"
    group = "spectral"
    cost = "eigh per matrix"
    strong = "many or uneven experts, untuned"

    share: float | None = Field(
        default=None, gt=0, le=1, description="share of the directions kept; none: by each spectrum"
    )
    time: float | None = Field(default=None, gt=0, description="how long the gradient flow runs; none: to its end")

    def passes(self) -> tuple[Filtered, ...]:
        return () if self.calibration else (Filtered(self),)

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        normal, grams = normal_equations(deltas, weights)
        used = deltas[[bool(weight) for weight in weights]]
        total = weighted_sum(weights, deltas, torch.float64)
        lead, v, h = self.directions_of(grams, int((used != 0).any(2).sum()), self.side(at))
        return total.add_(((normal @ v) * (h / lead) - (total @ v) * h) @ v.mT).to(deltas.dtype)

    def directions_of(self, grams: Tensor, rows: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
        """λk (K,), vk (n, K) and hk (K,) of those that are kept.

        Args:
            grams: Σt Gt (n, n) float64.
            rows: of all τt, those that are zero left out.
            inputs: n of the whole matrix.
        """
        s, v = right_side(grams, rows)
        lead = s.square()
        if not len(s):
            return lead, v, lead
        if self.share is None:
            count = math.ceil(float(s.sum().square() / lead.sum()) * (1 - 1e-9))
        else:
            count = math.ceil(self.share * inputs * (1 - 1e-9))
        least = lead[min(max(count, 1), len(lead)) - 1] * (1 - EQUAL)
        count = int((lead >= least).sum())
        lead, v = lead[:count], v[:, :count]
        return lead, v, torch.ones_like(lead) if self.time is None else -torch.expm1(-self.time * lead)


class Filtered(Coefficients):
    """θ − θ0 = Σt τt Ct with Ct = wt (I + (Gt diag(1/λ) − I) diag(h)) in the directions that are kept."""

    def __init__(self, method: Swudi) -> None:
        super().__init__(method)
        self.swudi = method

    def sums(self, deltas: Tensor, known: Known) -> Partial:
        used = [bool(weight) for weight in self.weights(len(deltas))]
        grams = torch.stack([use * gram(delta.double()) for use, delta in zip(used, deltas, strict=True)])
        return {"grams": grams, "rows": (deltas[used] != 0).any(2).sum()}

    def finish(self, total: Partial, known: Known) -> Tensor:
        grams = total["grams"]
        squares = grams.diagonal(dim1=1, dim2=2).sum(1)
        grams = grams / torch.where(squares > 0, squares, 1)[:, None, None]
        lead, v, h = self.swudi.directions_of(grams.sum(0), int(total["rows"]), grams.shape[-1])
        one = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device) - (v * h) @ v.mT
        found: Tensor = one + ((grams @ v) * (h / lead)) @ v.mT
        return column(self.weights(len(found)), found) * found
