"""What all experts add to one parameter, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from twinmerge.twin.mixture import Mixture


class Low(nn.Module):
    """The factors of all experts for one matrix: b (out, columns), a (columns, rest), expert after expert.

    `widths` says how many columns an expert has; experts that leave the matrix at θs have none.

    Args:
        factors: expert's number -> (b (out, r), a (r, rest)).
        experts: how many there are.
        turned: the matrix is stored (in, out), so that it is read through bᵀ and written through aᵀ.
    """

    def __init__(
        self, name: str, factors: Mapping[int, tuple[Tensor, Tensor]], experts: int, turned: bool = False
    ) -> None:
        super().__init__()
        self.name, self.turned = name, turned
        sides = [(a.T, b.T) if turned else (b, a) for _, (b, a) in sorted(factors.items())]
        self.widths = tuple(len(factors[i][1]) if i in factors else 0 for i in range(experts))
        self.ends = [0, *accumulate(self.widths)]
        self.a: Tensor
        self.b: Tensor
        self.register_buffer("a", torch.cat([a for _, a in sides]))
        self.register_buffer("b", torch.cat([b for b, _ in sides], 1))

    def columns(self, experts: slice) -> slice:
        """Where the columns of some experts in a row stand."""
        return slice(self.ends[experts.start], self.ends[experts.stop])

    def of(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """(b, a) of one expert, as the matrix is stored; views."""
        start, stop = self.ends[expert], self.ends[expert + 1]
        if start == stop:
            return None
        b, a = self.b[:, start:stop], self.a[start:stop]
        return (a.T, b.T) if self.turned else (b, a)

    def mixed(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """The parameter plus Σ wt bt at for weights (experts,); experts without weight stay untouched."""
        total = parameter.flatten(1)
        for expert in weights.nonzero()[:, 0].tolist():
            if (found := self.of(expert)) is not None:
                total = torch.addmm(total, found[0], found[1], alpha=float(weights[expert]))
        return total.reshape(parameter.shape)


class Dense(nn.Module):
    """vt of all experts for one parameter that is no matrix: `stack` (experts, *shape)."""

    def __init__(self, name: str, stack: Tensor) -> None:
        super().__init__()
        self.name = name
        self.stack: Tensor
        self.register_buffer("stack", stack)

    def mixed(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """The parameter plus Σ wt dt for weights (experts,); experts without weight stay untouched."""
        return parameter + Mixture.of(weights[None]).dense(self.stack)[0]
