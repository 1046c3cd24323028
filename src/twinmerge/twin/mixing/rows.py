"""Whether rows of a batch stand first in the answer of somebody's own module: tried, not believed.

Other content is put into one row of the batch. Then that row of the answer may be another one, and no other may. What
is found holds for batches of the same names, shapes, dtypes and settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import UsageError
from twinmerge.models.nested import leaves, mapped

LEAK = 1e-3  # of a row's change that may be seen in other rows
ROUNDING = 64  # machine epsilons of the largest number that count as no change; of 16 bits a sixteenth of it
FEW = 4  # rows that are all tried
MORE = 8  # rows that are tried at most, where something did not change with the first, a middle and the last one
PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)
"""What is no tensor and may stand in an answer."""


def batch_tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a batch's rows are counted and changed in: its arguments, or what lies in its lists and
    mappings where no argument is a tensor."""
    own = [v for v in batch.values() if isinstance(v, Tensor) and v.dim()]
    return own or [v for _, v in leaves(dict(batch)) if isinstance(v, Tensor) and v.dim()]


def signature_of(batch: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a trial holds for; None where the batch holds something that does not say itself."""
    found: list[Any] = []
    for path, value in leaves(dict(batch)):
        if isinstance(value, Tensor):
            found.append((path, value.shape, value.dtype, value.device))
        elif isinstance(value, PLAIN):
            found.append((path, type(value), repr(value)))
        else:
            return None
    return tuple(found)


def by_rows(answer: Any, rows: int, name: str) -> dict[str, Tensor]:
    """Path -> the tensors of an answer.

    Args:
        name: of the module's class.

    Raises:
        UsageError: it holds what has no axis of rows in front.
    """
    found = {}
    for path, value in leaves(answer, "its answer"):
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested or value.is_quantized:
                raise no_rows(name, f"{path} is sparse, nested or quantised")
            if not value.dim() or len(value) != rows:
                raise no_rows(name, f"{path} is {list(value.shape)} for {rows} rows")
            found[path] = value.detach()
        elif not isinstance(value, PLAIN):
            raise no_rows(name, f"{path} holds a {type(value).__name__}, which has no rows")
    return found


def no_rows(name: str, why: str) -> UsageError:
    """The refusal of rows of different mixtures."""
    return UsageError(
        f"Rows of {name} cannot have different mixtures: {why}. Put the rows first (batch_first=True), or give one "
        "mixture for the whole batch."
    )


def followed(run: Callable[[Mapping[str, Any]], Any], batch: Mapping[str, Any], rows: int, name: str) -> set[str]:
    """Paths of those tensors of an answer of which some row was seen to follow that row of the batch.

    Args:
        run: answers a batch, each time with the same module.
        rows: of the batch, at least 2.
        name: of the module's class.

    Raises:
        UsageError: it gives another answer each time, rows depend on each other or are not on the first axis.
    """
    first = by_rows(run(batch), rows, name)
    again = by_rows(run(batch), rows, name)
    for path, value in first.items():
        if path not in again or _differs(value, again[path]):
            raise no_rows(name, f"{path} is another one each time")
    seen: set[str] = set()
    for count, row in enumerate(_tried(rows)):
        if rows > FEW and count >= 3 and (seen == first.keys() or count >= MORE):
            break
        for other in _others(batch, row, rows):
            try:
                answer = run(other)
            except UsageError:  # content that does not go together
                continue
            if changed := _changed(first, by_rows(answer, rows, name), row, name):
                seen |= changed
                break
    if not seen:
        raise no_rows(name, "no row of its answer was seen to follow that row of the batch")
    return seen


def _tried(rows: int) -> list[int]:
    """All rows, the first, a middle and the last one in front."""
    return list(dict.fromkeys([0, rows // 2, rows - 1, *range(rows)]))


def _changed(first: Mapping[str, Tensor], found: Mapping[str, Tensor], row: int, name: str) -> set[str]:
    """Paths of the tensors in which the one row is another.

    Raises:
        UsageError: so is some other row.
    """
    changed = set()
    if first.keys() != found.keys():
        raise no_rows(name, "its answer has other parts when a row is another one")
    for path, before in first.items():
        after = found[path]
        if after.shape != before.shape or after.dtype != before.dtype:  # cut to the longest row: nothing is told by it
            continue
        gaps, noise = _gaps(before, after), _noise(before)
        own = float(gaps[row])
        others = torch.cat([gaps[:row], gaps[row + 1 :]])
        leaking = LEAK * own if before.is_floating_point() and math.isfinite(own) else 0.0
        if float(others.max()) > max(leaking, noise):
            raise no_rows(name, f"other rows of {path} change with row {row}")
        if own > noise:
            changed.add(path)
    return changed


def _differs(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.dtype != b.dtype or float(_gaps(a, b).max()) > _noise(a)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """(rows,) The largest difference of each row's numbers; 1 for integers that differ."""
    if not a.numel():
        return torch.zeros(len(a))
    if not (a.is_floating_point() or a.is_complex()):
        return (a != b).reshape(len(a), -1).any(1).float()
    gap = (a - b).abs().float().nan_to_num(torch.inf, torch.inf)
    return torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, gap).reshape(len(a), -1).amax(1)


def _noise(a: Tensor) -> float:
    """What counts as rounded differently."""
    if not a.numel() or not (a.is_floating_point() or a.is_complex()):
        return 0.0
    largest = float(a.abs().float().nan_to_num(0.0, 0.0).max())
    kind = torch.finfo(a.dtype)
    return (ROUNDING if kind.bits > 16 else ROUNDING / 16) * kind.eps * largest


def _others(batch: Mapping[str, Any], row: int, rows: int) -> Iterator[Mapping[str, Any]]:
    """The batch with other content in one row: first all of a near row's, then whatever is another in each tensor."""
    tensors = [t for t in batch_tensors(batch) if len(t) == rows]
    near = sorted((r for r in range(rows) if r != row), key=lambda r: (abs(r - row), -r))[:16]

    def put(content: Mapping[int, Tensor]) -> Mapping[str, Any]:
        def of(path: str, found: Sequence[Any]) -> Any:
            if (own := content.get(id(found[0]))) is None:
                return found[0]
            other = found[0].detach().clone()
            other[row] = own.detach()
            return other.requires_grad_(found[0].requires_grad)

        made: Mapping[str, Any] = mapped([dict(batch)], of)
        return made

    for other in near:
        if not all(torch.equal(t[other], t[row]) for t in tensors):
            yield put({id(t): t[other] for t in tensors})
            break
    yield put({id(t): _other(t, row, near) for t in tensors})


def _other(tensor: Tensor, row: int, near: Sequence[int]) -> Tensor:
    """Content for a row that is another: a near row's, else noise of the tensor's scale or its numbers backwards."""
    for other in near:
        if not torch.equal(tensor[other], tensor[row]):
            return tensor[other]
    own = tensor[row]
    if not tensor.is_floating_point():
        return own.flip(list(range(own.dim())))
    scale = tensor.std(correction=0) if tensor.numel() > 1 else tensor.abs().max()
    noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(row)).to(own)
    return own + noise * torch.where(scale > 0, scale, tensor.abs().max().clamp(min=1.0))
