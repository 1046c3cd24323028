"""What the methods on singular values share: which tensors are matrices, what happens to the others, and the core
space."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.core_space import CoreSpace
from twinmerge.maths.gram_svd import gram_svd
from twinmerge.maths.lowrank import Factors
from twinmerge.maths.rule import Rule
from twinmerge.maths.svd import SVD
from twinmerge.methods.kit.base import (
    TABLES,
    Grain,
    Known,
    Method,
    PerExpert,
    Place,
    Tile,
    column,
    moved,
    per_expert,
    scale_field,
    summed_factors,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.tall import Coefficients, is_tall

Rest = Literal["mean", "sum", "base"]
Weights = tuple[float, ...]
"""One for each expert."""
PIECE = 1 << 16  # entries


def elementwise_field(default: str = "") -> Any:
    return Field(
        default=default,
        description="matrices to treat like vectors: name patterns with *, separated by spaces; `tables` is all tables of "
        "embeddings",
    )


def is_listed(at: Place, patterns: str) -> bool:
    """Whether one of the patterns, which spaces separate, fits the whole name, or is `TABLES` and fits the tensor.

    Example:
        >>> table, linear = Place("shared.weight", (9, 4), table=True), Place("embed.weight", (9, 4))
        >>> is_listed(table, TABLES), is_listed(linear, TABLES), is_listed(linear, "*embed* head.*")
        (True, False, True)
    """
    return any(at.table if pattern == TABLES else fnmatchcase(at.name, pattern) for pattern in patterns.split())


def names_tables(patterns: str) -> bool:
    """Whether the patterns ask which tensors are tables of embeddings."""
    return TABLES in patterns.split()


class Spectral(Method):
    """Matrices: θ = θ0 + λ f(w1 τ1, …, wT τT), f being the subclass's `combine`; all other tensors by `rest`.

    Convolution kernels are matrices (out, in·kh·kw), experts in one tensor a matrix each; the authors' codes of
    TSV-Merge and Iso-C average tensors of more than two axes (`elementwise` names them). `combine` must not depend on
    the orthonormal bases that its matrices are written in, so that low-rank experts are merged in their core space
    (`maths/core_space.py`), exactly and without a decomposition of a matrix of the model's size. Numerical ranks
    are those of the dtype that deltas, or factors, were rounded to (`Place.rounded`): experts that share a
    direction but for rounding must not be given one each.

    Tables of words and other tall matrices come in blocks of rows where the subclass has passes that find their
    `Coefficients`.
    """

    grain = "matrix"
    core_space = True
    scales_last = True
    sided: ClassVar[bool] = False
    """Whether the formula does another thing to the outputs, m, than to the inputs, n."""

    weights: PerExpert = weights_field()
    scale: float = scale_field(1.0)
    rest: Rest = Field(
        default="mean", description="vectors, and what elementwise names: mean or sum of τt, or the base's own"
    )
    elementwise: str = elementwise_field()
    calibration: float = Field(
        default=0.0, ge=0, description="least projection α of singular value calibration; 0: none"
    )

    @property
    def asks_for_tables(self) -> bool:
        return names_tables(self.elementwise)

    def grain_of(self, at: Place) -> Grain:
        if not self.decomposes(at):
            return "element"
        return "rows" if self.passes() and is_tall(at) and not at.stack else "matrix"

    def rule(self, at: Place, known: Known) -> Rule | None:
        if self.decomposes(at):
            return None
        weights = per_expert(self.weights, len(at.experts))
        return Rule(weights, deltas=True, scale=self.scale * share_of(self.rest, len(weights)))

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if not self.decomposes(tile.at):
            scale = self.scale * share_of(self.rest, len(tile.x))
            return moved(tile, weighted_sum(self.weights, tile.x, tile.work), scale)
        if tile.at.stack:
            return torch.stack([self.apply(part, known) for part in tile.parts])
        if tile.factors is not None and self.core_space:
            change = self.merge_factors(tile.factors, tile.at, known).dense()
            return moved(tile, change.reshape(tile.require_base().shape), 1.0)
        weights = per_expert(self.weights, len(tile.x))
        if (coefficients := known.maybe(Coefficients)) is not None:
            change = product(tile.x.flatten(2), weights, coefficients, tile.work)
            return moved(tile, change.reshape(tile.x[0].shape), self.scale)
        deltas = self.matrices(tile)
        merged = self.calibrated(self.combine(deltas, weights, tile.at), deltas, weights, tile.at)
        return moved(tile, self.as_stored(merged, tile.at), self.scale)

    def turns(self, at: Place) -> bool:
        """Whether a matrix is transposed before anything is made of it: it is stored (in, out), and the formula knows
        its sides."""
        return at.transposed and (self.sided or self.calibration > 0)

    def matrices(self, tile: Tile) -> Tensor:
        """τt as matrices (experts, m, n)."""
        deltas = tile.x.flatten(2)
        return deltas.mT if self.turns(tile.at) else deltas

    def as_stored(self, merged: Tensor, at: Place) -> Tensor:
        """A matrix (m, n) in the shape of its tensor."""
        return (merged.mT if self.turns(at) else merged).reshape(at.shape)

    def sides(self, parts: Sequence[Factors], at: Place) -> Sequence[Factors]:
        """`matrices` of factors, and back."""
        return [Factors(part.a.mT, part.b.mT) for part in parts] if self.turns(at) else parts

    def merge_factors(self, parts: Sequence[Factors], at: Place, known: Known) -> Factors:
        """λ f(w1 B1 A1, …); of what is treated like vectors, the sum."""
        if not self.decomposes(at):
            share = self.scale * share_of(self.rest, len(parts))
            return summed_factors([w * share for w in per_expert(self.weights, len(parts))], parts)
        space, weights = CoreSpace.of(self.sides(parts, at)), per_expert(self.weights, len(parts))
        own = as_precise(parts, at)
        merged = self.calibrated(self.combine(space.cores, weights, own), space.cores, weights, own)
        return self.sides([space.factors(merged.double() * self.scale, at.rounded)], at)[0]

    @abstractmethod
    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        """f of the deltas times their weights.

        Weights come in where sums are taken, in float64: a product rounded to float32 has other singular vectors than
        its equals, wherever singular values are alike.

        Args:
            deltas: (experts, m, n), outputs and inputs where `sided`, as the tile has them, or in float64 in the core
                space, where m and n are the core's.
            weights: one for each.
            at: of the whole matrix, whose shape the formula's sizes are to be taken from.
        """

    def decomposes(self, at: Place) -> bool:
        """Whether the tensor is treated as a matrix."""
        return at.is_matrix and not is_listed(at, self.elementwise)

    def calibrated(self, merged: Tensor, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        """`calibrate`, where it is asked for."""
        if not self.calibration:
            return merged
        found = self.directions(merged, deltas, weights, at)
        return calibrate(found, deltas, self.calibration, weights, at.rounded).to(merged.dtype)

    def directions(self, merged: Tensor, deltas: Tensor, weights: Weights, at: Place) -> SVD:
        """The singular value decomposition of the merged matrix that calibration works on."""
        return gram_svd(merged, at.name, at.rounded)


class OnInputs(Spectral):
    """One whose formula takes the inputs of each matrix for what the rows of its task vectors span.

    Tables of embeddings are looked up and not multiplied with, so they are treated like vectors (`elementwise`).
    `inputs`: which axis of the stored matrix the layer reads, columns for Linear, rows for GPT-2's Conv1D; auto asks
    the model's class, and takes columns where there is none.
    """

    sided = True

    elementwise: str = elementwise_field(TABLES)
    inputs: Literal["auto", "columns", "rows"] = Field(default="auto", description="the axis that the layer reads")

    def grain_of(self, at: Place) -> Grain:
        grain = super().grain_of(at)
        return "matrix" if grain == "rows" and self.turns(at) else grain

    def turns(self, at: Place) -> bool:
        return at.transposed if self.inputs == "auto" else self.inputs == "rows"

    def side(self, at: Place) -> int:
        """n, the number of inputs of the whole matrix."""
        m = at.shape[0]
        return m if self.turns(at) else int(torch.Size(at.shape).numel() // max(m, 1))


def share_of(rest: Rest, experts: int) -> float:
    """What the sum of the deltas of tensors that are not decomposed is multiplied with.

    Example:
        >>> share_of("mean", 4), share_of("sum", 4), share_of("base", 4)
        (0.25, 1.0, 0.0)
    """
    return {"mean": 1 / max(experts, 1), "sum": 1.0, "base": 0.0}[rest]


def weighted(deltas: Tensor, weights: Weights) -> Tensor:
    """wt τt of the stack, in float64 unless all weights are 1."""
    return deltas if all(w == 1 for w in weights) else column(weights, deltas.double()) * deltas


def total_of(deltas: Tensor, weights: Weights) -> Tensor:
    """Σt wt τt of the stack (experts, m, n), summed in float64 one expert after the other, in the stack's dtype."""
    flat = deltas.flatten(1)
    out = flat.new_empty(flat.shape[1])
    for one, piece in zip(out.split(PIECE), flat.split(PIECE, 1), strict=True):  # sums that stay in the cache
        one.copy_(weighted_sum(weights, piece, torch.float64))
    return out.reshape(deltas.shape[1:])


