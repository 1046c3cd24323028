"""What is left of a row by the ranks of its entries: tables that say it, and the torch path that does it.

Rank 0 is the least magnitude of a row.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

DRAWS = 1 << 24
"""Draws are integers below this number (see `keyed_random.draws24`)."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """What becomes of an entry by its rank.

    below: (length,) uint32, it is kept if its draw is below; factors: (length,) float64, what it is then multiplied
    with; rising: of equal magnitudes the first has the lower rank, else the last has.
    """

    below: NDArray[np.uint32]
    factors: NDArray[np.float64]
    rising: bool

    @property
    def length(self) -> int:
        """Entries of a row."""
        return len(self.below)

    @functools.cached_property
    def plain(self) -> bool:
        """Whether nothing is multiplied."""
        return bool((self.factors == 1).all())

    @functools.cached_property
    def draws(self) -> bool:
        """Whether it takes a draw to know what is kept."""
        return bool(((self.below > 0) & (self.below < DRAWS)).any())


def limit(share: float) -> int:
    """The draws of 24 bits that are kept: those below it (see `keyed_random.kept_bits`).

    Example:
        >>> limit(0.5) == DRAWS // 2, limit(2.0) == DRAWS
        (True, True)
    """
    return DRAWS if share >= 1 else math.ceil(float(np.float32(share)) * DRAWS)


@functools.lru_cache(maxsize=256)
def rising(length: int, density: float, epsilon: float, inverse: bool) -> Ranks:
    """A share of the entries that rises with the rank, in even steps from density − epsilon to density + epsilon.

    Rows of one entry have no order: it is kept with the share `density`. So is every entry where that is 0 or 1. Of
    equal magnitudes the first has the lower rank.

    Args:
        inverse: what is kept is divided by its share, so that the expectation stays.

    Example:
        >>> table = rising(5, 0.6, 0.1, True)
        >>> (table.below / DRAWS).round(4).tolist(), (1 / table.factors).round(4).tolist()
        ([0.5, 0.55, 0.6, 0.65, 0.7], [0.5, 0.55, 0.6, 0.65, 0.7])
    """
    shares = np.full(length, float(density))
    if 0 < density < 1 and length > 1:
        shares += epsilon * (2 * np.arange(length) / (length - 1) - 1)
    below = np.where(shares >= 1, DRAWS, np.ceil(shares.astype(np.float32).astype(np.float64) * DRAWS))
    factors = 1 / np.maximum(shares, 1 / DRAWS) if inverse else np.ones(length)
    return Ranks(below.astype(np.uint32), factors, rising=True)


@functools.lru_cache(maxsize=256)
def band(length: int, cut: int, keep: int) -> Ranks:
    """All but the `cut` largest entries, and of those only the `keep` largest; of equal magnitudes the first counts as
    the larger, as in `select.py`.

    Example:
        >>> (band(5, 1, 2).below > 0).tolist()
        [False, False, True, True, False]
    """
    below = np.zeros(length, np.uint32)
    below[max(0, length - cut - keep) : length - cut] = DRAWS
    return Ranks(below, np.ones(length), rising=False)


def kept_by_rank(x: Tensor, ranks: Ranks, draws: Tensor | None) -> Tensor:
    """Rows with all but what is left of them at zero.

    Args:
        x: (..., length) float32.
        ranks: of its last axis.
        draws: (..., length) int32, where the ranks ask for draws.

    Example:
        >>> import torch
        >>> kept_by_rank(torch.tensor([1.0, -5.0, 3.0, 2.0, 4.0]), band(5, 1, 2), None).tolist()
        [0.0, 0.0, 3.0, 0.0, 4.0]
    """
    import torch

    order = x.abs().argsort(dim=-1, descending=not ranks.rising, stable=True)
    order = order if ranks.rising else order.flip(-1)

    def in_place(table: NDArray[np.float64]) -> Tensor:
        return torch.empty(x.shape, dtype=torch.float64, device=x.device).scatter_(
            -1, order, torch.from_numpy(table).to(x.device).expand(x.shape)
        )

    below = in_place(ranks.below.astype(np.float64))
    kept = below > 0 if draws is None else draws < below
    return torch.where(kept, (x.double() * in_place(ranks.factors)).to(x.dtype), 0.0)
