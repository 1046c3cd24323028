"""How good a router's weights are on rows that it was not fitted on, and the temperature that makes them honest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.results import Table

HELD_OUT = 0.2
BINS = 15
LEVELS = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)  # of `refuse`, in a report


class _RouterReport(NamedTuple):
    rows: int
    right: float
    right_by_expert: dict[str, float]
    nll: float
    nll_calibrated: float
    ece: float
    ece_calibrated: float
    temperature: float
    confusion: list[list[int]]
    refused: float = 0.0
    refuse: float = 0.0
    unlimited: list[str] = []
    refusal: list[list[float]] = []


class RouterReport(Table, _RouterReport):
    """How held-out rows were routed. As a table: the confusion, a row for each expert.

    Attributes:
        rows: how many there were.
        right: share of them that was routed right.
        right_by_expert: the same by expert.
        nll: negative log-likelihood before the temperature.
        nll_calibrated: after it.
        ece: expected calibration error before the temperature.
        ece_calibrated: after it.
        temperature: that was fitted.
        confusion: confusion[i][j] is the number of rows of expert i that went to expert j.
        refused: share of rows that the null expert takes, each by limits that the others set.
        refuse: the share of known rows that it may take; 0 where there is no null expert.
        unlimited: experts that had too few rows for a limit: nothing that is nearest to them is ever refused.
        refusal: for some values of `refuse`, [refuse, the share of these rows that it refuses, the share of the others
            that is routed right]. Each row is judged by limits that the others set.
    """

    def _summary(self) -> str:
        never = len(self.unlimited) == len(self.right_by_expert) > 0
        left = "too few to refuse any" if never else f"{100 * self.refused:.1f} % left to the shared model"
        return f"{100 * self.right:.1f} % of {self.rows} rows right, {left}"

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[Any]]]:
        names = list(self.right_by_expert)
        rows = [[name, *row, self.right_by_expert[name]] for name, row in zip(names, self.confusion, strict=True)]
        return ["rows of", *names, "right"], rows


def held_out_split(owners: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Disjoint (train, held-out) row numbers: a fifth of every expert's rows, at least one, is held out."""
    generator = torch.Generator().manual_seed(seed)
    train, held = [], []
    for k in owners.unique().tolist():
        rows = (owners == k).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cut = max(1, int(HELD_OUT * len(rows)))
        held.append(rows[:cut])
        train.append(rows[cut:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def fit_temperature(logits: Tensor, owners: Tensor) -> float:
    """The temperature of least negative log-likelihood, by golden-section search over log T in [−4, 6].

    Source: Guo et al. 2017, "On calibration of modern neural networks", section 4.2.
    """
    low, high, ratio = -4.0, 6.0, (math.sqrt(5) - 1) / 2

    def nll(log_t: float) -> float:
        return F.cross_entropy(logits.double() / math.exp(log_t), owners).item()

    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if nll(left) <= nll(right):
            high = right
        else:
            low = left
    best = (low + high) / 2
    return math.exp(best) if nll(best) <= nll(0.0) else 1.0


def calibration_error(weights: Tensor, owners: Tensor) -> float:
    """Expected calibration error: mean |accuracy − confidence| over 15 equal bins of confidence, weighted by rows."""
    confidence, chosen = weights.max(-1)
    right = (chosen == owners).double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps: list[float] = [
        abs(right[bins == k].mean().item() - confidence[bins == k].double().mean().item()) * (bins == k).sum().item()
        for k in bins.unique()
    ]
    return sum(gaps, 0.0) / len(owners)


def refusal_curve(p_values: Tensor, right: Tensor) -> list[list[float]]:
    """What each share that may be refused does: [refuse, share refused, share of the rest that is right].

    Args:
        p_values: (rows,), as `Novelty.p_values` gives them.
        right: (rows,), whether each was routed right.

    Example:
        >>> refusal_curve(torch.tensor([0.01, 1.0]), torch.tensor([False, True]))[1:4]
        [[0.005, 0.0, 0.5], [0.01, 0.5, 1.0], [0.02, 0.5, 1.0]]
    """
    found = []
    for refuse in LEVELS:
        kept = p_values > refuse
        rest = right[kept].double().mean().item() if bool(kept.any()) else math.nan
        found.append([refuse, 1 - kept.double().mean().item(), rest])
    return found


def report_of(logits: Tensor, owners: Tensor, experts: Sequence[str], temperature: float) -> RouterReport:
    plain, calibrated = torch.softmax(logits, -1), torch.softmax(logits / temperature, -1)
    chosen = logits.argmax(-1)
    count = len(experts)
    confusion = torch.bincount(owners * count + chosen, minlength=count * count).reshape(count, count)
    by_expert = {n: (confusion[k, k] / confusion[k].sum()).item() for k, n in enumerate(experts)}
    return RouterReport(
        rows=len(owners),
        right=(chosen == owners).float().mean().item(),
        right_by_expert=by_expert,
        nll=F.cross_entropy(logits.double(), owners).item(),
        nll_calibrated=F.cross_entropy(logits.double() / temperature, owners).item(),
        ece=calibration_error(plain, owners),
        ece_calibrated=calibration_error(calibrated, owners),
        temperature=temperature,
        confusion=confusion.tolist(),
    )
