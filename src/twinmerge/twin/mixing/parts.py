"""What all experts add to one parameter, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from twinmerge.maths.bits import unpack
from twinmerge.twin.mixing.mixture import Mixture


class Low(nn.Module):
    """The factors of all experts for one matrix: b (out, columns), a (columns, rest), expert after expert.

    `widths` says how many columns an expert has; experts that leave the matrix at θs have none.

    Args:
        factors: expert's number -> (b (out, r), a (r, rest)).
        experts: how many there are.
        transposed: the matrix is stored (in, out), so that it is read through bᵀ and written through aᵀ.
    """

    def __init__(
        self, name: str, factors: Mapping[int, tuple[Tensor, Tensor]], experts: int, transposed: bool = False
    ) -> None:
        super().__init__()
        self.name, self.transposed = name, transposed
        sides = [(a.T, b.T) if transposed else (b, a) for _, (b, a) in sorted(factors.items())]
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
        return (a.T, b.T) if self.transposed else (b, a)

    def delta(self, expert: int) -> Tensor | None:
        """b·a of one expert, as the matrix is stored (out, rest)."""
        found = self.of(expert)
        return None if found is None else found[0] @ found[1]

    def mixed(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """The parameter plus Σ wt bt at for weights (experts,); experts without weight stay untouched."""
        total = parameter.flatten(1) if parameter.dim() > 1 else parameter[:, None]
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


class Masks(nn.Module):
    """One parameter of masked experts: τ in the parameter's shape, and mt of every expert at one bit for each weight.

    A dense st · mt ⊙ τ is made for one expert at a time, where it is used, and not kept.

    Args:
        vector: τ, in the parameter's shape and dtype.
        bits: of each expert (⌈numel / 8⌉,) uint8; None where it leaves the parameter at θs. They are held as they are
            given.
        scales: st of each expert.
    """

    def __init__(self, name: str, vector: Tensor, bits: Sequence[Tensor | None], scales: Sequence[float]) -> None:
        super().__init__()
        self.name, self.scales = name, tuple(scales)
        self.vector: Tensor
        self.register_buffer("vector", vector)
        self.has = [own is not None for own in bits]
        for i, own in enumerate(bits):
            self.register_buffer(f"bits{i}", own)

    def bits(self, expert: int) -> Tensor:
        """mt, packed."""
        return self.get_buffer(f"bits{expert}")

    def mask(self, expert: int) -> Tensor:
        """mt as zeros and ones, in the parameter's shape and dtype."""
        flags = unpack(self.bits(expert), self.vector.numel()).view(
            torch.uint8
        )  # PyTorch turns bytes into numbers faster
        return flags.to(self.vector.dtype).reshape(self.vector.shape)

    def delta(self, expert: int, weight: float = 1.0) -> Tensor | None:
        """w st · mt ⊙ τ of one expert."""
        if not self.has[expert]:
            return None
        found = self.mask(expert).mul_(self.vector)  # in place: memory that is new to the process is what takes longest
        factor = weight * self.scales[expert]
        return found if factor == 1.0 else found.mul_(factor)

    def added(self, parameter: Tensor, used: Sequence[tuple[int, float]]) -> Tensor:
        """The parameter plus Σ wt st · mt ⊙ τ of some (expert, wt); itself where there is nothing to add."""
        total = parameter
        for expert, weight in used:
            if (delta := self.delta(expert, weight)) is not None:
                total = delta.add_(total)
        return total

    def mixed(self, parameter: Tensor, weights: Tensor) -> Tensor:
        """The same for weights (experts,); experts without weight stay untouched."""
        return self.added(parameter, [(e, float(weights[e])) for e in weights.nonzero()[:, 0].tolist()])

    def at(self, expert: int, rows: Tensor) -> Tensor:
        """mt of some rows of a table alone.

        Args:
            rows: numbers of rows, any shape.

        Returns:
            (*rows, width) zeros and ones in the parameter's dtype.
        """
        bits, width = self.bits(expert), self.vector.shape[1]
        if width % 8 == 0:
            found = bits.view(-1, width // 8)[rows]
            return unpack(found.flatten(), rows.numel() * width).reshape(*rows.shape, width).to(self.vector.dtype)
        places = rows[..., None] * width + torch.arange(width, device=rows.device)
        return (bits[places >> 3] >> (places & 7) & 1).to(self.vector.dtype)


Part = Low | Dense | Masks
