"""How modules add the parts of masked experts: θs + Σt wt st mt ⊙ τ is made for one module at a time and let go.

Rows of one mixture take one product with the sum, so that a batch whose rows have one expert each costs no more
products than one model. Where rows of few experts have many mixtures, each expert's st mt ⊙ τ is made once and
multiplied with all its rows instead. Both are exact; in 16 bits a sum is rounded to 16 bits, as `extract` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from twinmerge.twin.mixing.forward import Forward, Seen
from twinmerge.twin.mixing.kinds import matrix_of, rows_with_biases
from twinmerge.twin.mixing.mixture import Mixture
from twinmerge.twin.mixing.parts import Masks

MAKING = 32  # positions whose product with a matrix takes as long as making it of one expert's mask: 20 to 40 on a CPU


def apart(mixture: Mixture, positions: int) -> bool:
    """Whether each mixture's weights are made for its own rows, rather than each expert's for all rows that use it.

    The one makes matrices of Σ (experts of each stretch of rows) masks, the other of each expert's once for each of its
    blocks, and multiplies each position once more for each of its experts.

    Args:
        positions: of a row.

    Example:
        >>> apart(Mixture.of(torch.eye(2)), 1), apart(Mixture.of(torch.rand(64, 4)), 1)
        (True, False)
    """
    more = sum(len(s.used) for s in mixture.stretches) - sum(b.experts.stop - b.experts.start for b in mixture.blocks)
    products = sum((s.rows.stop - s.rows.start) * len(s.used) for s in mixture.stretches) * positions
    return bool(more * MAKING <= products)


def stretches(place: Seen, mixture: Mixture, leading: int) -> Iterator[tuple[slice, tuple[tuple[int, float], ...]]]:
    """(entries of the leading axis, the (expert, weight) of their mixture)."""
    times = 1 if mixture.uniform else place.times(mixture, leading)
    for rows, used in mixture.stretches:
        yield slice(None) if mixture.uniform else slice(rows.start * times, rows.stop * times), used


def singles(place: Seen, part: Masks, mixture: Mixture, x: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """(entries of the leading axis, an expert that they use, its weights (those entries or 1, 1, ...))."""
    times = 1 if mixture.uniform else place.times(mixture, len(x))
    for block in mixture.blocks:
        rows = slice(None) if mixture.uniform else slice(block.rows.start * times, block.rows.stop * times)
        for expert in range(block.experts.start, block.experts.stop):
            if part.has[expert]:
                own = mixture.weights[slice(0, 1) if mixture.uniform else block.rows, expert].to(x)
                yield rows, expert, own.repeat_interleave(times).reshape(-1, *[1] * (x.dim() - 1))


class MaskedLinear(Forward):
    """y = (W + w s m ⊙ τ) x + (b + w · db); nn.Linear, and Conv1D, whose matrix and mask are stored transposed."""

    weight: Masks

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y = rows_with_biases(self.module, x, None if self.bias is None else self.shift(x, mixture))
        if apart(mixture, math.prod(x.shape[1:-1])):
            for rows, used in stretches(self, mixture, len(x)):
                self.add(y[rows], x[rows], self.weight.added(self.module.weight, used))
        else:
            self.add(y, x, self.module.weight)
            for rows, expert, w in singles(self, self.weight, mixture, x):
                self.add(y[rows], x[rows] * w, self.weight.delta(expert))
        return y

    def add(self, y: Tensor, x: Tensor, weight: Tensor | None) -> None:
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix_of(self.module, weight))


class MaskedEmbedding(Forward):
    """y += w s m[ids] ⊙ τ[ids]: only the bits of the rows that are looked up are read."""

    weight: Masks
    lookup = True

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        y: Tensor = self.own(self.module, x).contiguous()
        tau = F.embedding(x, self.weight.vector)
        for rows, expert, w in singles(self, self.weight, mixture, y):
            mask = self.weight.at(expert, x[rows])
            y[rows].addcmul_(mask.mul_(tau[rows]), w * self.weight.scales[expert])
        return y


class MaskedConv2d(Forward):
    """A convolution with the mixture's kernel."""

    weight: Masks

    def mixed(self, x: Tensor, mixture: Mixture) -> Tensor:
        kernel, run = self.module.weight, self.module._conv_forward
        if apart(mixture, 1):
            answers = [
                run(x[rows], self.weight.added(kernel, used), self.module.bias)
                for rows, used in stretches(self, mixture, len(x))
            ]
            y: Tensor = answers[0] if len(answers) == 1 else torch.cat(answers)
        else:
            y = self.own(self.module, x)
            for rows, expert, w in singles(self, self.weight, mixture, x):
                y[rows] += run(x[rows] * w, self.weight.delta(expert), None)
        if self.bias is not None:
            y += self.shift(y, mixture)[..., None, None]
        return y
