"""How two models differ, tensor by tensor."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from twinmerge.maths.sums import blocked_dot, total
from twinmerge.models.opened import ModelLike, open_model


class Difference(NamedTuple):
    """Of one tensor: ‖a‖, ‖b − a‖, ‖b − a‖/‖a‖, the cosine of a and b, max |b − a|, the share of equal entries."""

    name: str
    norm: float
    change: float
    relative: float
    cosine: float
    largest: float
    equal: float


class Diff(NamedTuple):
    """tensors: shared ones; only_a, only_b: names that only one has; other_shape: names of unequal shapes."""

    tensors: list[Difference]
    only_a: list[str]
    only_b: list[str]
    other_shape: list[str]


def difference(name: str, a: Tensor, b: Tensor) -> Difference:
    """The numbers of one tensor, sums in float64.

    Example:
        >>> import torch
        >>> difference("w", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))[:6]
        ('w', 5.0, 4.0, 0.8, 0.6, 4.0)
    """
    a, b = a.float(), b.float()
    change = b - a
    aa, bb, ab, cc = (total(blocked_dot(x, y)) for x, y in ((a, a), (b, b), (a, b), (change, change)))
    norm = aa**0.5
    cosine = ab / (aa * bb) ** 0.5 if aa and bb else 1.0 if aa == bb else 0.0
    largest = change.abs().max().item() if change.numel() else 0.0
    equal = (change == 0).float().mean().item() if change.numel() else 1.0
    return Difference(name, norm, cc**0.5, cc**0.5 / norm if norm else float(cc > 0), cosine, largest, equal)


def diff(a: ModelLike, b: ModelLike, progress: bool = True) -> Diff:
    """Compare two models by canonical names; both are read once, a tensor at a time."""
    left, right = open_model(a), open_model(b)
    shared = sorted(left.specs.keys() & right.specs.keys())
    same = [n for n in shared if left.specs[n].shape == right.specs[n].shape]
    bar = tqdm(same, "comparing", delay=1, leave=False, disable=None if progress else True)
    return Diff(
        [difference(name, left.read(name), right.read(name)) for name in bar if left.specs[name].is_float],
        sorted(left.specs.keys() - right.specs.keys()),
        sorted(right.specs.keys() - left.specs.keys()),
        [n for n in shared if n not in set(same)],
    )
