"""Lengths and angles of whole tensors, or of their rows: all inner products of what a stack over the experts holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from twinmerge.maths import fused
from twinmerge.maths.sums import blocked_gram, folded_sum, total
from twinmerge.methods.kit.base import Known, Partial, Pass, Place, Space, Tile
from twinmerge.methods.kit.tile import Grain

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")
Products = NDArray[np.float64]
"""⟨xi, xj⟩: (experts, experts, ...), symmetric, float64."""


class Shares(Pass[Found]):
    """What a method makes of all ⟨xi, xj⟩ of a whole tensor, such as what each xi is multiplied with; x are changes or
    parameters, as the method's `space` says.

    Sums of the experts, their lengths and angles, and means on a sphere are in the span of the experts: this small
    matrix says all of them, and the tensor is not read again.

    Example:
        >>> import torch
        >>> shares, known = Shares("parameters", lambda products: products.tolist()), Known()
        >>> part = shares.observe(Tile(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), None, Place("w", (2,))), known)
        >>> shares.finish(part, known)
        [[1.0, 1.0], [1.0, 5.0]]
    """

    name = "shares"
    scope = "tensor"

    def __init__(self, space: Space, found: Callable[[Products], Found]) -> None:
        self.space, self.found = space, found

    def observe(self, tile: Tile, known: Known) -> Partial:
        blocks = None
        if tile.stored is not None:
            blocks = fused.gram(None if self.space == "parameters" else tile.stored.base, tile.stored.experts)
        if blocks is None or not np.isfinite(blocks).all():  # then the tile says whose numbers are none
            blocks = blocked_gram(tile.x.flatten(1)).numpy(force=True)
        return {f"{tile.at.offset}": blocks}

    def finish(self, total_: Partial, known: Known) -> Found:
        parts = list(total_.values())
        experts = range(len(parts[0]))
        return self.found(np.array([[total(*(part[i, j] for part in parts)) for j in experts] for i in experts]))


def products_along(x: Tensor, axis: int) -> Products:
    """⟨xi, xj⟩ along one axis of the tensor, the same bits whatever its other axes.

    Args:
        x: (experts, *tile).
        axis: of the tile.

    Returns:
        (experts, experts, *the other axes).

    Example:
        >>> import torch
        >>> products_along(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), -1).tolist()
        [[[25.0, 4.0]]]
    """
    wide, count = x.double(), len(x)
    dots = {(i, j): folded_sum(wide[i] * wide[j], axis) for i in range(count) for j in range(i, count)}
    upper = {pair: dot.numpy(force=True) for pair, dot in dots.items()}
    return np.array([[upper[min(i, j), max(i, j)] for j in range(count)] for i in range(count)])


def whole_rows(at: Place) -> Grain:
    """The grain at which every row, along the last axis, lies in one tile; a vector is one row.

    Example:
        >>> [whole_rows(Place("w", shape)) for shape in [(), (5,), (3, 5), (2, 3, 5)]]
        ['element', 'matrix', 'rows', 'rows']
    """
    if len(at.shape) > 1:
        return "rows"
    return "matrix" if at.shape else "element"
