"""One pass over a model in which it is written down what each module is given (see `twin/mixing/layout.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """shape: of an input; prints: four numbers of each entry of its leading axis, that tell entries apart; eps: of
    its dtype."""

    shape: tuple[int, ...]
    prints: Tensor
    eps: float

    @classmethod
    def of(cls, x: Tensor) -> Call:
        return cls(tuple(x.shape), prints(x), torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)


class Glance:
    """A pass.

    Args:
        rows: of the batch.
        row: the one that was changed, None where none was.
        spread: path -> axes: what comes once for all rows is given an axis of rows there, and the changed row's is
            changed.
        originals: (module, attribute) -> the parameter, of those that stand aside meanwhile.
        times: (path, argument) -> entries of a row, by an earlier pass.

    Attributes:
        calls: (path, argument) -> what came, call by call.
        called: paths of modules that ran.
        wrong: path -> what is wrong with it, empty where its rows cannot be told apart.
    """

    def __init__(
        self,
        rows: int,
        row: int | None = None,
        spread: Mapping[str, int] | None = None,
        originals: Mapping[tuple[int, str], Tensor] | None = None,
        times: Mapping[tuple[str, str], int | None] | None = None,
    ) -> None:
        self.rows, self.row = rows, row
        self.spread = dict(spread or {})
        self.originals, self.times = dict(originals or {}), dict(times or {})
        self.calls: dict[tuple[str, str], list[Call]] = {}
        self.called: set[str] = set()
        self.wrong: dict[str, str] = {}

    def original(self, module: nn.Module, attribute: str) -> Tensor:
        found: Tensor = self.originals.get((id(module), attribute), getattr(module, attribute))
        return found

    def see(self, path: str, argument: str, x: Tensor) -> None:
        self.calls.setdefault((path, argument), []).append(Call.of(x))

    def spread_over(self, value: Tensor) -> Tensor:
        """A tensor with a leading axis of 1, once for each row; the changed row's is another."""
        found = value.expand(self.rows, *value.shape[1:]).clone()
        if self.row is not None and found.is_floating_point():
            size = float(value.abs().max()) or 1.0
            wave = torch.cos(torch.arange(value[0].numel(), device=value.device)).reshape(value.shape[1:])
            found[self.row] += (0.5 * size * wave).to(found)
        return found

    def times_of(self, path: str, name: str, value: Any) -> dict[str, int | None]:
        """For `rows_of_value`: of the tensors in an argument."""
        return {
            inner: each for (p, inner), each in self.times.items() if p == path and inner.partition(".")[0] == name
        } or {name: None}


def prints(x: Tensor) -> Tensor:
    """(leading, 4) in float64: sums of each entry's numbers by four waves.

    Example:
        >>> a = prints(torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0]]))
        >>> bool((a[0] == a[1]).all()), bool((a[0] == a[2]).all())
        (True, False)
    """
    flat = torch.nan_to_num(x.detach().reshape(len(x), -1).double(), nan=0.5).clamp(-1e30, 1e30)  # masks are large
    waves = _waves(x.device)
    found = flat.new_zeros(len(flat), 4)
    for i, part in enumerate(flat.split(LONGEST, 1)):
        found += (part @ waves[: part.shape[1]]) * (1.5 + torch.cos(i * waves[1]))
    return found


LONGEST = 1 << 16
"""Numbers of an entry after which the waves begin anew, of other heights: cosines take longer than a small model
does."""


@lru_cache(maxsize=4)
def _waves(device: torch.device) -> Tensor:
    """(LONGEST, 4)"""
    steps = torch.arange(LONGEST, dtype=torch.float64, device=device)
    return torch.stack([torch.cos(k * steps + k) for k in (0.7, 1.3, 2.1, 2.9)], 1)
