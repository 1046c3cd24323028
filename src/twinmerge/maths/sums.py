"""Sums of many numbers that are the same bits whatever the tile, the thread count or the device.

A tensor is cut, flat, into fixed blocks of 65,536 elements. Each block is summed in float64 in one fixed
order, and the sums of the blocks are then added without any rounding but the last. Tiles must be whole
blocks, except the last tile of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 65_536
_CHUNK = 2 * BLOCK  # at a time: a float64 copy of 1 MiB stays in a core's own cache


def blocked_dot(x: Tensor, y: Tensor) -> Tensor:
    """The partial sums of <x, y>, one for each block of 65,536 flat elements.

    Args:
        x, y: of one size; float64 products of float32 or narrower numbers are exact.

    Returns:
        (ceil(size / 65536),) float64. Concatenated over the tiles of a tensor it is that of the tensor.

    Example:
        >>> import torch
        >>> blocked_dot(torch.ones(65_537), torch.full((65_537,), 2.0)).tolist()
        [131072.0, 2.0]
    """
    import torch

    pairs = zip(x.flatten().split(_CHUNK), y.flatten().split(_CHUNK), strict=True)
    return torch.cat([_halve(a.double() * b.double()) for a, b in pairs])


def blocked_gram(x: Tensor) -> Tensor:
    """The partial sums of all inner products <x_i, x_j>, as `blocked_dot` has them.

    Args:
        x: (n, size).

    Returns:
        (n, n, ceil(size / 65536)) float64.

    Example:
        >>> import torch
        >>> blocked_gram(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))[:, :, 0].tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    import torch

    found = []
    for part in x.flatten(1).split(_CHUNK, 1):
        wide = part.double()
        dots = {(i, j): _halve(wide[i] * wide[j]) for i in range(len(x)) for j in range(i, len(x))}
        rows = [torch.stack([dots[min(i, j), max(i, j)] for j in range(len(x))]) for i in range(len(x))]
        found.append(torch.stack(rows))
    return torch.cat(found, 2)


def block_sums(x: Tensor) -> Tensor:
    """The partial sums of x, one for each block of 65,536 flat elements: `blocked_dot` of x and ones.

    Example:
        >>> import torch
        >>> block_sums(torch.ones(65_537)).tolist()
        [65536.0, 1.0]
    """
    import torch

    return torch.cat([_halve(a.double()) for a in x.flatten().split(_CHUNK)])


def folded_sum(x: Tensor, axis: int) -> Tensor:
    """The sum along an axis by folding it in half: the same bits whatever the other axes and the number of threads.

    Example:
        >>> import torch
        >>> folded_sum(torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 0.0]]), -1).tolist()
        [7.0, 8.0]
    """
    import torch

    while (width := x.shape[axis]) > 1:
        half, odd = divmod(width, 2)
        added = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
        x = torch.cat([added, x.narrow(axis, width - 1, 1)], axis) if odd else added
    return x.sum(axis)


def total(*partials: Tensor | Iterable[float]) -> float:
    """The sum of all partial sums, rounded once (so their order does not matter either); 0.0 for none.

    Example:
        >>> import torch
        >>> total(torch.tensor([1e16, 1.0], dtype=torch.float64), [-1e16])
        1.0
    """
    return math.fsum(value for part in partials for value in (part.tolist() if hasattr(part, "tolist") else part))


def _halve(x: Tensor) -> Tensor:
    """The sum of each block by folding it in half: element-wise additions are the same bits everywhere."""
    width = BLOCK
    if len(x) % BLOCK:
        import torch

        x = torch.nn.functional.pad(x, (0, -len(x) % BLOCK))
    x = x.view(-1, BLOCK)
    while width > 1:
        width //= 2
        x = x[:, :width] + x[:, width:]
    return x[:, 0]
