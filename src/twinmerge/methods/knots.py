"""KnOTS: low-rank experts are aligned by one decomposition of them all, then merged entry by entry by TIES."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.gram_svd import gram_svd
from twinmerge.maths.lowrank import Factors
from twinmerge.methods.kit.base import (
    Grain,
    Known,
    Partial,
    Pass,
    Place,
    Scope,
    T_co,
    Tile,
    moved,
    per_expert,
    scale_field,
)
from twinmerge.methods.kit.spectral import Spectral, Weights, as_precise, weighted
from twinmerge.methods.kit.trim import trim_passes
from twinmerge.methods.ties import Majority, Tie, Ties


class Knots(Spectral):
    """Matrices: [w1 τ1 … wT τT] = U diag(s) [V1ᵀ … VTᵀ]; θ = θ0 + λ U · ties(diag(s) V1ᵀ, …); all other tensors: mean.

    TIES is that of `ties` on each expert's diag(s) Vtᵀ. It keeps the `density` largest entries of those of all
    matrices together (scope "model", the paper; an exact count, equals in the order of name and index) or of each
    matrix ("tensor"). It elects the sign of their sum, and takes the mean of what agrees; "majority" is the sign of
    most entries of the model where votes cancel. With low-rank adapters the decomposition is that of their
    factors, and the merge is an adapter of at most the summed rank. Singular values that are alike leave U to
    LAPACK's choice, which TIES sees. Directions below s1 · max(m, n) · eps are left out; the authors' code cuts at
    1e-5, whatever the scale of the deltas, keeps one entry more and every one that equals the threshold.

    Every pass decomposes all matrices again, so that none but those under way is held.

    Source: Stoica et al. 2025, "Model Merging with SVD to Tie the Knots", ICLR, arXiv 2410.19735, section 4.

    Example:
        >>> from twinmerge.methods.kit.base import Tile
        >>> deltas = torch.stack([torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        >>> Knots(density=1.0, tie="zero", scale=1.0).apply(Tile(deltas, torch.zeros(2, 2), Place("w", (2, 2))), Known())
        tensor([[2., 0.],
                [0., 1.]])
    """

    sided = True
    laws = frozenset({"symmetric", "odd", "homogeneous"})
    paper = "Stoica et al. 2025, ICLR, arXiv 2410.19735"
    group = "spectral"
    cost = "SVD of all"
    strong = "LoRA experts: above a plain sum"

    scale: float = scale_field(0.6)
    density: float = Field(default=0.2, ge=0, le=1, description="share of each expert's entries that TIES keeps")
    scope: Scope = Field(default="model", description="what the density counts: the whole model, or each tensor")
    tie: Tie = Field(default="majority", description="the elected sign where the votes cancel")

    @property
    def ties(self) -> Ties:
        return Ties(density=self.density, scope=self.scope, tie=self.tie)

    def passes(self) -> list[InAlignedSpace[Any]]:
        """Those of TIES, in the aligned space; none of them can look at a sample of it."""
        ties = self.ties
        steps: list[Pass[Any]] = trim_passes(ties, self.scope, sampled=False) if ties.trims else []
        if self.tie == "majority":
            steps.append(Majority(ties))
        return [InAlignedSpace(self, step) for step in steps]

    def grain_of(self, at: Place) -> Grain:
        return "matrix" if self.decomposes(at) else "element"

    def combine(self, deltas: Tensor, weights: Weights, at: Place) -> Tensor:
        raise AssertionError("KnOTS merges entries of the aligned space, which takes what the passes found")

    def apply(self, tile: Tile, known: Known) -> Tensor:
        if not self.decomposes(tile.at) or tile.at.stack or tile.factors is not None:
            return super().apply(tile, known)
        deltas, weights = self.matrices(tile), per_expert(self.weights, len(tile.x))
        merged = self.calibrated(
            self.tied(*aligned(weighted(deltas, weights), tile.at), known), deltas, weights, tile.at
        )
        return moved(tile, self.as_stored(merged, tile.at), self.scale)

    def merge_factors(self, parts: Sequence[Factors], at: Place, known: Known) -> Factors:
        if not self.decomposes(at):
            return super().merge_factors(parts, at, known)
        basis, reduced = in_basis(self.sides(parts, at), per_expert(self.weights, len(parts)))
        merged = self.tied(*aligned(reduced, as_precise(parts, at)), known)
        merged = self.calibrated(merged, reduced, (1.0,) * len(parts), at)
        return self.sides([Factors(basis, merged * self.scale).to(at.rounded)], at)[0]

    def tied(self, left: Tensor, entries: Tile, known: Known) -> Tensor:
        """U times what TIES makes of the aligned parts, in float64."""
        return left.double() @ self.ties.apply(entries, known).double()

    def entries(self, tile: Tile) -> Tile:
        """The aligned parts of a matrix."""
        if tile.factors is not None:
            parts = self.sides(tile.factors, tile.at)
            reduced = in_basis(parts, per_expert(self.weights, len(parts)))[1]
            return aligned(reduced, as_precise(parts, tile.at))[1]
        return aligned(weighted(self.matrices(tile), per_expert(self.weights, len(tile.x))), tile.at)[1]


class InAlignedSpace(Pass[T_co | None]):
    """A pass of TIES over the aligned parts of all matrices; where factors are merged, what is treated like vectors
    comes in one piece too, and is left out. It finds None where nothing else comes."""

    grain = "matrix"

    def __init__(self, method: Knots, step: Pass[T_co]) -> None:
        self.method, self.step = method, step
        self.name, self.scope, self.rare = step.name, step.scope, step.rare

    def wanted(self, known: Known) -> Collection[str] | None:
        return () if None in known.values() else self.step.wanted(known)

    def observe(self, tile: Tile, known: Known) -> Partial:
        found: Partial = {}
        if not self.method.decomposes(tile.at):
            return found
        for part in tile.parts if tile.at.stack else [tile]:
            self.step.add(found, self.step.observe(self.method.entries(part), known))
        return found

    def add(self, total: Partial, part: Partial) -> None:
        self.step.add(total, part)

    def finish(self, total: Partial, known: Known) -> T_co | None:
        return self.step.finish(total, known) if total else None


def aligned(deltas: Tensor, at: Place) -> tuple[Tensor, Tile]:
    """U (m, r), and diag(s) Vtᵀ (experts, r, n) as a tile, so that U @ diag(s) Vtᵀ is expert t's delta, of deltas
    (experts, m, n)."""
    experts, m, n = deltas.shape
    u, s, vh = gram_svd(deltas.permute(1, 0, 2).reshape(m, experts * n), at.name, at.rounded)
    parts = (s[:, None] * vh).reshape(len(s), experts, n).permute(1, 0, 2).to(at.rounded).contiguous()
    return u, Tile(parts, torch.zeros_like(parts[0]), at)


def in_basis(parts: Sequence[Factors], weights: Weights) -> tuple[Tensor, Tensor]:
    """Q (m, p) of all columns, and wt τt in it (experts, p, n), float64."""
    basis: Tensor = torch.linalg.qr(torch.cat([part.b.double() for part in parts], 1))[0]
    by = zip(weights, parts, strict=True)
    return basis, torch.stack([w * (basis.mT @ part.b.double()) @ part.a.double() for w, part in by])