def product(deltas: Tensor, weights: Weights, coefficients: Tensor, work: torch.dtype) -> Tensor:
    """In `work`, of rows (experts, rows, n): Σt τt Ct, the weights being in the coefficients (experts, n, n); or (Σt
    wt τt) C with coefficients (n, n) that are the same for all.

    Example:
        >>> product(torch.ones(2, 1, 1), (1.0, 0.5), torch.tensor([[[2.0]], [[3.0]]]), torch.float32).tolist()
        [[5.0]]
    """
    by = coefficients.to(work)
    if by.dim() == 2:
        return total_of(deltas, weights).to(work) @ by
    out = deltas[0].to(work) @ by[0]
    for delta, own in zip(deltas[1:], by[1:], strict=True):
        out.addmm_(delta.to(work), own)
    return out


def as_precise(parts: Sequence[Factors], at: Place) -> Place:
    """The place, with the numerical ranks that low-rank experts have: those of float64 only where a factor is that."""
    return at._replace(wide=any(part.wide for part in parts))


def short_side(at: Place) -> int:
    """min(m, n) of the matrix."""
    return min(at.shape[0], math.prod(at.shape[1:]))


def calibrate(
    svd: SVD, deltas: Tensor, least: float, weights: PerExpert = 1.0, rounded: torch.dtype = torch.float32
) -> Tensor:
    """Singular value calibration: directions that several experts share are counted once, not once for each.

    With M = U diag(s) Vᵀ, direction r answers u_rᵀ M = s_r v_rᵀ; of it p_rt = ⟨u_rᵀ M, u_rᵀ τt⟩ / ‖u_rᵀ τt‖² is how
    many times expert t's own answer is in it, and

        s_r ← s_r · T / Σt max(α, p_rt).

    Args:
        svd: U (m, k), s (k,), Vᵀ (k, n) of M.
        deltas: τt (experts, m, n).
        least: α > 0, which also bounds what is made larger.
        weights: of the experts, whose τt are wt τt then.
        rounded: what τt were rounded to, whose eps says what is rounding.

    Returns:
        (m, n) in float64, of the same singular vectors; an expert that has no part in a direction, but for rounding,
            counts as p = 0.

    Source: Li et al. 2026, "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", ICML, arXiv
    2602.05536.

    Example:
        >>> same = torch.diag(torch.tensor([2.0, 1.0]))
        >>> calibrate(gram_svd(2 * same), torch.stack([same, same]), 0.1).tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    u, s, vh = svd
    answer = s[:, None] * vh
    total = torch.zeros_like(s)
    for weight, delta in zip(per_expert(weights, len(deltas)), deltas, strict=True):
        own = weight * (u.mT @ delta.double())
        norm = own.square().sum(1)
        rounding = abs(weight) * torch.finfo(rounded).eps * max(delta.shape) * delta.double().norm()
        part = norm > rounding.square()  # divided by less, p would be any number
        total += torch.where(part, (answer * own).sum(1) / torch.where(part, norm, 1), 0).clamp_min(least)
    return (u * (s * len(deltas) / total)) @ vh
