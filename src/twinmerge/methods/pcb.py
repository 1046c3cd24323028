"""PCB-Merging: entries compete within their task vector and between them, and the winners share what is merged."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.select import number
from twinmerge.methods.kit.base import (
    Known,
    Method,
    Partial,
    Pass,
    PerExpert,
    Scope,
    T_co,
    Tile,
    moved,
    per_expert,
    scale_field,
    weighted_sum,
    weights_field,
)
from twinmerge.methods.kit.threshold import known_threshold
from twinmerge.methods.kit.trim import TiesByTensor, TiesByTile, trim_passes

LEAST = 1e-12  # what the sum of the shares is at least, as in the authors' code
OF_SCORES = "pcb_"  # before the names of the passes that look at scores
MAGNITUDES = "pcb magnitudes"  # what the passes before those found


class Pcb(Method):
    """θ = θ0 + λ Σt wt st ct / Σt st, element by element: parameter competition balancing.

    1. Clamp: ct is τt with |τt| held between its quantiles `clamp` and 1 − `clamp`, q and Q.
    2. Intra-balancing: within a task vector of T, exp(T u²) with u = (|ct| − q) / (Q − q).
    3. Inter-balancing: between them, tanh(τt · Σs τs), which is negative where the expert is outvoted.
    4. Drop and rescale: of the product of both, the score, all but the `density` largest are raised to the least of
       these, and st is what that leaves, scaled to 0 … 1.

    Quantiles and scores are of the whole model (scope "model", as the paper has it) or of each tensor ("tensor"). Where
    nobody's entry is kept θ0 stays. tanh sees the task vectors as they are, so they may not be scaled.

    Three things are decided where the authors' code divides 0 by 0 or keeps what lost: magnitudes that are all equal
    have u = 1, scores that are all equal and positive st = 1, and of scores that are not positive none is kept. Their
    script for vision models has clamp=0.01 and normalises Σs τs; their search of λ by evolution is `twinmerge search`.

    Cost: a sample and a pass for the quantiles, the same for the scores, one to merge, in PyTorch. Needs no data.
    Strong where few experts disagree much; a cheap baseline beside methods on singular values.

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging", NeurIPS, arXiv 2410.02396, in the form
    of the authors' pcb-merging.py, whose density of 0.05 and λ of 1.2 are the defaults.

    Example:
        >>> from twinmerge.methods.kit.base import Place
        >>> from twinmerge.methods.kit.threshold import Threshold
        >>> x, counts = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2), torch.ones(4, dtype=torch.int64)
        >>> edges = {"trim_bracket": [1.0, 5.0] * 2, "pcb_trim_bracket": [0.5, 1.0] * 2}
        >>> bits = {name: torch.tensor(values).view(torch.int32) for name, values in edges.items()}
        >>> known = Known({name: Threshold(values, counts, counts, {}) for name, values in bits.items()})
        >>> tile = Tile(x, torch.zeros(6), Place("w", (6,), 0, ("a", "b")))
        >>> Pcb(density=0.5, scale=1.0).apply(tile, known).tolist()
        [0.0, 0.0, 0.0, 0.0, 5.0, 5.0]
    """

    laws = frozenset({"symmetric", "odd"})
    paper = "Du et al. 2024, NeurIPS, arXiv 2410.02396"
    scales_last = True

    weights: PerExpert = weights_field()
    density: float = Field(default=0.05, gt=0, description="share of the scores that count, above 0")
    clamp: float = Field(default=1e-4, ge=0, lt=0.5, description="share of the entries clamped at either end")
    scope: Scope = Field(default="model", description="what shares are of: the whole model, or each tensor")
    scale: float = scale_field(1.2)

    def passes(self) -> list[Pass[Any]]:
        ofs = [(OfSampledScores if step.sampled else OfScores)(step) for step in _passes(Scores(self), self.scope)]
        return [*_passes(self, self.scope), *ofs]

    @property
    def trims_stored(self) -> bool:
        return True

    @property
    def counts_zeros(self) -> bool:
        return True

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        return tile.x

    def keep_counts(self, totals: Tensor) -> Tensor:
        """As ranks from above those of q and Q, which are entries ⌊clamp · d⌋ and ⌊(1 − clamp) d⌋ − 1 from below."""
        share = Fraction(str(self.clamp))
        return _ranks(totals, lambda d: (d - math.floor(share * d), d - math.floor((1 - share) * d) + 1))

    def clamped(self, x: Tensor, edges: list[tuple[float, float]]) -> Tensor:
        """|ct| (experts, *tile) float64."""
        return torch.stack([row.double().abs().clamp(*edge) for row, edge in zip(x, edges, strict=True)])

    def scores(self, x: Tensor, clamped: Tensor, edges: list[tuple[float, float]]) -> Tensor:
        """(experts, *tile) in the dtype of x, divided by exp(T); 0 where they are not positive."""
        total = weighted_sum(1.0, x, torch.float64)
        out = torch.empty_like(x)
        for row, own, (low, high), to in zip(x, clamped, edges, out, strict=True):
            u = (own - low) / (high - low) if high > low else torch.ones_like(own)
            to.copy_((len(x) * (u * u - 1)).exp_() * (row.double() * total).tanh_().clamp_min_(0))
        return out

    def apply(self, tile: Tile, known: Known) -> Tensor:
        edges = _edges(known)
        clamped = self.clamped(tile.x, edges)
        found = self.scores(tile.x, clamped, edges)
        total, mass = torch.zeros_like(clamped[0]), torch.zeros_like(clamped[0])
        each = zip(per_expert(self.weights, len(found)), tile.x, clamped, found, _edges(within(known)), strict=True)
        for weight, row, own, score, (least, most) in each:
            if most > least:
                share = ((score.double() - least) / (most - least)).clamp_min_(0)
            else:
                share = ((score >= least) & (score > 0)).double()
            mass += share
            total.add_(share.mul_(own.copysign(row)).mul_(row != 0), alpha=weight)
        return moved(tile, total.div_(mass.clamp_min_(LEAST)), self.scale)


class Scores:
    """What the passes need to know to find the k-th largest score, and the largest.

    Args:
        method: whose scores.
    """

    trims_stored = False
    counts_zeros = True

    def __init__(self, method: Pcb) -> None:
        self.method = method

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        edges = _edges(known[MAGNITUDES])
        return self.method.scores(tile.x, self.method.clamped(tile.x, edges), edges)

    def keep_counts(self, totals: Tensor) -> Tensor:
        share = Fraction(str(self.method.density))
        return _ranks(totals, lambda d: (math.ceil(share * d), 1))


class OfScores(Pass[T_co]):
    """A pass over the scores, under another name than that over the task vectors has.

    Args:
        step: the pass.
    """

    def __init__(self, step: Pass[T_co]) -> None:
        self.step = step
        self.name, self.scope, self.rare = OF_SCORES + step.name, step.scope, step.rare

    def wanted(self, known: Known) -> Collection[str] | None:
        return self.step.wanted(within(known))

    def observe(self, tile: Tile, known: Known) -> Partial:
        return self.step.observe(tile, within(known))

    def add(self, total: Partial, part: Partial) -> None:
        self.step.add(total, part)

    def finish(self, total: Partial, known: Known) -> T_co:
        return self.step.finish(total, within(known))


class OfSampledScores(OfScores[T_co]):
    """The same of a sample."""

    sampled = True


def within(known: Known) -> Known:
    """What the passes over the scores found, by their own names, and what they were told."""
    own = {name.removeprefix(OF_SCORES): found for name, found in known.items() if name.startswith(OF_SCORES)}
    return Known({**own, MAGNITUDES: known})


def _passes(method: Any, scope: Scope) -> list[Pass[Any]]:
    """Those that find thresholds; which of the entries that equal one are kept makes no difference here."""
    return [step for step in trim_passes(method, scope) if not isinstance(step, (TiesByTensor, TiesByTile))]


def _ranks(totals: Tensor, ranks: Any) -> Tensor:
    """(experts, 2) of the experts' numbers of entries, at least 1 where there is one."""
    found = [[min(max(rank, 1), d) for rank in ranks(d)] for d in totals.tolist()]
    return torch.tensor(found, dtype=torch.int64, device=totals.device).reshape(-1, 2)


def _edges(known: Known) -> list[tuple[float, float]]:
    """Both thresholds of every expert, the lower one first."""
    found = known_threshold(known)
    dtype = torch.float64 if found.wide else torch.float32
    values = [number(bits, dtype) for bits in found.bits.tolist()]
    return list(zip(values[::2], values[1::2], strict=True))
