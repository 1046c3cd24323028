"""One weight per expert and row, laid out as the blocks of work that a pass does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from twinmerge.errors import UsageError, nearest

MixtureLike = Tensor | Mapping[str, float] | Sequence[Mapping[str, float]]


class Block(NamedTuple):
    """The rows `rows` take the experts `experts` (both slices of the weights)."""

    rows: slice
    experts: slice


class Stretch(NamedTuple):
    """Rows side by side of one mixture, and the (expert, weight) that it is made of."""

    rows: slice
    used: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Mixture:
    """The weights (rows, experts) of a batch whose rows are already in the order of `order`.

    blocks: rectangles of `weights` that hold every weight that is not 0: the work of a pass. An expert that no row
    uses is in none of them. uniform: every row has the same weights. owner: (rows,) the one expert of each row (any
    where a row has none); None where a row has several.
    """

    weights: Tensor
    blocks: tuple[Block, ...]
    order: Tensor | None
    uniform: bool
    owner: Tensor | None
    _columns: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return int(self.weights.shape[0])

    @property
    def used(self) -> list[int]:
        """The experts of some row."""
        return (self.weights != 0).any(0).nonzero()[:, 0].tolist()

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """The rows as stretches of one mixture each, in their order.

        Example:
            >>> Mixture.of(torch.tensor([[0.0, 1.0], [0.5, 0.0], [0.0, 1.0]])).stretches  # doctest: +NORMALIZE_WHITESPACE
            (Stretch(rows=slice(0, 1, None), used=((0, 0.5),)),
             Stretch(rows=slice(1, 3, None), used=((1, 1.0),)))
        """
        weights = self.weights.numpy(force=True)
        starts = np.flatnonzero(np.r_[True, (weights[1:] != weights[:-1]).any(1)])
        ends = [*starts[1:].tolist(), len(weights)]
        return tuple(
            Stretch(slice(start, end), tuple((e, w) for e, w in enumerate(weights[start].tolist()) if w))
            for start, end in zip(starts.tolist(), ends, strict=True)
        )

    @classmethod
    def of(cls, weights: Tensor, grouped: bool = True, reorder: bool = True) -> Mixture:
        """Lay out a batch.

        Args:
            weights: (rows, experts), finite.
            grouped: rows of like experts are brought together and each expert works on its own rows; without it all
                experts that are used work on all rows at once.
            reorder: allow another order of the rows.

        Example:
            >>> mixture = Mixture.of(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
            >>> mixture.order.tolist(), [(b.rows.start, b.rows.stop, b.experts.start) for b in mixture.blocks]
            ([1, 0, 2], [(0, 1, 0), (1, 3, 1)])
        """
        used = (weights != 0).numpy(force=True)
        uniform = bool((weights == weights[:1]).all())
        order = None
        if grouped and reorder and not uniform:
            by = np.lexsort(~used.T[::-1])  # by the first expert, then by whether the second is used, and so on; stable
            if not (np.diff(by) == 1).all():
                order = torch.from_numpy(by).to(weights.device)
                weights, used = weights[order], used[by]
        if not grouped or uniform:
            blocks = [Block(slice(0, len(used)), s) for s in _runs(np.asarray(used.any(0)))]
        else:
            blocks = _cover(used)
        owner = torch.from_numpy(used.argmax(1)).to(weights.device) if (used.sum(1) <= 1).all() else None
        return cls(weights, tuple(blocks), order, uniform, owner)

    def columns(self, block: Block, widths: tuple[int, ...], kind: Tensor) -> Tensor:
        """The weights of a block, one for each column of the experts' factors: (rows, columns), or (1, columns) where
        all rows are alike.

        Args:
            widths: columns of each expert.
            kind: an activation, for device and dtype.
        """
        key = (block.rows.start, block.experts.start, block.experts.stop, widths, kind.dtype)
        if (found := self._columns.get(key)) is None:
            rows = slice(0, 1) if self.uniform else block.rows
            times = torch.tensor(widths[block.experts], device=self.weights.device)
            found = self._columns[key] = self.weights[rows, block.experts].repeat_interleave(times, 1).to(kind)
        return found

    def dense(self, stack: Tensor) -> Tensor:
        """Σ wt dt out of the experts' (experts, *shape): (rows, *shape), or (1, *shape) where all rows are alike.

        Experts that no row uses stay untouched.
        """
        if (found := self._columns.get(id(stack))) is not None:
            return found
        weights = (self.weights[:1] if self.uniform else self.weights).to(stack)
        if self.owner is not None:
            owner = self.owner[: len(weights)]
            mixed = stack[owner] * weights.gather(1, owner[:, None]).reshape(-1, *[1] * (stack.dim() - 1))
        else:
            mixed = stack.new_zeros(len(weights), *stack.shape[1:])
            for block in self.blocks:
                mixed[block.rows] += torch.tensordot(weights[block.rows, block.experts], stack[block.experts], 1)
        self._columns[id(stack)] = mixed
        return mixed


def _runs(used: np.ndarray) -> list[slice]:
    """The stretches of True.

    Example:
        >>> _runs(np.array([True, True, False, True]))
        [slice(0, 2, None), slice(3, 4, None)]
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(np.int8)))
    return [slice(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _cover(used: np.ndarray) -> list[Block]:
    """Rectangles that cover (rows, experts): an expert's stretches of rows; neighbours that share their rows are
    one."""
    blocks: list[Block] = []
    for expert in range(used.shape[1]):
        for rows in _runs(used[:, expert]):
            last = next((i for i, b in enumerate(blocks) if b.rows == rows and b.experts.stop == expert), None)
            if last is None:
                blocks.append(Block(rows, slice(expert, expert + 1)))
            else:
                blocks[last] = Block(rows, slice(blocks[last].experts.start, expert + 1))
    return blocks


def mixture_weights(mixture: MixtureLike, experts: Sequence[str], rows: int) -> Tensor:
    """(rows, experts) float32 out of what a caller gives: one mapping for all rows, one per row, or a tensor.

    Raises:
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
        given = [mixture] * rows if isinstance(mixture, Mapping) else mixture
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(g, Mapping) for g in given):
            raise UsageError(
                "A mixture is expert -> weight for all rows, a list of such mappings with one for each row, or a "
                "tensor."
            )
        weights = torch.zeros(len(given), len(experts))
        for row, chosen in zip(weights, given, strict=True):
            for name, value in chosen.items():
                row[index_of(name, experts)] = _number(name, value)
    if weights.shape != (rows, len(experts)):
        raise UsageError(
            f"The mixture is {list(weights.shape)}, expected one row of {len(experts)} weights for each of {rows} "
            "inputs."
        )
    if not bool(weights.isfinite().all()):
        raise UsageError("The mixture holds NaN or infinity. Give finite weights.")
    return weights


def _number(name: str, value: Any) -> float:
    """A weight as a float32 can hold it; infinity beyond."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise UsageError(f"The weight of {name!r} is {value!r}, which is no number. Give one.")
    number = float(value)
    return number if abs(number) <= torch.finfo(torch.float32).max else float("inf")


def on_simplex(weights: Tensor, normalize: bool = False) -> Tensor:
    """Mixtures with weights ≥ 0 that add up to at most 1: what is left to 1 is the shared part's.

    Args:
        weights: (rows, experts), finite.
        normalize: divide each row by its sum first.

    Raises:
        TwinmergeError: a negative weight or a sum above 1; with `normalize`, a sum that is not positive.

    Example:
        >>> on_simplex(torch.tensor([[3.0, 1.0]]), normalize=True)
        tensor([[0.7500, 0.2500]])
    """
    sums = weights.sum(1)
    if normalize:
        if not bool(((sums > 0) & sums.isfinite()).all()):
            raise UsageError(
                "A row's weights add up to nothing above 0, or to infinity, so they cannot be normalised. Give other "
                "weights."
            )
        weights = weights / sums[:, None]
        sums = torch.ones_like(sums)
    if bool((weights < 0).any()) or bool((sums > 1 + 1e-4).any()):
        worst = sums[int(sums.argmax())] if bool((sums > 1 + 1e-4).any()) else weights.min()
        what = "add up to" if bool((sums > 1 + 1e-4).any()) else "hold"
        raise UsageError(
            f"The mixture's weights {what} {float(worst):.4g}; they must be at least 0 and add up to 1 at most. Say "
            "normalize=True (--normalize) to divide by their sum; in Python unconstrained=True mixes with any weights."
        )
    return weights


def index_of(name: str, experts: Sequence[str]) -> int:
    """The position of an expert by its name."""
    if not isinstance(name, str) or name not in experts:
        raise UsageError(
            f"There is no expert {name!r}.{nearest(str(name), experts)} The twin has: {', '.join(experts)}."
        )
    return list(experts).index(name)


def one_hot(names: Sequence[str], experts: Sequence[str]) -> Tensor:
    """(rows, experts): weight 1 for the named expert of each row."""
    return torch.nn.functional.one_hot(torch.tensor([index_of(n, experts) for n in names]), len(experts)).float()
