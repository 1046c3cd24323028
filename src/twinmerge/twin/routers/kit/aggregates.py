"""What a Gaussian router was made of: counts, means and scatters, which add, so that experts can come and go.

Aggregates of features only; no text and no feature of one is kept. The scatter of the experts that were there first
is one matrix; each expert that came later has its own, so that taking it out again leaves the very bytes that were
there before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

SHRINKAGE = 0.05
REFUSE = 0.02  # the share of known rows that may be refused, unless another is said
FIRST = ""  # names the scatter of the experts that were there first


class Statistics(NamedTuple):
    """first: the experts that were fitted together, () once one of them went; temperature, report: what their held-out rows gave; counts:
    expert -> rows; means: expert -> (width,); scatters: `FIRST` or an expert that came later -> Σ (z − μ)(z − μ)ᵀ
    inside the experts, (width, width); freedoms: of each scatter, its rows less the means taken off; limits: expert
    -> how many times the mean squared distance of its group's rows a row may be away before it is nobody's, `novel`
    the last features that this is taken in (0: none), refuse: the share of known rows that may be. Means and scatters are float32: a router is made of what is
    kept, never of more."""

    first: tuple[str, ...]
    temperature: float
    report: Mapping[str, Any] | None
    counts: dict[str, int]
    means: dict[str, Tensor]
    scatters: dict[str, Tensor]
    freedoms: dict[str, int]
    limits: dict[str, float] = {}
    novel: int = 0
    refuse: float = REFUSE

    @classmethod
    def of(cls, features: Tensor, owners: Tensor, experts: Sequence[str]) -> Statistics:
        """Of rows (rows, width) and the number of the expert that each belongs to (rows,).

        Example:
            >>> found = Statistics.of(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1]), ["a", "b"])
            >>> found.counts, found.means["a"].tolist(), found.scatters[FIRST].tolist()
            ({'a': 2, 'b': 1}, [2.0], [[2.0]])
        """
        z = features.double()
        means = torch.stack([z[owners == k].mean(0) for k in range(len(experts))])
        inside = z - means[owners]
        counts = {e: int((owners == k).sum()) for k, e in enumerate(experts)}
        by_name = {e: means[k].float() for k, e in enumerate(experts)}
        freedoms = {FIRST: max(1, len(z) - len(experts))}
        return cls(tuple(experts), 1.0, None, counts, by_name, {FIRST: (inside.T @ inside).float()}, freedoms)

    @property
    def experts(self) -> list[str]:
        return list(self.counts)

    def covariance(self) -> Tensor:
        """The common covariance inside the experts, float64."""
        total = sum(scatter.double() for scatter in self.scatters.values())
        assert isinstance(total, Tensor)
        return total / sum(self.freedoms.values())

    def own_covariance(self, expert: str) -> Tensor:
        """The covariance of the rows that an expert's scatter was made of, float64: its own, or that of all the first
        ones."""
        group = expert if expert in self.scatters else FIRST
        return self.scatters[group].double() / self.freedoms[group]

    def shrunk_covariance(self, last: int | None = None) -> Tensor:
        """(1 − s) Σ + s diag(Σ), s = 0.05, of all features or of the last ones, with a floor that keeps it
        invertible, float64.

        Source: Friedman 1989, "Regularized discriminant analysis", with the diagonal as the target.
        """
        covariance = self.covariance() if last is None else self.covariance()[-last:, -last:]
        spread = covariance.diagonal().clone()
        floor = spread.max() * 1e-6 + torch.finfo(torch.float64).tiny
        shrunk: Tensor = (1 - SHRINKAGE) * covariance + torch.diag(SHRINKAGE * spread + floor)
        return shrunk

    def with_expert(self, name: str, features: Tensor) -> Statistics:
        """With the rows of one more expert."""
        new = Statistics.of(features, torch.zeros(len(features), dtype=torch.int64), [name])
        return self._replace(
            counts={**self.counts, **new.counts},
            means={**self.means, **new.means},
            scatters={**self.scatters, name: new.scatters[FIRST]},
            freedoms={**self.freedoms, name: new.freedoms[FIRST]},
        )

    def without(self, name: str) -> Statistics:
        """Without an expert. The scatter of the first ones stays whole: it is the covariance of them all, and a sum
        cannot be taken apart to the bit. What was fitted or measured on rows of them all, temperature and report, is
        not of those that are left."""
        fitted = name not in self.first
        return self._replace(
            first=self.first if fitted else (),
            report=self.report if fitted else None,
            counts={e: n for e, n in self.counts.items() if e != name},
            means={e: m for e, m in self.means.items() if e != name},
            scatters={e: s for e, s in self.scatters.items() if e != name},
            freedoms={e: n for e, n in self.freedoms.items() if e != name},
            limits={e: v for e, v in self.limits.items() if e != name},
        )

    def packed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Header and tensors of an artefact; of a scatter the upper triangle."""
        header = {
            "first": list(self.first),
            "temperature": self.temperature,
            "report": self.report,
            "experts": self.experts,  # lists: an artefact's header does not keep the order of keys
            "counts": list(self.counts.values()),
            "scatters": list(self.scatters),
            "freedoms": list(self.freedoms.values()),
        }
        if self.novel:
            limits = [self.limits.get(e) for e in self.experts]
            header |= {"novel": self.novel, "limits": limits, "refuse": self.refuse}
        tensors = {f"mean/{e}": mean for e, mean in self.means.items()}
        for i, scatter in enumerate(self.scatters.values()):
            at = torch.triu_indices(*scatter.shape)
            tensors[f"scatter/{i}"] = scatter[at[0], at[1]]
        return header, tensors

    @classmethod
    def unpacked(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Statistics:
        """What `packed` wrote."""
        counts = dict(zip(header["experts"], header["counts"], strict=True))
        means = {e: tensors[f"mean/{e}"] for e in counts}
        width = len(next(iter(means.values())))
        scatters = {}
        for i, name in enumerate(header["scatters"]):
            at = torch.triu_indices(width, width)
            scatter = torch.zeros(width, width)
            scatter[at[0], at[1]] = tensors[f"scatter/{i}"]
            scatters[name] = scatter.triu() + scatter.triu(1).T
        first, report = tuple(header["first"]), header["report"]
        limits = {e: v for e, v in zip(counts, header.get("limits", ()), strict=False) if v is not None}
        freedoms = dict(zip(header["scatters"], header["freedoms"], strict=True))
        novel, refuse = header.get("novel", 0), float(header.get("refuse", REFUSE))
        known = counts, means, scatters, freedoms, limits, novel, refuse
        return cls(first, float(header["temperature"]), report, *known)
