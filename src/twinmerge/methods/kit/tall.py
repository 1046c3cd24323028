"""Tall matrices, such as tables of words, in blocks of rows: memory that does not grow with the table, and all
threads on one of them.

With m ≥ n every merge of the family is θ0 + λ Σt wt τt Ct: what is decomposed are n × n Gram matrices, which add up
over the rows, and what comes out of them are n × n coefficients.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Protocol

from twinmerge.maths.gram_svd import gram
from twinmerge.methods.kit.base import Known, Partial, Pass, PerExpert, Place, T_co, Tile, per_expert

if TYPE_CHECKING:
    from torch import Tensor

RATIO = 4  # rows for each column from which on the Gram matrices under way are smaller than the matrix itself
LEAST = 1 << 23  # elements: smaller ones are quick in one piece


def is_tall(at: Place) -> bool:
    """Whether a matrix is worked on in blocks of rows, if its method can.

    Example:
        >>> is_tall(Place("words", (50_000, 768))), is_tall(Place("w", (3072, 768)))
        (True, False)
    """
    m, n = at.shape[0], math.prod(at.shape[1:])
    return m >= RATIO * n and m * n >= LEAST and not at.wide  # a Gram matrix costs half of float64's digits


class Weighted(Protocol):
    """A method that weighs its experts."""

    @property
    def weights(self) -> PerExpert:
        """One number for all, or one for each expert."""


class RowPass(Pass[T_co]):
    """Sums of float64 matrices over the blocks of rows of one tensor, which are added up in the blocks' order."""

    scope = "tensor"
    grain = "rows"

    def __init__(self, method: Weighted) -> None:
        self.method = method

    def observe(self, tile: Tile, known: Known) -> Partial:
        return self.sums(tile.x.flatten(2), known)

    def weights(self, experts: int) -> tuple[float, ...]:
        """One for each expert."""
        return per_expert(self.method.weights, experts)

    @abstractmethod
    def sums(self, deltas: Tensor, known: Known) -> Partial:
        """What the rows (experts, rows, n) of the deltas add, which are not weighted."""


class Coefficients(RowPass["Tensor"]):
    """Ct of every expert with its weight, (experts, n, n), or one C for all, (n, n), in float64: the last pass of its
    method."""

    name = "coefficients"


def gram_of(x: Tensor) -> Partial:
    """xᵀ x (n, n) and how many rows are not zero, of some rows (rows, n) float64."""
    return {"gram": gram(x), "rows": (x != 0).any(1).sum()}
