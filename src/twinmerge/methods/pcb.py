"""PCB-Merging: entries compete within their task vector and between them, and the winners share what is merged."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from twinmerge.maths.select import Counts, number
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
from twinmerge.methods.kit.threshold import known_threshold, place
from twinmerge.methods.kit.trim import TiesByTensor, TiesByTile, trim_passes

PIECE = 1 << 14  # entries
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

    Cost: a sample and a pass for the quantiles, a sample and two passes for the scores, one to merge, in PyTorch, with
    two exponentials for each entry and pass. Needs no data. Strong where few experts disagree much; a cheap baseline beside methods on singular values.

    Source: Du et al. 2024, "Parameter Competition Balancing for Model Merging", NeurIPS, arXiv 2410.02396, in the form
    of the authors' pcb-merging.py, whose density of 0.05 and λ of 1.2 are the defaults.

    Example:
        >>> from twinmerge.methods.kit.base import Place
        >>> from twinmerge.methods.kit.threshold import Threshold
        >>> x, counts = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2), torch.ones(4, dtype=torch.int64)
        >>> edges = {"trim_bracket": [1.0, 5.0] * 2, "pcb_trim_bracket": [0.5] * 2}
        >>> bits = {name: torch.tensor(values).view(torch.int32) for name, values in edges.items()}
        >>> known = Known({name: Threshold(values, counts, counts, {}) for name, values in bits.items()})
        >>> known[Highest.name] = (1.0, 1.0)
        >>> tile = Tile(x, torch.zeros(6), Place("w", (6,), 0, ("a", "b")))
        >>> Pcb(density=0.5, scale=1.0).apply(tile, known).tolist()
        [0.0, 0.0, 0.0, 0.0, 5.0, 5.0]
    """

    laws = frozenset({"symmetric", "odd"})
    paper = "Du et al. 2024, NeurIPS, arXiv 2410.02396"
    group = "trim, drop, elect"
    cost = "four reads"
    strong = "few experts that disagree much"
    scales_last = True

    weights: PerExpert = weights_field()
    density: float = Field(default=0.05, gt=0, description="share of the scores that count, above 0")
    clamp: float = Field(default=1e-4, ge=0, lt=0.5, description="share of the entries clamped at either end")
    scope: Scope = Field(default="model", description="what shares are of: the whole model, or each tensor")
    scale: float = scale_field(1.2)

    def passes(self) -> list[Pass[Any]]:
        ofs = [(OfSampledScores if step.sampled else OfScores)(step) for step in _passes(Scores(self), self.scope)]
        return [*_passes(self, self.scope), *ofs, Highest(self)]

    @property
    def trims_stored(self) -> bool:
        return True

    @property
    def counts_zeros(self) -> bool:
        return True

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        return tile.x

    def keep_counts(self, totals: Counts) -> Counts:
        """As ranks from above those of q and Q, which are entries ⌊clamp · d⌋ and ⌊(1 − clamp) d⌋ − 1 from below."""
        share = Fraction(str(self.clamp))
        return _ranks(totals, lambda d: (d - math.floor(share * d), d - math.floor((1 - share) * d) + 1))

    def scores(self, x: Tensor, edges: list[tuple[float, float]]) -> Tensor:
        """(experts, *tile) in the dtype of x, divided by exp(T); 0 where they are not positive."""
        out = torch.empty_like(x)
        pieces = zip(x.flatten(1).split(PIECE, 1), out.flatten(1).split(PIECE, 1), strict=True)
        for rows, to in pieces:  # that stay in the cache
            total = weighted_sum(1.0, rows, torch.float64)
            for row, (low, high), score in zip(rows, edges, to, strict=True):
                own = row.double()
                u = own.abs().clamp_(low, high).sub_(low)
                u = u.div_(high - low) if high > low else u.fill_(1.0)
                u.mul_(u).sub_(1).mul_(len(x)).exp_()
                score.copy_(u.mul_((own * total).tanh_().clamp_min_(0)))
        return out

    def apply(self, tile: Tile, known: Known) -> Tensor:
        edges, weights = _edges(known), per_expert(self.weights, len(tile.x))
        ends = list(zip(_thresholds(within(known)), known.of(Highest), strict=True))
        scores, merged = self.scores(tile.x, edges), tile.x.new_empty(tile.x.shape[1:], dtype=torch.float64)
        every = [each.split(PIECE, -1) for each in (tile.x.flatten(1), scores.flatten(1), merged.view(-1))]
        for x, found, to in zip(*every, strict=True):
            total, mass = torch.zeros_like(to), torch.zeros_like(to)
            for weight, row, score, edge, (least, most) in zip(weights, x, found, edges, ends, strict=True):
                if most > least:
                    share = (score.double() - least).div_(most - least).clamp_min_(0)
                else:
                    share = ((score >= least) & (score > 0)).double()
                mass += share
                own = row.double()
                total.add_(share.mul_(own.abs().clamp_(*edge).mul_(own.sign())), alpha=weight)
            torch.div(total, mass.clamp_min_(LEAST), out=to)
        return moved(tile, merged, self.scale)


class Scores:
    """What the passes need to know to find the k-th largest score.

    Args:
        method: whose scores.
    """

    trims_stored = False
    counts_zeros = True

    def __init__(self, method: Pcb) -> None:
        self.method = method

    def trimmed_quantity(self, tile: Tile, known: Known) -> Tensor:
        return self.method.scores(tile.x, _edges(known[MAGNITUDES]))

    def keep_counts(self, totals: Counts) -> Counts:
        share = Fraction(str(self.method.density))
        return _ranks(totals, lambda d: (math.ceil(share * d),))


class Highest(Pass[tuple[float, ...]]):
    """The largest score of every expert; 0 where there is none.

    Args:
        method: whose scores.
    """

    name = "pcb_highest"

    def __init__(self, method: Pcb) -> None:
        self.method, self.scope = method, method.scope

    def observe(self, tile: Tile, known: Known) -> Partial:
        found = (0.0,) * len(tile.x)
        if tile.x[0].numel():
            found = tuple(self.method.scores(tile.x, _edges(known)).flatten(1).amax(1).tolist())
        return {place(tile.at): found}

    def finish(self, total: Partial, known: Known) -> tuple[float, ...]:
        return tuple(map(max, zip(*total.values(), strict=True)))


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


def _ranks(totals: Counts, ranks: Any) -> Counts:
    """(experts, ranks) of the experts' numbers of entries, at least 1 where there is one."""
    found = [[min(max(rank, 1), d) for rank in ranks(d)] for d in totals.tolist()]
    return np.array(found, np.int64)


def _thresholds(known: Known) -> list[float]:
    """Those of every expert, one after the other."""
    found = known_threshold(known)
    return [number(bits, found.wide) for bits in found.bits.tolist()]


def _edges(known: Known) -> list[tuple[float, float]]:
    """Both quantiles of every expert, the lower one first."""
    values = _thresholds(known)
    return list(zip(values[::2], values[1::2], strict=True))
