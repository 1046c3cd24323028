"""Whether a module that somebody brings along answers every row of a batch apart from the others.

Of transformers' models it is known how a batch lies. Of any other module it is tried: its last row alone must get the
answer that it gets in the batch. A module that takes time first and rows second, or one that mixes rows, does not
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twinmerge.errors import TwinmergeError, UsageError
from twinmerge.models.headed import HeadedModel
from twinmerge.models.rows import batch_size, rows_of_batch

NEAR = 1e-3  # of the largest number of an answer, that one row may differ by

Signature = tuple[tuple[str, int, str], ...]


def signature_of(batch: Mapping[str, Any]) -> Signature:
    """Names, axes and dtypes of a batch: what is tried once holds for all like it."""
    return tuple((name, v.dim(), str(v.dtype)) for name, v in batch.items() if isinstance(v, Tensor))


@torch.no_grad()
def require_rows(model: HeadedModel, batch: Mapping[str, Any]) -> None:
    """Refuse a module whose rows cannot have different mixtures.

    Args:
        model: the shared model, of a class that is not transformers'.
        batch: at least two rows.

    Raises:
        TwinmergeError: it does not run on a row alone, gives an answer without an axis of rows, or another one.
    """
    size = batch_size(batch)
    last = torch.tensor([size - 1], device=next(iter(v for v in batch.values() if isinstance(v, Tensor))).device)
    whole = model(batch)
    try:
        one = model(rows_of_batch(batch, last, size))
    except Exception as error:  # whatever a module raises at a shape that it does not take
        raise _refused(model, f"it does not run on one row alone ({type(error).__name__}: {error})") from error
    _compare(model, whole, one, size, "its answer")


def _compare(model: HeadedModel, whole: Any, one: Any, size: int, what: str) -> None:
    if isinstance(whole, Tensor) and isinstance(one, Tensor):
        if whole.dim() == 0 or len(whole) != size or one.shape != (1, *whole.shape[1:]):
            raise _refused(model, f"{what} is {list(whole.shape)} for {size} rows and {list(one.shape)} for one")
        largest = float(whole.abs().amax()) if whole.numel() and whole.is_floating_point() else 0.0
        if not torch.allclose(whole[-1:], one, rtol=NEAR, atol=NEAR * largest, equal_nan=True):
            raise _refused(model, f"{what} to the last row is another one when that row is alone")
    elif isinstance(whole, Mapping) and isinstance(one, Mapping) and whole.keys() == one.keys():
        for key in whole:
            _compare(model, whole[key], one[key], size, f"{what}[{key!r}]")
    elif isinstance(whole, (tuple, list)) and type(one) is type(whole) and len(one) == len(whole):
        for i, (a, b) in enumerate(zip(whole, one, strict=True)):
            _compare(model, a, b, size, f"{what}[{i}]")
    elif whole is not None or one is not None:
        raise _refused(model, f"{what} holds a {type(whole).__name__}, which has no rows")


def _refused(model: HeadedModel, why: str) -> TwinmergeError:
    return UsageError(
        f"Rows of {type(model.body).__name__} cannot have different mixtures: {why}. Put the rows first "
        "(batch_first=True), or give "
        "one mixture for the whole batch."
    )
