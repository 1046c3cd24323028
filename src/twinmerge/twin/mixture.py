"""One weight per expert and row, turned into the pieces of work that a pass does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError, nearest

MixtureLike = Tensor | Mapping[str, float] | Sequence[Mapping[str, float]]


class Part(NamedTuple):
    """Rows [start, stop) take `expert` with `weights` (stop − start,)."""

    expert: int
    start: int
    stop: int
    weights: Tensor


@dataclass(frozen=True)
class Mixture:
    """The weights (rows, experts) of a batch whose rows are already in the order of `order`.

    parts: the work; where no row has more than one expert, rows of one expert lie side by side and each part is a
    slice; else each part is all rows with one expert's column. Experts without weight take no part at all.
    uniform: every row has the same weights.
    owner: (rows,) the one expert of each row (any where a row has none); None where a row has several.
    """

    weights: Tensor
    parts: tuple[Part, ...]
    order: Tensor | None
    uniform: bool
    owner: Tensor | None

    @property
    def rows(self) -> int:
        return int(self.weights.shape[0])

    @classmethod
    def of(cls, weights: Tensor, group: bool = True) -> Mixture:
        """Plan a batch.

        Args:
            weights: (rows, experts), finite.
            group: allow another order of the rows.
        """
        used = weights != 0
        uniform = bool((weights == weights[:1]).all())
        order = None
        single = bool((used.sum(1) <= 1).all())
        if single and not uniform and group:
            order = torch.argsort(torch.where(used.any(1), used.int().argmax(1), weights.shape[1]), stable=True)
            weights, used = weights[order], used[order]
        parts = []
        for expert in used.any(0).nonzero()[:, 0].tolist():
            start, stop = 0, len(weights)
            if order is not None:
                rows = used[:, expert].nonzero()[:, 0]
                start, stop = int(rows[0]), int(rows[-1]) + 1
            parts.append(Part(expert, start, stop, weights[start:stop, expert]))
        return cls(weights, tuple(parts), order, uniform, used.int().argmax(1) if single else None)

    def covers(self, experts: Collection[int]) -> bool:
        """True where several experts work on the same rows and they are all of `experts`."""
        return self.order is None and len(self.parts) > 1 and {part.expert for part in self.parts}.issuperset(experts)

    def dense(self, stack: Tensor) -> Tensor:
        """Σ wt dt out of the experts' (experts, *shape): (rows, *shape), or (1, *shape) where all rows are alike.

        Experts that no row uses stay untouched.
        """
        weights = (self.weights[:1] if self.uniform else self.weights).to(stack)
        if self.owner is None:
            used = [part.expert for part in self.parts]
            mixed: Tensor = torch.tensordot(weights[:, used], stack[used], 1)
            return mixed
        owner = self.owner[: len(weights)]
        return stack[owner] * weights.gather(1, owner[:, None]).reshape(-1, *[1] * (stack.dim() - 1))


def mixture_weights(mixture: MixtureLike, experts: Sequence[str], rows: int) -> Tensor:
    """(rows, experts) float32 out of what a caller gives: one mapping for all rows, one per row, or a tensor.

    Errors:
        TwinmergeError: unknown expert (with the nearest right one), wrong number of rows, NaN.

    Example:
        >>> mixture_weights({"b": 0.25, "a": 0.75}, ["a", "b"], 2)
        tensor([[0.7500, 0.2500],
                [0.7500, 0.2500]])
    """
    if isinstance(mixture, Tensor):
        weights = mixture.to(torch.promote_types(mixture.dtype, torch.float32))
        weights = weights.expand(rows, -1) if weights.dim() == 1 else weights
    else:
        given = [mixture] * rows if isinstance(mixture, Mapping) else list(mixture)
        weights = torch.zeros(len(given), len(experts))
        for row, chosen in zip(weights, given, strict=True):
            for name, value in chosen.items():
                row[index_of(name, experts)] = value
    if weights.shape != (rows, len(experts)):
        raise TwinmergeError(
            f"The mixture is {list(weights.shape)}, expected one row of {len(experts)} weights for each of {rows} inputs."
        )
    if not bool(weights.isfinite().all()):
        raise TwinmergeError("The mixture holds NaN or infinity. Give finite weights.")
    return weights


def on_simplex(weights: Tensor, normalize: bool = False) -> Tensor:
    """Mixtures with weights ≥ 0 that add up to at most 1: what is left to 1 is the shared part's.

    Args:
        weights: (rows, experts), finite.
        normalize: divide each row by its sum first.

    Errors:
        TwinmergeError: a negative weight or a sum above 1; with `normalize`, a sum that is not positive.

    Example:
        >>> on_simplex(torch.tensor([[3.0, 1.0]]), normalize=True)
        tensor([[0.7500, 0.2500]])
    """
    sums = weights.sum(1)
    if normalize:
        if not bool((sums > 0).all()):
            raise TwinmergeError(
                "A row's weights add up to nothing above 0, so they cannot be normalised. Give other weights."
            )
        weights = weights / sums[:, None]
        sums = torch.ones_like(sums)
    if bool((weights < 0).any()) or bool((sums > 1 + 1e-4).any()):
        worst = sums[int(sums.argmax())] if bool((sums > 1 + 1e-4).any()) else weights.min()
        what = "add up to" if bool((sums > 1 + 1e-4).any()) else "hold"
        raise TwinmergeError(
            f"The mixture's weights {what} {float(worst):.4g}; they must be at least 0 and add up to 1 at most. Say normalize=True "
            "to divide by their sum, or free=True to mix with any weights."
        )
    return weights


def index_of(name: str, experts: Sequence[str]) -> int:
    """The position of an expert by its name."""
    if name not in experts:
        raise TwinmergeError(
            f"There is no expert {name!r}.{nearest(name, experts)} The twin has: {', '.join(experts)}."
        )
    return list(experts).index(name)


def one_hot(names: Sequence[str], experts: Sequence[str]) -> Tensor:
    """(rows, experts): weight 1 for the named expert of each row."""
    return torch.nn.functional.one_hot(torch.tensor([index_of(n, experts) for n in names]), len(experts)).float()
