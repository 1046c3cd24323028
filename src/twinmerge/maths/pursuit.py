"""Vectors as sums of few others: orthogonal matching pursuit, and the nearest one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCORES = 1 << 25  # products of targets and atoms that are there at once
BASIS = 1 << 24  # elements of the orthonormal bases of the targets that are worked on together
DEPENDENT = 1e-7  # of an atom's norm: what is left of it beside those chosen is rounding
DONE = 1e-7  # of a target's norm: what is left of it is rounding


class Sparse(NamedTuple):
    """Targets as sums of atoms, row by row.

    Attributes:
        atom: (targets, k) int64, which atoms; 0 where the coefficient is 0 since fewer were needed.
        weight: (targets, k) float64, their coefficients.
    """

    atom: Tensor
    weight: Tensor


def batches(targets: int, atoms: int, width: int, k: int) -> Iterator[slice]:
    """The targets that are worked on together."""
    step = max(1, min(SCORES // max(atoms, 1), BASIS // max(width * k, 1)))
    for start in range(0, targets, step):
        yield slice(start, min(start + step, targets))


def matching_pursuit(atoms: Tensor, targets: Tensor, k: int) -> Sparse:
    """Orthogonal matching pursuit: each target as a sum of at most k atoms.

    From the residual r = e of a target e, k times: the atom with the largest |⟨r, a⟩| is added to those chosen, and r
    becomes e less its projection on all of them, e − Σj cj aj with the c of least squares. The atoms count as they are,
    not scaled to length 1. It ends early where r is 0, or every atom that could be added depends on those chosen, as
    far as float64 tells (1e-7 of the norm).

    Args:
        atoms: (atoms, width), float32; the products that choose are taken in it, all else in float64.
        targets: (targets, width), on the same device.
        k: atoms of a target, at most.

    Source: Pati, Rezaiifar and Krishnaprasad 1993; with atoms of any length as Goddard and Neto 2025, "Training-Free
    Tokenizer Transplantation via Orthogonal Matching Pursuit", arXiv 2506.06607, and mergekit 0.1.5.

    Example:
        >>> atoms = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 1.0, 0.0]])
        >>> found = matching_pursuit(atoms, torch.tensor([[3.0, 4.0, 1.0]]), 2)
        >>> found.atom.tolist(), [[round(c, 6) for c in row] for row in found.weight.tolist()]
        ([[1, 0]], [[2.0, 3.0]])
    """
    wide = targets.to(torch.float64)
    count, width = wide.shape
    device = atoms.device
    index = torch.zeros(count, k, dtype=torch.int64, device=device)
    upper = torch.eye(k, dtype=torch.float64, device=device).repeat(
        count, 1, 1
    )  # atoms = basis · upper, column by column
    along = torch.zeros(count, k, dtype=torch.float64, device=device)
    basis = torch.zeros(count, k, width, dtype=torch.float64, device=device)
    left, norm = wide.clone(), wide.norm(dim=1)
    open_ = norm > 0
    chosen = torch.zeros(count, len(atoms), dtype=torch.bool, device=device)
    for step in range(min(k, len(atoms), width)):
        open_ = open_ & (left.norm(dim=1) > DONE * norm)
        if not bool(open_.any()):
            break
        scores = (left.to(atoms.dtype) @ atoms.T).abs_().masked_fill_(chosen, -1.0)
        best = scores.argmax(1)
        atom = atoms[best].to(torch.float64)
        rest, before = atom, torch.zeros(count, step, dtype=torch.float64, device=device)
        for _ in range(2):  # the second time takes off what rounding left of the first
            part = (basis[:, :step] @ rest[:, :, None])[:, :, 0]
            rest, before = rest - (part[:, None] @ basis[:, :step])[:, 0], before + part
        length = rest.norm(dim=1)
        open_ = open_ & (length > DEPENDENT * atom.norm(dim=1))
        chosen[torch.arange(count, device=device), best] = True
        length = torch.where(open_, length, 1.0)
        unit = torch.where(open_[:, None], rest / length[:, None], 0.0)
        basis[:, step] = unit
        along[:, step] = (unit * left).sum(1)
        left = left - along[:, step, None] * unit
        upper[:, :step, step] = torch.where(open_[:, None], before, 0.0)
        upper[:, step, step] = length
        index[:, step] = torch.where(open_, best, 0)
    weight = torch.linalg.solve_triangular(upper, along[:, :, None], upper=True)[:, :, 0]
    return Sparse(index, weight)


def nearest(atoms: Tensor, targets: Tensor) -> Tensor:
    """The atom with the largest cosine to each target, (targets,) int64; the first of several.

    Args:
        atoms: (atoms, width), none of norm 0.
        targets: (targets, width).

    Example:
        >>> nearest(torch.tensor([[9.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [-1.0, -9.0]])).tolist()
        [1, 0]
    """
    units = atoms / atoms.norm(dim=1, keepdim=True)
    found: Tensor = (targets.to(units.dtype) @ units.T).argmax(1)
    return found
